"""Packing, collating, and the test that packed samples do not see each other."""

from typing import Any

import numpy as np
import pytest
import torch

from glora_llm.data.batch import collate, collate_joined, cut, join
from glora_llm.data.pack import pack
from glora_llm.data.store import Row
from glora_llm.errors import UserError

LENGTHS = [int(n) for n in np.random.default_rng(0).integers(1, 65, 500)]


def test_every_sample_stands_in_one_row_and_no_row_is_too_long() -> None:
    rows = pack(LENGTHS, 64)
    assert sorted(n for row in rows for n in row) == list(range(500))
    assert max(sum(LENGTHS[n] for n in row) for row in rows) <= 64
    assert sum(LENGTHS) / (len(rows) * 64) > 0.94
    assert rows == pack(LENGTHS, 64)


def test_packing_is_as_good_as_the_plain_rule() -> None:
    """Best-fit decreasing, written down naively."""
    naive: list[list[int]] = []
    for n in sorted(range(500), key=lambda n: -LENGTHS[n]):
        fitting = [row for row in naive if sum(LENGTHS[m] for m in row) + LENGTHS[n] <= 64]
        if fitting:
            max(fitting, key=lambda row: sum(LENGTHS[m] for m in row)).append(n)
        else:
            naive.append([n])
    assert len(pack(LENGTHS, 64)) == len(naive)


def test_packing_corner_cases() -> None:
    assert pack([], 8) == []
    assert pack([8, 8], 8) == [[0], [1]]
    assert pack([5, 3, 4, 4], 8) == [[0, 1], [2, 3]]
    with pytest.raises(UserError, match="9 tokens does not fit"):
        pack([9], 8)


def row(*lengths: int, first: int = 5) -> Row:
    """A row of samples whose targets are all but the first token."""
    tokens = np.arange(first, first + sum(lengths), dtype=np.int32)
    starts = [0, *np.cumsum(lengths)[:-1].tolist()]
    targets = np.ones(len(tokens), dtype=np.bool_)
    targets[starts] = False
    return Row(tokens, targets, starts)


def test_collate_restarts_positions_and_pads_by_length() -> None:
    batch = collate([row(3, 2), row(4, 1, 2)], pad_id=6)  # 6 is also a token of the first row
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 6, 6], [5, 6, 7, 8, 9, 10, 11]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 0, 0, 1]]
    assert batch["targets"].tolist() == [6, 7, 9, 6, 7, 8, 11]
    assert batch["target_index"].tolist() == [0, 1, 3, 7, 8, 9, 12]  # the token before each, of 2 x 7


def test_collate_says_where_segments_begin() -> None:
    """Padding belongs to the segment before it, and no segment reaches into another row."""
    batch = collate([row(3, 2), row(4, 1, 2)], pad_id=6)
    assert batch["segment_lengths"] == (3, 4, 4, 1, 2) and sum(batch["segment_lengths"]) == batch["input_ids"].numel()
    assert batch["segment_offsets"].tolist() == [0, 3, 7, 11, 12, 14] and batch["segment_offsets"].dtype == torch.int32


def test_joined_rows_have_no_padding_and_the_same_samples() -> None:
    wasteful, snug = [row(2), row(9, 3)], [row(12), row(9, 3)]
    joined = collate_joined(wasteful, pad_id=0)
    assert joined["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2]]
    assert joined["targets"].tolist() == collate(wasteful, pad_id=0)["targets"].tolist()
    assert collate_joined(snug, pad_id=0)["input_ids"].shape == (2, 12)  # nothing to save
    assert join(wasteful).starts == [0, 2, 11]


def test_the_first_token_of_a_sample_is_never_a_label() -> None:
    careless = Row(np.arange(4, dtype=np.int32), np.ones(4, dtype=np.bool_), [0, 2])
    batch = collate([careless], 0)
    assert (batch["targets"].tolist(), batch["target_index"].tolist()) == ([1, 3], [0, 2])


def test_a_cut_row_keeps_what_stands_before() -> None:
    part = cut(row(3, 2, 4), 4)
    assert part.tokens.tolist() == [5, 6, 7, 8] and part.targets.tolist() == [False, True, True, False]
    assert part.starts == [0, 3]


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request: pytest.FixtureRequest) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation=request.param,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("flat", [False, True], ids=["rows", "flat"])
def test_packed_samples_do_not_see_each_other(model: Any, flat: bool) -> None:
    """Packed logits are those of each sample alone: rows of several samples, padding, a sample of one token."""
    rows = [row(7, 5, 9), row(1, 12, first=30), row(6, first=40), row(3, 1, 4, first=20)]
    batch = collate([join(rows)] if flat else rows, pad_id=2)
    ends = np.cumsum([len(r.tokens) for r in rows])
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        if flat:
            packed = [packed[0, end - len(r.tokens) : end] for end, r in zip(ends, rows, strict=True)]
        compared = 0
        for n, r in enumerate(rows):
            for start, stop in zip(r.starts, [*r.starts[1:], len(r.tokens)], strict=True):
                alone = torch.from_numpy(r.tokens[start:stop].astype(np.int64))[None]
                logits = model(input_ids=alone, use_cache=False).logits[0]
                torch.testing.assert_close(packed[n][start:stop], logits, atol=1e-5, rtol=0)
                compared += 1
    assert compared == 9


def test_the_leak_would_be_seen(model: Any) -> None:
    """Without restarting positions the logits differ: the test above can fail."""
    r = row(7, 5)
    tokens = torch.from_numpy(r.tokens.astype(np.int64))[None]
    with torch.no_grad():
        leaking = model(input_ids=tokens, use_cache=False).logits[0, 7:]
        alone = model(input_ids=tokens[:, 7:], use_cache=False).logits[0]
    assert (leaking - alone).abs().max() > 1e-3
