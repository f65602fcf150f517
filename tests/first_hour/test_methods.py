"""Every method of PEFT trains, is scored and merges, or is refused before training, with the reason."""

from pathlib import Path

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from glora_llm.adapters.config import LORA_VARIANTS
from glora_llm.adapters.methods import METHODS, REFUSED
from glora_llm.cli import main
from tests.in_process import alone, train_in_process  # noqa: F401 - a fixture

SHORT = [
    "adapter.slots=null", "training.steps=2", "training.warmup=0", "training.deepspeed=zero0", "data.max_rows=64",
    "data.validation=4", "data.max_test_rows=4", "output.save_every=2",
]  # fmt: skip
NEEDED = {  # arguments without which a method does not fit layers of 64 inputs, as its own message says
    "c3a": {"block_size": 32},
    "road": {"group_size": 16},
    "waveft": {"n_frequency": 64},
}
TRAINED = sorted(METHODS.keys() - {"glora", "full"})  # those have tests of their own


def test_every_method_of_peft_is_in_one_table() -> None:
    of_peft = {kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - {"glora_llm"}
    assert of_peft - METHODS.keys() - REFUSED.keys() == set()
    assert METHODS.keys() - of_peft == {"full", *LORA_VARIANTS} - of_peft
    assert REFUSED.keys() <= of_peft


@pytest.mark.parametrize("name", TRAINED)
def test_it_trains_is_scored_and_merges_or_says_why_not(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = [f"adapter.method={name}", f"output.dir={out}", *SHORT]
    if name in NEEDED:
        arguments.append(f"adapter.peft={NEEDED[name]}")
    if METHODS[name].unmerged:
        assert train_in_process("tiny_cpu", *arguments, "merge.after_training=true") == 2
        assert METHODS[name].unmerged in capsys.readouterr().err
    assert train_in_process("tiny_cpu", *arguments, "merge.after_training=false") == 0
    assert ("merge      An adapter" in capsys.readouterr().out) == bool(METHODS[name].unmerged)
    assert main(["evaluate", str(out), "--split", "test"]) == 0
    assert main(["merge", str(out), "--out", str(tmp_path / "merged")]) == (2 if METHODS[name].unmerged else 0)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_before_training(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["train", "--recipe", "tiny_cpu", f"adapter.method={name}", f"output.dir={tmp_path / 'run'}", *SHORT]) == 2
    )
    assert f"adapter.method {name} does not train here: {REFUSED[name]}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in [*METHODS, *REFUSED])
