import pytest

from dino.downstream.length import Length, of_epochs, of_iterations
from dino.runtime.options import UserError


def test_epochs_are_rounds():
    length = of_epochs(103, 10, 3)
    assert (length.steps, length.steps_per_round, length.rounds) == (30, 10, 3)
    assert [step for step in range(1, 31) if length.ends_round(step)] == [10, 20, 30]


def test_iterations_are_cut_into_rounds_the_last_of_which_may_be_shorter():
    length = of_iterations(8, 4, 11, every=4)
    assert (length.steps, length.rounds, length.steps_per_epoch) == (11, 3, 2)
    assert [step for step in range(1, 12) if length.ends_round(step)] == [4, 8, 11]
    assert of_iterations(8, 4, 3, every=100).rounds == 1


@pytest.mark.parametrize("step", [0, 1, 2, 3, 5])
def test_the_order_after_a_step_is_the_rest_of_the_whole_order(step):
    length = of_iterations(7, 3, 6, every=2)
    whole = list(length.order_after(0, seed=1))
    assert len(whole) >= 6
    assert list(length.order_after(step, seed=1)) == whole[step:]


def test_repeats_do_not_make_an_epoch_longer_nor_empty():
    length = of_epochs(5, 2, 1, repeats=3)  # the original would show none of fewer than 256 pictures
    assert length.steps == 2
    keys = [key for batch in length.order_after(0, seed=0) for key in batch]
    assert len(keys) == 4 and [turn for turn, _ in keys] == [0, 1, 2, 0]


def test_repetitions_of_two_epochs_have_keys_of_their_own():
    keys = [key for batch in of_epochs(6, 2, 2, repeats=3).order_after(0, seed=0) for key in batch]
    assert len(set(keys)) == 12


def test_pictures_that_do_not_fill_a_step_are_refused():
    with pytest.raises(
        UserError, match="5 pictures do not fill one batch of 8; lower --batch_size to 5 or less"
    ):
        of_epochs(5, 8, 1)


def test_a_length_is_a_value():
    assert of_epochs(8, 4, 2) == Length(8, 4, 4, 2)
