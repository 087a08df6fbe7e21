from dino.evaluation.probe_table import probe_table


def test_every_number_stands_beside_its_protocol_and_what_is_unknown_is_left_empty():
    lines = probe_table(
        [
            {
                "protocol": "SGD",
                "features": "CLS",
                "chosen": {"lr": 0.0464},
                "held_out": 40.0,
                "top1": 39.125,
                "top5": None,
                "balanced": 30.0,
                "at_edge": True,
            },
            {"protocol": "logistic", "features": "CLS + patch mean", "top1": 100.0, "balanced": 100.0},
        ]
    )
    header, first, second = (line.split("  ") for line in lines[:3])
    assert header[0].strip() == "protocol" and header[-1] == "balanced"
    assert [cell.strip() for cell in first if cell.strip()] == [
        "SGD",
        "CLS",
        "lr 0.046!",
        "40.00",
        "39.12",
        "30.00",
    ]
    assert [cell.strip() for cell in second if cell.strip()] == [
        "logistic",
        "CLS + patch mean",
        "100.00",
        "100.00",
    ]
    assert len({line.rindex(".") for line in lines[1:3]}) == 1  # numbers stand below each other
    assert lines[3:] == [
        "held-out: accuracy on the part of train on which the setting was chosen; val is looked at once",
        "!: the best setting was at the end of its grid; beyond it may be a better one",
    ]


def test_accuracies_over_draws_have_their_spread_and_small_classes_are_told():
    entry = {"mean": 17.25, "spread": 2.5, "accuracies": (15.0, 19.5), "small_classes": 3}
    lines = probe_table([{"protocol": "logistic, 5 per class", "features": "CLS", **entry}])
    assert "17.25 ± 2.50" in lines[1]
    assert lines[2:] == [
        "few pictures per class: mean and standard deviation over 2 draws",
        "logistic, 5 per class: 3 classes have fewer, and gave all",
    ]


def test_what_was_chosen_on_val_is_said_and_not_in_the_column():
    lines = probe_table(
        [{"protocol": "SGD", "features": "CLS", "top1": 70.0, "best_top1": 71.5, "balanced": 1.0}]
    )
    assert "70.00*" in lines[1] and "71.50" not in lines[1]
    assert lines[2] == "*: at the end; the best epoch, chosen on val as DINO's script does, had 71.50"
