"""The same global order on every number of ranks and after a resume."""

import numpy as np
import pytest

from glora_llm.data.sampler import GlobalSampler, permutation
from glora_llm.errors import UserError


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_the_union_over_ranks_is_the_step(world: int, micro: int) -> None:
    sampler = GlobalSampler(50, 16, seed=3)
    for step in (0, 2, 3, 40):
        parts = [sampler.process_rows(step, rank, world, micro) for rank in range(world)]
        assert all(len(batch) == micro for part in parts for batch in part)
        in_order = [n for k in range(16 // (micro * world)) for part in parts for n in part[k]]
        assert in_order == sampler.step_rows(step)


def test_epochs_are_permutations_one_after_the_other() -> None:
    sampler = GlobalSampler(10, 4, seed=0)
    endless = [n for step in range(15) for n in sampler.step_rows(step)]
    epochs = [endless[start : start + 10] for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_a_step_is_a_pure_function() -> None:
    forward, backward = GlobalSampler(10, 4, seed=1), GlobalSampler(10, 4, seed=1)
    steps = [forward.step_rows(step) for step in range(30)]
    assert [backward.step_rows(step) for step in reversed(range(30))] == steps[::-1]
    assert GlobalSampler(10, 4, seed=2).step_rows(0) != steps[0]


def test_a_batch_larger_than_the_data_goes_round() -> None:
    rows = GlobalSampler(3, 8, seed=0).step_rows(0)
    assert len(rows) == 8 and sorted(rows[:3]) == sorted(rows[3:6]) == [0, 1, 2]


def test_steps() -> None:
    sampler = GlobalSampler(10, 4, seed=0)
    assert sampler.steps_per_epoch == 2.5
    assert [sampler.steps_for(epochs) for epochs in (0.1, 1, 2, 0.4)] == [1, 3, 5, 1]
    assert GlobalSampler(12, 4, seed=0).steps_for(3) == 9


@pytest.mark.parametrize(
    ("global_batch", "world", "micro", "told"),
    [
        (10, 4, 2, r"10 is not micro_batch 2 x accumulation x 4 processes: .* multiples of 8: 8 or 16"),
        (4, 4, 2, "multiples of 8: 8\\."),
    ],
)
def test_batches_that_do_not_divide(global_batch: int, world: int, micro: int, told: str) -> None:
    with pytest.raises(UserError, match=told):
        GlobalSampler(100, global_batch, seed=0).process_rows(0, 0, world, micro)


def test_no_rows() -> None:
    with pytest.raises(UserError, match="from 0 rows"):
        GlobalSampler(0, 4, seed=0)


def test_the_order_is_the_same_from_version_to_version() -> None:
    """Runs are resumed after upgrades: these numbers must not change."""
    assert permutation(8, 0, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert sorted(permutation(1000, 7).tolist()) == list(range(1000))
    assert permutation(0, 1).dtype == np.int64
