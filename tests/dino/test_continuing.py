"""Training on from weights that are good already: what they knew is measured first, and its loss is told."""

import pytest

from dino.monitor import Monitor
from dino.pretraining import pretrain
from dino.runtime.options import UserError
from tests.dino.small_runs import load, rows, tiny, write_pictures

pytestmark = pytest.mark.usefixtures("quick")


def looks(monkeypatch, *accuracies):
    """k-NN accuracies before the training and after each epoch."""
    monkeypatch.setattr(
        Monitor,
        "look",
        lambda self, backbone, *, epochs: {} if accuracies[epochs] is None else {"knn": accuracies[epochs]},
    )


def continued(pictures, finished, folder, **changes):
    return tiny(pictures, folder, init_from=str(finished / "checkpoint.pth"), **changes)


def test_k_nn_is_measured_before_the_first_step_and_told_at_the_end(tmp_path, pictures, finished, capsys):
    pretrain(continued(pictures, finished, tmp_path, eval_size=16))
    before = rows(finished)[-1]["knn"]
    assert rows(tmp_path)[0]["knn_init"] == pytest.approx(before)
    assert "knn_random" not in rows(tmp_path)[0]
    out = capsys.readouterr().out
    assert f"before training: 20-NN accuracy {before:.1f} %" in out
    assert f"20-NN accuracy: {before:.1f} % for the weights it started from, " in out
    assert load(tmp_path)["progress"]["knn_init"] == pytest.approx(before)


@pytest.mark.parametrize(
    ("allowed", "accuracies", "warnings"),
    [
        (5.0, (60.0, 55.0, 40.0), 1),  # 5 points are not more than 5
        (5.0, (60.0, 54.9, 40.0), 2),
        (30.0, (60.0, 54.9, 40.0), 0),
        (0.0, (60.0, 61.0, 60.0), 0),
        (0.0, (60.0, 59.9, 70.0), 1),
    ],
)
def test_a_fall_beyond_what_is_allowed_is_told(
    allowed, accuracies, warnings, tmp_path, pictures, finished, monkeypatch, capsys
):
    looks(monkeypatch, *accuracies)
    pretrain(continued(pictures, finished, tmp_path, knn_drop=allowed))
    assert capsys.readouterr().out.count("FORGETTING: ") == warnings


def test_the_warning_says_how_much_is_lost_and_what_to_do(tmp_path, pictures, finished, monkeypatch, capsys):
    looks(monkeypatch, 60.0, 60.0, 40.0)
    pretrain(continued(pictures, finished, tmp_path))
    assert (
        "FORGETTING: k-NN accuracy is 40.0 %, 20.0 points below that of "
        f"{finished / 'checkpoint.pth'} before the training, and --knn_drop allows 5: lower --lr, raise "
        "--momentum_teacher, or stop here; --preset continue is made for this"
    ) in capsys.readouterr().out


def test_only_a_network_better_than_the_given_one_is_kept_as_the_best(
    tmp_path, pictures, finished, monkeypatch
):
    looks(monkeypatch, 60.0, 55.0, 60.0, 61.0)
    pretrain(continued(pictures, finished, tmp_path, epochs=2))
    assert not (tmp_path / "best_knn.pth").exists()
    pretrain(continued(pictures, finished, tmp_path, epochs=3))
    assert load(tmp_path, "best_knn.pth")["epoch"] == 3


def test_without_looks_the_option_for_them_is_named(tmp_path, pictures, finished, capsys):
    pretrain(continued(pictures, finished, tmp_path, knn_freq=0))
    assert "whether anything is lost: give a --knn_freq above 0" in capsys.readouterr().out


def test_a_resumed_run_still_knows_what_it_started_from(tmp_path, pictures, finished, monkeypatch, capsys):
    looks(monkeypatch, 60.0, 60.0, 40.0, 30.0)
    pretrain(continued(pictures, finished, tmp_path, epochs=1))
    assert "FORGETTING" not in capsys.readouterr().out
    pretrain(continued(pictures, finished, tmp_path, epochs=3))
    assert capsys.readouterr().out.count("FORGETTING: ") == 2
    assert [row["knn_init"] for row in rows(tmp_path)] == [60.0] * 3


def test_a_run_from_random_weights_forgets_nothing(tmp_path, pictures, monkeypatch, capsys):
    looks(monkeypatch, 60.0, 10.0, 10.0)
    pretrain(tiny(pictures, tmp_path))
    assert "FORGETTING" not in capsys.readouterr().out
    assert rows(tmp_path)[0]["knn_random"] == 60.0


def test_without_labels_it_is_said_that_nothing_watches(tmp_path, finished, capsys):
    folder = write_pictures(tmp_path / "one", classes=("cats",)) / "cats"
    pretrain(continued(folder, finished, tmp_path / "run"))
    assert (
        "no k-NN accuracy to tell whether anything is lost: give --knn_data, with classes"
        in capsys.readouterr().out
    )


def test_the_preset_needs_weights(tmp_path, pictures):
    with pytest.raises(UserError, match="--preset continue starts from weights: name them with --init_from"):
        pretrain(tiny(pictures, tmp_path, preset="continue"))
