"""Every method of `glora-llm methods`, on each kind of model that it claims, from its first step to its merge.

`make test` walks all of them on one kind; `make test-reliability` every method on every kind.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from glora_llm.adapters.methods import KINDS, LINEAR_ALONE, METHODS
from glora_llm.adapters.prompt_arguments import PROMPT_METHODS
from tests.in_process import alone, one_thread
from tests.run.methods_walk import MODELS, Walker

__all__ = ["alone", "one_thread"]
CHECKPOINTED = "model.gradient_checkpointing=true"
SETTINGS = {  # beside those of the model
    ("llama", "prompt_tuning"): ["training.deepspeed=zero1", "model.quantization=nf4", CHECKPOINTED],
    ("llama", "p_tuning"): ["training.deepspeed=zero3", CHECKPOINTED],
    ("llama", "prefix_tuning"): ["training.deepspeed=zero2", CHECKPOINTED],
    ("llama", "p_tuning_v2"): ["training.deepspeed=zero3", CHECKPOINTED],
    ("vit", "vpt"): ["model.quantization=nf4", "adapter.peft={num_tokens: 5, dropout: 0.1}"],
    ("vit", "noah"): ["model.quantization=nf4"],
    ("gpt2", "glora"): ["adapter.slots={A: lora, B: lora, C: vector, D: vector, E: vector}"],
}
CLAIMED = [
    (model, name) for model, kind in MODELS.items() for name, method in METHODS.items() if kind.claimed in method.kinds
]
# which a method cannot take, though it takes others of the kind
REFUSED = {("gpt2", name): "is a Conv1D, a linear whose weight is transposed" for name in LINEAR_ALONE}
REFUSED |= {("bert", name): "from which the head of an encoder" for name in PROMPT_METHODS}
# of `make test`: each method where it is at home, and two that no other test of a run has
FIRST = [("llama" if "text" in method.kinds else "vit", name) for name, method in METHODS.items()]
ALSO = [("gpt2", "glora"), ("bert", "adapter_fusion")]
MIXED = ("delora", "pvera", "vera")  # PEFT keeps frozen tensors of theirs in float32


@pytest.fixture(scope="module")
def walker(alone: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Walker]:
    made: dict[str, Walker] = {}

    def of(model: str) -> Walker:
        if model not in made:
            made[model] = Walker(MODELS[model], tmp_path_factory.mktemp(model))
        return made[model]

    return of


def test_the_walk_goes_everywhere() -> None:
    assert {kind.claimed for kind in MODELS.values()} == set(KINDS)
    assert {name for _, name in CLAIMED} == set(METHODS) and {*FIRST, *ALSO, *SETTINGS, *REFUSED} <= set(CLAIMED)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        pytest.param(*one, marks=() if one in [*FIRST, *ALSO] else pytest.mark.reliability, id="-".join(one))
        for one in CLAIMED
    ],
)
def test_it_trains_resumes_and_merges_or_says_why_not(
    model: str, name: str, walker: Callable[[str], Walker], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if (model, name) in REFUSED:
        walker(model).require_refused(name, tmp_path, capsys, REFUSED[model, name])
        return
    more = SETTINGS.get((model, name), [])
    run = walker(model).walk(name, tmp_path, capsys, *more)
    if (model, name) in FIRST and name != "full":
        walker(model).require_trained_on(run, name, *more)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in MIXED else pytest.mark.reliability)
        for name, method in METHODS.items()
        if "text" in method.kinds
    ],
)
def test_it_trains_in_bfloat16(name: str, walker: Callable[[str], Walker], tmp_path: Path) -> None:
    more = ["model.dtype=bfloat16", "training.deepspeed=zero1", "merge.after_training=false"]
    assert walker("llama").train(name, *more, f"output.dir={tmp_path / 'run'}", "training.steps=1") == 0
