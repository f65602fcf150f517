"""Memory of one CPU process in each phase of a run: what is resident above the imports.

Weights that are computed with as they are stored stay mapped from their files: they are resident once they have been
read, and with them whatever else was read of these files (the weights that were quantised, say). What is allocated and
never written, such as most of a reduction bucket, is not resident.
"""

import torch

from glora_llm.errors import UserError
from glora_llm.models.fingerprint import read_header, weight_files
from glora_llm.models.folder import is_ours
from glora_llm.plan.memory import FLOAT32, Sharding, adapter_dtype, at_rest
from glora_llm.plan.phases import (
    Phase,
    Subject,
    compared_tokens,
    largest_parts,
    merged_bytes,
    merging,
    passed_through,
    sum_parts,
)

# Resident bytes that follow from no shape, measured on 2026-11-29 (docs/plan.md): what the libraries take when they
# are first used, by phase; what Python, PEFT, autograd and DeepSpeed keep of each trained tensor, whatever its size,
# by phase; a tokenizer, by piece of its vocabulary; the figures of a search.
LOADED, TRAINED, MERGED = 27e6, 34.5e6, 43e6
TENSOR_LOADED, TENSOR_TRAINED = 14e3, 22e3
TOKENIZER_PIECE, FIGURES = 1066.0, 20e6
MOST_ON_CPU, TIMED_TOKENS = 1.5e9, 64  # of merge/latency.py: models above so many bytes are not timed
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def cpu_phases(subject: Subject) -> list[Phase]:
    """Return the phases of one of `world_size` CPU processes: what is resident above the imports."""
    recipe, trained = subject.recipe, sum(subject.sizes.trained)
    width = adapter_dtype(recipe, subject.dtype).itemsize
    sharding = Sharding.of(recipe.training.deepspeed, subject.world_size)
    memory = at_rest(recipe, subject.sizes, subject.world_size, subject.dtype, 0)
    share = FLOAT32 * sharding.share(trained)
    pieces = TOKENIZER_PIECE * subject.sizes.vocabulary
    tensors = len(subject.sizes.trained)
    loading_libraries, libraries, merging_libraries = (
        {"libraries": round(size + pieces + tensors * each)}
        for size, each in ((LOADED, TENSOR_LOADED), (TRAINED, TENSOR_TRAINED), (MERGED, TENSOR_TRAINED))
    )
    loaded, base, reading = _weights(subject)
    optimizer = memory.optimizer + (3 * share if sharding.optimizer_on_cpu else 0)
    rest = base | {"adapter": memory.adapter, "optimizer": optimizer} | libraries
    bucket = int(sharding.zero.get("reduce_bucket_size", 5e8)) if sharding.stage else 0
    learning = {"gradients": memory.gradients, "buffers": min(bucket, trained) * width}
    # the optimizer's step: the gradients once more in one piece, the root of the second moment and its quotient
    stepping = {"gradients": memory.gradients + (share if sharding.stage else 0), "workspace": 2 * share}
    loading = loaded | loading_libraries | {"adapter": memory.adapter, "optimizer": optimizer, "workspace": reading}
    found = [
        Phase("loading", loading),
        Phase("at rest", rest),
        Phase("training", largest_parts([rest | learning | subject.passed("training"), rest | stepping])),
        Phase("evaluating", rest | subject.scored()),
        Phase("saving", sum_parts(rest, {"workspace": 3 * FLOAT32 * trained}, subject.scored())),
    ]
    if recipe.search is not None:
        search = largest_parts([rest | parts for parts in subject.searched()])
        found.append(Phase("searching", sum_parts(search, {"workspace": round(FIGURES)})))
    left = {"adapter": memory.adapter, "optimizer": optimizer}  # as measured: still resident when the merge begins
    if recipe.search is not None:
        merging_libraries["libraries"] += round(FIGURES)  # they were drawn
    held = max(merging(subject), _scored_merged(subject), _timed(subject))
    merged = left | merging_libraries | {"workspace": held}
    return passed_through(recipe, [*found, Phase("merging", merged)])


def _scored_merged(subject: Subject) -> int:
    """Return what the scoring of the merged model on test rows holds: its file, and its weights in another dtype."""
    recipe, sizes = subject.recipe, subject.sizes
    if recipe.data.test is None:
        return 0
    file = merged_bytes(subject)
    same = getattr(torch, recipe.merge.dtype) == subject.dtype
    weights = 0 if same else sizes.dense * subject.dtype.itemsize
    return FLOAT32 * compared_tokens(subject) * sizes.vocabulary + file + weights


def _timed(subject: Subject) -> int:
    """Return what the comparison of speeds holds (`merge.latency`): merged model and base, both in float32.

    The answers of the unmerged model are still there. In 4 bits (`nf4_lossless`) both are smaller than a merge.
    """
    recipe, sizes = subject.recipe, subject.sizes
    each = FLOAT32 * sizes.dense
    is_left_out = recipe.data.format == "images" or recipe.adapter.is_full or 2 * each > MOST_ON_CPU
    if is_left_out or recipe.merge.quantize == "nf4_lossless":
        return 0
    stored, dtypes = _stored(subject)
    base = stored if dtypes == {torch.float32} else each + stored  # mapped, or a copy beside the file that is read
    return each + base + FLOAT32 * sizes.vocabulary * (compared_tokens(subject) + 2 * TIMED_TOKENS)


def _weights(subject: Subject) -> tuple[dict[str, int], dict[str, int], int]:
    """Return the parts of the base behind loading and once all of it was read, and what is read beside it meanwhile."""
    sizes, width = subject.sizes, subject.dtype.itemsize
    packed = sizes.packed * width
    state = {"quantisation": sizes.state_bytes + sizes.teacher}
    copied = sum(sizes.frozen) * width
    if subject.recipe.adapter.is_full or is_ours(subject.folder):
        return {"base": copied + sizes.teacher}, {"base": copied + sizes.teacher}, 0
    stored, dtypes = _stored(subject)
    if dtypes == {subject.dtype}:  # what is not quantised stays mapped, and the files with it
        kept = (sum(sizes.frozen) - sizes.packed) * width
        read = stored - kept if packed else 0  # what was quantised; the rest is read by the first forward pass
        return {"base": read + packed} | state, {"base": stored + packed} | state, 0
    return {"base": copied} | state, {"base": copied} | state, stored


def _stored(subject: Subject) -> tuple[int, set[torch.dtype | None]]:
    """Return the bytes of the weights' files and their dtypes; of a folder without weights as if of `dtype`."""
    try:
        files = weight_files(subject.folder)
    except UserError:
        return subject.sizes.dense * subject.dtype.itemsize, {subject.dtype}
    found = {
        STORED.get(entry["dtype"]) for file in files for entry in read_header(file)[0].values() if "dtype" in entry
    }
    return sum(file.stat().st_size for file in files), found
