"""The speed of a merged model against its base, in one run: both in memory, and passes that take turns."""

import gc
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from glora_llm.evaluation.trained import fits, load_merged
from glora_llm.launch.device import choose_device
from glora_llm.models.fingerprint import stored_bytes
from glora_llm.models.load import load_base
from glora_llm.models.stored import StoredTensors
from glora_llm.plan.plan import Plan

TOKENS = 64
ROUNDS, LEAST_SECONDS = 5, 0.5  # at least so many rounds for at least so long: passes of small models take milliseconds
FEWEST, MOST_SECONDS = 3, 5.0  # on a slow machine the fewest are enough
MOST_ON_CPU = 1.5e9  # bytes: two models of 188 M weights, some seconds; a merge is small beside larger ones
MOST_OF_MEMORY = 0.8  # of what is free


@torch.no_grad()
def measure_latency(plan: Plan, merged: Path, quantization: str = "none") -> dict[str, Any]:
    """Return tokens/s of a merged model and of its base, both in the same dtype, and the ratio of the two.

    A round is one pass of each over the same tokens, in turn, so that what else the machine does strikes both. The
    ratio is the median of the rounds' ratios; above 1 the merged model is the faster one.

    Args:
        merged: a merged model that was written.
        quantization: of the merged model, in which the base is loaded too.

    Returns:
        the part `latency` of merge_report.json; `skipped` alone, with the reason, where the two are not in memory.
    """
    where = choose_device()
    reason = _obstacle(plan, merged, where)
    if reason:
        return {"skipped": reason}
    after = load_merged(merged)
    dtype = str(after.dtype).removeprefix("torch.")
    section = plan.recipe.model.model_copy(update={"quantization": quantization, "dtype": dtype})
    before = load_base(section, plan.base.folder, where).eval()
    before.set_attn_implementation(after.config._attn_implementation)  # training packs, and has an attention of its own
    config = after.config.get_text_config(decoder=True)
    length = min(TOKENS, getattr(config, "max_position_embeddings", None) or TOKENS)  # BLOOM has no such bound
    ids = torch.arange(length, device=where)[None] % config.vocab_size
    for model in (before, after):
        _seconds(model, ids)  # a first pass allocates
    rounds: list[tuple[float, float]] = []
    while _goes_on(rounds):
        rounds.append(_round(before, after, ids, len(rounds) % 2 == 1))
    del before, after
    gc.collect()
    base, own = (statistics.median(seconds[n] for seconds in rounds) for n in (0, 1))
    return {
        "merged_tokens_per_second": length / own,
        "base_tokens_per_second": length / base,
        "ratio": statistics.median(seconds[0] / seconds[1] for seconds in rounds),
        "measured": f"median of {len(rounds)} alternating passes over 1 x {length} tokens, {dtype} on {where.type}",
    }


def latency_in_words(latency: dict[str, Any]) -> str:
    """Return a line for the terminal."""
    if "skipped" in latency:
        return f"speed not measured: {latency['skipped']}"
    return (
        f"speed {latency['merged_tokens_per_second']:.1f} tokens/s, its base {latency['base_tokens_per_second']:.1f}, "
        f"ratio {latency['ratio']:.3f} ({latency['measured']})"
    )


def _obstacle(plan: Plan, merged: Path, where: torch.device) -> str | None:
    import psutil

    if plan.recipe.data.format == "images" or plan.recipe.head:
        return "it is measured of language models"
    if where.type != "cpu":
        return None if fits(2 * stored_bytes(merged), where) else "the two do not fit on the GPU together"
    both = 2 * 4 * StoredTensors(merged).numbers()  # a CPU computes in float32
    if both > MOST_ON_CPU:
        return f"the two would take {both / 1e9:.1f} GB of memory; it is measured up to {MOST_ON_CPU / 1e9:.1f} GB"
    if both > MOST_OF_MEMORY * psutil.virtual_memory().available:
        return "the two do not fit in the memory that is free"
    return None


def _goes_on(rounds: list[tuple[float, float]]) -> bool:
    seconds, count = sum(map(sum, rounds)), len(rounds)
    is_enough = count >= ROUNDS and seconds >= LEAST_SECONDS
    return count < FEWEST or (seconds < MOST_SECONDS and not is_enough)


def _round(before: Any, after: Any, ids: torch.Tensor, swapped: bool) -> tuple[float, float]:
    """Return the seconds of the base and of the merged model, which goes first in every other round."""
    if swapped:
        own = _seconds(after, ids)
        return _seconds(before, ids), own
    base = _seconds(before, ids)
    return base, _seconds(after, ids)


def _seconds(model: Any, ids: torch.Tensor) -> float:
    if ids.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(input_ids=ids, use_cache=False)
    if ids.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
