"""A learning rate that is too high is named in the first steps, once; noise is not."""

import pytest

from glora_llm.training.divergence import LossWatch


def said(losses: list[float], skipped: tuple[int, ...] = (), dead: tuple[int, ...] = ()) -> list[tuple[int, str]]:
    watch = LossWatch(0.5)
    found = [
        (step, watch.look(loss, 0.0 if step in dead else 1.0, step in skipped, step))
        for step, loss in enumerate(losses, 1)
    ]
    return [(step, text) for step, text in found if text]


def test_two_losses_in_a_row_far_above_the_first() -> None:
    [(step, text)] = said([4.0, 5.0, 9.0, 10.8, 11.0, 12.0])
    assert step == 4
    assert "was 4.00 at first, and is 10.80 after step 4" in text and "lower training.lr (it is 0.5;" in text


@pytest.mark.parametrize("losses", [[4.0, 3.0, 2.0], [1.4, 4.5, 1.0, 4.5, 0.5], [4.0, 9.0, 4.0, 9.0], [0.7, 2.9, 2.9]])
def test_noise_is_not_divergence(losses: list[float]) -> None:
    assert not said(losses)


def test_a_step_that_is_not_finite_brings_the_advice_once() -> None:
    [(step, text)] = said([4.0, float("nan"), float("inf"), 4.0], skipped=(2, 3))
    assert step == 2 and "lower training.lr (it is 0.5)" in text


def test_a_gradient_of_zero_in_two_steps_in_a_row() -> None:
    assert not said([4.0] * 6, dead=(2, 4))
    [(step, text)] = said([5.8, 5.6, 5.6, 5.6], dead=(2, 3, 4))
    assert (
        step == 3 and "exactly 0 in 2 steps in a row up to step 3" in text and "lower training.lr (it is 0.5;" in text
    )
