import json
import math

import pytest

from dino.runtime import run_log
from dino.runtime.options import UserError
from dino.runtime.run_log import NAME, EpochMeans, RunLog, read_log


@pytest.fixture(autouse=True)
def no_tensorboard(monkeypatch):
    monkeypatch.setattr(run_log, "_tensorboard", lambda folder: None)


def open_log(folder, *, first_epoch=0, active=True):
    return RunLog(
        folder,
        steps=10,
        first_step=2 * first_epoch,
        first_epoch=first_epoch,
        pictures_per_step=4,
        active=active,
    )


def log_epochs(folder, *epochs, first_epoch=0):
    log = open_log(folder, first_epoch=first_epoch)
    for epoch in epochs:
        log.epoch({"epoch": epoch, "train_loss": 5.0 - epoch})
    log.close()
    return log


def test_every_epoch_is_one_json_line(tmp_path):
    log = log_epochs(tmp_path, 0, 1)
    rows = [json.loads(line) for line in (tmp_path / NAME).read_text().splitlines()]
    assert (
        rows
        == log.rows
        == read_log(tmp_path)
        == [
            {"epoch": 0, "train_loss": 5.0},
            {"epoch": 1, "train_loss": 4.0},
        ]
    )


def test_a_resumed_run_drops_the_rows_that_it_trains_again(tmp_path):
    log_epochs(tmp_path, 0, 1, 2)
    log = log_epochs(tmp_path, 1, first_epoch=1)
    assert [row["epoch"] for row in read_log(tmp_path)] == [row["epoch"] for row in log.rows] == [0, 1]


def test_a_half_written_last_line_is_left_out(tmp_path):
    log_epochs(tmp_path, 0, 1)
    path = tmp_path / NAME
    path.write_text(path.read_text()[:-10])
    assert [row["epoch"] for row in read_log(tmp_path)] == [0]
    log_epochs(tmp_path, 1, first_epoch=1)
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [0, 1]


@pytest.mark.parametrize("line", ["3", "[]", '"epoch"', "notes"])
def test_a_line_that_is_no_row_ends_the_log(line, tmp_path):
    (tmp_path / NAME).write_text(f'{{"epoch": 0}}\n{line}\n{{"epoch": 1}}\n')
    assert read_log(tmp_path) == [{"epoch": 0}]


def test_values_that_are_not_finite_become_null(tmp_path):
    log = open_log(tmp_path)
    log.epoch({"epoch": 0, "train_loss": math.nan, "kl": math.inf, "knn": None, "train_lr": 0.1})
    line = (tmp_path / NAME).read_text()
    assert json.loads(line, parse_constant=pytest.fail) == log.rows[0]
    assert log.rows[0] == {"epoch": 0, "train_loss": None, "kl": None, "knn": None, "train_lr": 0.1}


def test_only_the_main_process_writes(tmp_path, capsys):
    log = open_log(tmp_path, active=False)
    log.say("hello")
    log.step(0, 1.0)
    log.epoch({"epoch": 0})
    log.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")


def test_the_bar_shows_epoch_loss_and_pictures_per_second(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_log, "_SECONDS_BETWEEN_LINES", 0.0)
    log = open_log(tmp_path, first_epoch=1)
    log.say("a line")
    log.start()
    for _ in range(8):
        log.step(1, 4.25)
    log.close()
    out, err = capsys.readouterr()
    assert out == "a line\n"
    last = err.splitlines()[-1]
    assert "epoch 1" in last and "10/10" in last and "loss 4.25" in last and "pictures/s" in last


def test_a_log_that_cannot_be_written_is_a_users_error(tmp_path):
    (tmp_path / NAME).mkdir()
    with pytest.raises(UserError, match=r"log\.txt"):
        open_log(tmp_path)


def test_means_are_over_the_steps_taken():
    means = EpochMeans()
    means.add({"loss": 1.0, "kl": 0.5})
    means.skip()
    means.add({"loss": 3.0, "kl": math.nan})
    assert means.means() == {"loss": 2.0, "kl": None}
    assert means.skipped == 1
    assert EpochMeans().means() == {} and EpochMeans().skipped == 0


def test_means_resumed_from_their_sums_equal_uninterrupted_ones():
    values = [0.1, 0.7, 1 / 3, 2.5]
    whole, first = EpochMeans(), EpochMeans()
    for value in values:
        whole.add({"loss": value})
    for value in values[:2]:
        first.add({"loss": value})
    first.skip()
    resumed = EpochMeans(json.loads(json.dumps(first.sums)))
    for value in values[2:]:
        resumed.add({"loss": value})
    assert resumed.means() == whole.means() and resumed.skipped == 1
    assert first.sums["steps"] == 2  # the saved sums are its own


def test_scalars_reach_tensorboard(tmp_path, monkeypatch):
    written = []

    class Board:
        def add_scalar(self, *scalar):
            written.append(scalar)

        def flush(self):
            pass

        close = flush

    monkeypatch.setattr(run_log, "_tensorboard", lambda folder: Board())
    log = open_log(tmp_path)
    log.epoch({"epoch": 3, "train_loss": 2.0, "knn": None, "skipped_steps": 0, "kl": math.nan})
    log.close()
    assert written == [("train_loss", 2.0, 3), ("skipped_steps", 0, 3)]


@pytest.mark.slow
def test_tensorboard_files_appear_where_it_is_installed(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.undo()
    log_epochs(tmp_path, 0)
    assert list((tmp_path / "tensorboard").glob("events.out.*"))
