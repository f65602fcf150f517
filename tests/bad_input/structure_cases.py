"""`training.lr: auto`, even scaling, and structures within `adapter.budget`."""

import json
from pathlib import Path

from tests.bad_input.case import Case, bad, file

BUDGET = "adapter.budget=10k"
GRADIENTS = "adapter.predictor=curvature"


def many(folder: Path) -> None:
    """Write records enough for a predictor."""
    rows = [{"prompt": f"What is {n}?", "completion": f" It is {n}."} for n in range(80)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


STRUCTURES: dict[str, Case] = {
    "lr auto of a model that is trained as a whole": bad(
        "training.lr is auto, which is one rate for glora, lora, rslora, dora,",
        "training.lr=auto",
        "adapter={method: full}",
    ),
    "lr auto of a method of another kind": bad(
        "and adapter.method is ia3: its best rate follows no rule", "training.lr=auto", "adapter={method: ia3}"
    ),
    "lr auto without a slot of B's kind": bad(
        "training.lr is auto, which is the rate of a slot B in mode lora", "training.lr=auto", "adapter.preset=bitfit"
    ),
    "lr auto beside another start of PEFT's": bad(
        "adapter.peft sets init_lora_weights. Give a number.",
        "training.lr=auto",
        "adapter={method: lora, peft: {init_lora_weights: gaussian}}",
    ),
    "lr auto of such slots in even scaling": bad(
        "", "training.lr=auto", "adapter.slots={E: vector}", "adapter.scaling=even"
    ),
    "lr automatic": bad("training.lr: got 'automatic' (text), expected a number or 'auto'.", "training.lr=automatic"),
    "even scaling of LoRA": bad(
        "scaling even belongs to method glora, not to 'lora'", "adapter={method: lora, scaling: even}"
    ),
    "a budget of nothing": bad("adapter.budget '0' is no limit; expected parameters (0.1M,", "adapter.budget=0"),
    "a budget in another unit": bad("adapter.budget '10 bananas' is no limit", "adapter.budget=10 bananas"),
    "a budget with two limits of one unit": bad("adapter.budget limits parameters twice", "adapter.budget='1k,2M'"),
    "a budget below the smallest structure": bad(
        "adapter.budget 20 is below the smallest structure, slot E as vector of model.layers.0", "adapter.budget=20"
    ),
    "a budget that rank 1 of B does not fit into": bad(
        "adapter.budget is below rank 1 of slot B of any layer, with which predictors", "adapter.budget=70"
    ),
    "a budget of parameters and of megabytes": bad("", "adapter.budget='10k, 5MB'"),
    "a budget of a model's layers by gradients": bad("", BUDGET, GRADIENTS, change=many),
    "a budget for LoRA": bad("budget belongs to method glora, not to 'lora'", "adapter={method: lora, budget: 1M}"),
    "a budget beside a preset": bad(
        "budget chooses the slots of every layer, and preset", BUDGET, "adapter.preset=lora"
    ),
    "a budget beside paths: sample": bad(
        "budget chooses the slots of every layer, and paths", BUDGET, "adapter.paths=sample"
    ),
    "a budget beside weights": bad(
        "budget chooses the slots of every layer, and weights",
        BUDGET,
        "adapter.weights=here",
        change=file("here/a", ""),
    ),
    "a budget and a slot with a rank of its own": bad(
        "adapter.budget chooses the ranks: slot B has one of its own",
        BUDGET,
        "adapter.slots={B: {mode: lora, rank: 3}}",
    ),
    "a budget and a hadamard A": bad("slot A is a hadamard product", BUDGET, "adapter.composition=hadamard"),
    "a budget and blocks": bad("slot A is in mode block", BUDGET, "adapter.slots={A: block, B: lora}"),
    "a budget without a slot": bad("adapter.budget has no slot to choose", BUDGET, "adapter.slots={A: none}"),
    "uniform without slot B": bad(
        "adapter.predictor uniform gives slot B to every layer", BUDGET, "adapter.slots={E: vector}"
    ),
    "a budget for the embedding": bad(
        "adapter.budget chooses the slots of linears, and model.embed_tokens is",
        BUDGET,
        "adapter.targets=[embed_tokens]",
        "adapter.slots={B: lora}",
    ),
    "few samples for a predictor": bad(
        "adapter.predictor curvature needs gradients of 32 training samples or more, and there are", BUDGET, GRADIENTS
    ),
    "a short run before a run of few steps": bad(
        "adapter.predictor short_run trains 16 steps before the run, of 32 samples, and the run has 10: expected 64",
        BUDGET,
        "adapter.predictor=short_run",
        "training.steps=10",
        change=many,
    ),
    "a short run without slot B": bad(
        "adapter.predictor short_run trains slot B in a short run, and adapter.slots",
        BUDGET,
        "adapter.predictor=short_run",
        "adapter.slots={E: vector}",
    ),
    "a predictor without a budget": bad("predictor and budget_rows are of adapter.budget", GRADIENTS),
    "a predictor that there is not": bad(
        "adapter.predictor: got 'magic' (text), expected", BUDGET, "adapter.predictor=magic"
    ),
}
