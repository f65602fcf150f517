"""Check 9: some layers of the 70B shape in nf4 under ZeRO 3: loading, a step a layer, and what is divided."""

import json
from collections.abc import Iterator

from glora_llm.plan.memory import GB
from scripts.gpu_checks.context import Context
from scripts.gpu_checks.launching import finish
from scripts.gpu_checks.report import Row, absent, compared, information
from scripts.gpu_checks.sharded_shape_worker import LAYERS

GATHERED = 1.1  # bytes of all processes over those of the model
SCALES = 0.04  # and of what is not divided, for each further process
ROOM = 1e9  # bytes that loading may need beside a shard and two layers
WHOLE = 80  # layers of the 70B model


def check(context: Context) -> Iterator[Row]:
    """Load, train two steps, and compare what each process held with its share."""
    if context.processes == 1:
        yield absent("70B shape under ZeRO 3", "one GPU: nothing is divided")
        return
    name = "rehearsal" if context.is_rehearsal else "70B"
    out = context.out / "sharded_shape"
    out.mkdir()
    finish(context, "scripts.gpu_checks.sharded_shape_worker", name, str(out))
    facts = json.loads((out / "facts.json").read_text(encoding="utf-8"))
    layers = LAYERS[name]
    held, whole = facts["held"], facts["whole"]
    share, most = held * context.processes / whole, GATHERED + SCALES * (context.processes - 1)
    yield compared(
        f"{layers} layers: bytes of all processes",
        f"at most {most:.2f} x the model",
        f"{share:.2f} x",
        share <= most,
    )
    bound = held + 2 * facts["layer"] + ROOM
    item = f"{layers} layers: most that one process held while loading"
    if context.is_rehearsal:
        yield absent(item, "counted on a GPU alone")
    else:
        loading = facts["loading"]
        text = f"at most {bound / GB:.1f} GB: shard, two layers, 1 GB"
        yield compared(item, text, f"{loading / GB:.1f} GB", loading <= bound, **facts)
        at_whole = held * WHOLE / layers + 2 * facts["layer"] + ROOM
        yield information(f"the same of all {WHOLE} layers, extrapolated", f"at most {at_whole / GB:.1f} GB")
    seconds = facts["seconds"]
    yield information("a step", f"{seconds:.2f} s, {seconds / layers:.3f} s a layer", seconds=seconds, layers=layers)
