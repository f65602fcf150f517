"""Bottleneck adapters, and fusions of adapters that do not go together."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.bad_input.case import Case, Change, bad

SIZES = {"down.weight": (4, 64), "down.bias": (4,), "up.weight": (64, 4), "up.bias": (64,)}
CONFIG = {
    "peft_type": "BOTTLENECK", "rank": 4, "parallel": False, "activation": "relu", "scale": 1.0, "kronecker": 0,
    "places": "feed_forward", "target_modules": ["model.layers.0.mlp", "model.layers.1.mlp"],
}  # fmt: skip


def adapter(name: str, place: str = "mlp", wide: int = 64, run: dict[str, Any] | None = None, **config: Any) -> Change:
    """Return what writes an adapter folder of zeros, as one was trained on the embedded LLaMA.

    Args:
        place: the module in each block.
        wide: of the hidden states.
        run: the base.json beside it.
        config: what differs in adapter_config.json.
    """

    def change(folder: Path) -> None:
        target = folder / name
        target.mkdir(parents=True)
        rank = config.get("rank", 4)
        sizes = {key: tuple({4: rank, 64: wide}[side] for side in shape) for key, shape in SIZES.items()}
        (target / "adapter_config.json").write_text(json.dumps(CONFIG | config))
        tensors = {
            f"base_model.model.model.layers.{number}.{place}.bottleneck_{key}": np.zeros(size, np.float32)
            for number in range(2)
            for key, size in sizes.items()
        }
        save_file(tensors, target / "adapter_model.safetensors")
        if run is not None:
            (target.parent / "base.json").write_text(json.dumps(run))

    return change


def fusion(
    says: str, *folders: str, change: Change | None = None, more: tuple[str, ...] = (), beside: str = ""
) -> Case:
    """Return a case that fuses folders; `first` and `second` go together.

    Args:
        more: changes of the recipe.
        beside: further arguments of adapter.peft.
    """

    def write(folder: Path) -> None:
        adapter("first")(folder)
        adapter("second")(folder)
        if change is not None:
            change(folder)

    given = f"adapter.peft={{adapters: [{', '.join(folders)}]{beside}}}"
    return bad(says, "adapter.method=adapter_fusion", given, *more, change=write)


BOTTLENECKS: dict[str, Case] = {
    "houlsby: places misspelt": bad(
        "places is 'ffn'; expected attention, feed_forward or both.",
        "adapter.method=houlsby",
        "adapter.peft={places: ffn}",
    ),
    "pfeiffer: activation misspelt": bad(
        "activation 'rellu' is unknown. Did you mean 'relu'?",
        "adapter.method=pfeiffer",
        "adapter.peft={activation: rellu}",
    ),
    "parallel_adapter: scale 0": bad(
        "scale is 0, and nothing would be trained", "adapter.method=parallel_adapter", "adapter.peft={scale: 0}"
    ),
    "compacter: n does not divide the rank": bad(
        "kronecker 4 must divide the adapter's rank, which is 6:", "adapter.method=compacter", "adapter.rank=6"
    ),
    "compacter: n does not divide the width": bad(
        "kronecker 3 does not divide 64 inputs and 64 outputs.",
        *("adapter.method=compacter", "adapter.rank=3", "adapter.peft={kronecker: 3}"),
    ),
    "adaptformer: merged after training": bad(
        "merge.after_training: An adapter of method adaptformer cannot be merged: its nonlinearity",
        *("adapter.method=adaptformer", "merge.after_training=true"),
    ),
    "fusion: two that go together": fusion("", "first", "second"),
    "fusion: none": bad(
        "adapter.peft.adapters names 0 folder(s), and a fusion weighs", "adapter.method=adapter_fusion"
    ),
    "fusion: one alone": fusion("adapter.peft.adapters names 1 folder(s), and a fusion weighs at least two", "first"),
    "fusion: one twice": fusion("first twice.", "first", "./first"),
    "fusion: a text": bad(
        "adapter.peft.adapters: got 'first'; expected a list of adapter folders.",
        *("adapter.method=adapter_fusion", "adapter.peft={adapters: first}"),
    ),
    "fusion: a folder that is not there": fusion("adapter.peft.adapters: third is no folder.", "first", "third"),
    "fusion: another method": fusion(
        "other is of PEFT type LORA; a fusion weighs", "first", "other", change=adapter("other", peft_type="LORA")
    ),
    "fusion: another rank": fusion(
        "first has rank: 4, and other has: 2. A fusion", "first", "other", change=adapter("other", rank=2)
    ),
    "fusion: other places": fusion(
        "and other has: nothing there. A fusion", "first", "other", change=adapter("other", place="self_attn")
    ),
    "fusion: another base, by its fingerprint": fusion(
        "there/adapter was trained on another, and this recipe has",
        *("first", "there/adapter"),
        change=adapter("there/adapter", run={"name": "another", "fingerprint": "0" * 64}),
    ),
    "fusion: another base, by its modules": fusion(
        "this model has no such module: it was trained on",
        *("one", "two"),
        change=lambda folder: [adapter(name, place="feed")(folder) for name in ("one", "two")],
    ),
    "fusion: another base, by its width": fusion(
        "(2, 4, 64) fits this model: they were trained on",
        *("one", "two"),
        change=lambda folder: [adapter(name, wide=32)(folder) for name in ("one", "two")],
    ),
    "fusion: a number of adapters beside them": fusion(
        "adapter.peft.count follows from the adapters that are fused: take it away.",
        "first",
        "second",
        beside=", count: 3",
    ),
    "fusion: targets beside the adapters'": fusion(
        "a fusion goes where its adapters are. Take it away.", "first", "second", more=("adapter.targets=[q_proj]",)
    ),
}
