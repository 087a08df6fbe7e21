# One environment, made once. `make demo TORCH=cpu` takes the small CPU build of torch.
PYTHON ?= python3
TORCH ?=
BIN := .venv/bin
INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python $(if $(TORCH),--torch-backend=$(TORCH))

BROWSERS := chromium chromium-browser google-chrome

.PHONY: setup browser demo test check bench bench-gpu clean

setup: .venv/installed

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Python 3.10 or newer is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv --clear .venv || { \
	  echo "Python's venv module is missing; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "Installing into .venv (torch is large: the first time takes some minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(INSTALL) --editable '.[dev]'
	@touch $@

demo: setup
	@$(BIN)/python -m dino.train --preset tiny --data_path demo --output_dir runs/demo
	@$(BIN)/python -m dino.evaluation.compare --data_path demo --output_dir runs/demo \
	  --pretrained_weights runs/demo/checkpoint.pth
	@$(BIN)/python visualize_attention.py --input demo --layout grid --output_dir runs/demo/look \
	  --pretrained_weights runs/demo/checkpoint.pth

# The gallery is tested in Chromium. Only root on Debian or Ubuntu gets it installed; else those tests are skipped.
browser:
	@for name in $(BROWSERS); do command -v $$name >/dev/null && exit 0; done; \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
	  && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
	  || echo "No Chromium here: its tests will be skipped"

# Most of the time goes into starting processes: two files at a time, each computing in one thread.
test: setup browser
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -m "not slow"

# On a machine that does nothing else, about a quarter of an hour.
bench: setup
	@$(INSTALL) --editable '.[dev,bench]'
	@$(BIN)/python benchmarks/bench.py --output benchmarks/results/cpu.json

# On a machine with a GPU, in less than 8 minutes.
bench-gpu: setup
	@$(BIN)/python benchmarks/gpu.py --output benchmarks/results/gpu.json

clean:
	rm -rf .venv runs dist
