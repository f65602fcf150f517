"""`glora-llm import`: what follows an import, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import HiraConfig, IA3Config, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from glora_llm.cli import main
from glora_llm.models.resolve import ResolvedModel
from tests.foreign.conftest import Save, load
from tests.in_process import train_in_process
from tests.written_records import write_questions

TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}
TARGETS = ["q_proj", "down_proj"]
Change = Callable[[Path], object]


def run(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.mark.parametrize("kind", ["lora", "hira", "ia3"])
def test_merged_weights_are_those_of_peft(kind: str, tiny: ResolvedModel, peft_folder: Save, tmp_path: Path) -> None:
    config, around = {
        "lora": (LoraConfig(**TASK, target_modules=TARGETS, r=2, lora_alpha=3), 0.0),
        "hira": (HiraConfig(**TASK, target_modules=TARGETS, r=2), 0.0),
        "ia3": (IA3Config(**TASK, target_modules=TARGETS, feedforward_modules=["down_proj"]), 1.0),
    }[kind]
    theirs, _ = peft_folder(tiny.folder, config, around)
    assert run("import", theirs, "--base", "embedded:tiny-llama", "--out", tmp_path / "own") == 0
    assert run("merge", tmp_path / "own", "--out", tmp_path / "merged", "--dtype", "float32") == 0
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert report["top1_agreement"] == 1.0
    found = load_file(tmp_path / "merged" / "model.safetensors")
    wanted = PeftModel.from_pretrained(load(tiny.folder), str(theirs)).double().merge_and_unload().state_dict()
    assert found
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-6, atol=1e-7)


def test_training_goes_on_from_an_import(tiny: ResolvedModel, peft_folder: Save, tmp_path: Path) -> None:
    """A learning rate of almost nothing leaves the imported weights: training began with them."""
    theirs, _ = peft_folder(tiny.folder, HiraConfig(**TASK, target_modules=["q_proj"], r=2, modules_to_save=["norm"]))
    own = tmp_path / "own"
    assert run("import", theirs, "--base", "embedded:tiny-llama", "--out", own) == 0
    rows = write_questions(tmp_path / "rows.jsonl")
    changes = (f"data.source={rows}", "data.format=prompt_completion", f"output.dir={tmp_path / 'run'}")
    small = ("training.global_batch=2", "training.steps=2", "training.lr=1e-12", "data.validation=2")
    recipe = str(own / "recipe.yaml")
    assert train_in_process(recipe, *changes, *small, "--dry-run") == 0
    assert not (tmp_path / "run").exists()
    assert train_in_process(recipe, *changes, *small) == 0
    before, after = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (own, tmp_path / "run"))
    assert before.keys() == after.keys() and any("norm" in name for name in before)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-8)


def test_an_imported_lora_is_exported_as_a_lora(tiny: ResolvedModel, peft_folder: Save, tmp_path: Path) -> None:
    theirs, _ = peft_folder(tiny.folder, LoraConfig(**TASK, target_modules=TARGETS, r=2, lora_alpha=3))
    assert run("import", theirs, "--base", "embedded:tiny-llama", "--out", tmp_path / "own") == 0
    assert run("merge", tmp_path / "own", "--out", tmp_path / "lora", "--to", "lora") == 0


def _config(**values: Any) -> Change:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return apply


def _only(name: str) -> Change:
    def change(folder: Path) -> None:
        for file in folder.iterdir():
            if file.name != name:
                file.unlink()

    return change


Q = "base_model.model.model.layers.0.self_attn.q_proj"
WRONG: dict[str, tuple[Change, str]] = {
    "another method": (_config(peft_type="LOHA"), "'LOHA' is not read. Read are of PEFT: GLORA, HIRA, IA3, LORA"),
    "our own": (_config(peft_type="GLORA_LLM"), "adapter.weights takes the folder"),
    "pissa": (_config(init_lora_weights="pissa"), "changes the base"),
    "dora": (_config(use_dora=True), "use_dora=True"),
    "biases": (_config(bias="all"), "bias='all'"),
    "an unknown key": (_config(use_novelty=True), "use_novelty=True"),
    "another rank": (_config(r=4), "lora_A has rank 2, and adapter_config.json gives it 4"),
    "a magnitude": (
        _tensors(lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(64)})),
        "q_proj: a DoRA's magnitude",
    ),
    "half a layer": (
        _tensors(lambda t: t.pop(f"{Q}.lora_B.weight")),
        "layers.0.self_attn.q_proj: lora_B.weight is mis",
    ),
    "another shape": (
        _tensors(lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(2, 63)})),
        "(2, 63), and the base's",
    ),
    "another name": (
        _tensors(lambda t: t.update({f"{Q[:-4]}x.lora_A.weight": torch.ones(2, 64)})),
        "has no layer 'model.layers.0.self_attn.q_x'",
    ),
    "no linear": (
        _tensors(lambda t: t.update({"base_model.model.model.norm.lora_A.weight": torch.ones(2, 64)})),
        "'model.norm' is a LlamaRMSNorm",
    ),
    "no saved module": (_config(modules_to_save=["lm_head"]), "and the adapter holds no lm_head.weight"),
    "a stray tensor": (_tensors(lambda t: t.update({"base_model.model.x": torch.ones(2)})), "The adapter holds x"),
    "another copy of the base": (
        _tensors(lambda t: t.update({"base_model.model.model.norm.weight": torch.zeros(64)})),
        "copy of its base's model.norm.weight",
    ),
    "not finite": (
        _tensors(lambda t: t[f"{Q}.lora_A.weight"].fill_(torch.nan)),
        "up of slot B holds values that",
    ),
    "no layer": (_tensors(lambda t: t.clear()), "no adapted layer"),
    "cut weights": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0"),
        "is damaged, or no safetensors file",
    ),
    "cut configuration": (lambda folder: (folder / "adapter_config.json").write_text("{"), "is no JSON"),
    "a list": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "holds a list"),
    "a pickle": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        "adapter_model.bin is a pickle, which is not read",
    ),
    "no weights": (_only("adapter_config.json"), "and no adapter_model.safetensors"),
    "no configuration": (_only("adapter_model.safetensors"), "which is of no format here. Read are"),
    "nothing": (_only("none"), "holds no safetensors file. Read are"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_what_has_no_exact_form_is_refused_and_nothing_is_written(
    change: Change,
    message: str,
    tiny: ResolvedModel,
    peft_folder: Save,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    theirs, _ = peft_folder(tiny.folder, LoraConfig(**TASK, target_modules=TARGETS, r=2, lora_alpha=3))
    change(theirs)
    before = set(tmp_path.iterdir())
    assert run("import", theirs, "--base", "embedded:tiny-llama", "--out", tmp_path / "own") == 2
    said = capsys.readouterr().err
    assert message in said and said.count("error:") == 1 and "Traceback" not in said
    assert set(tmp_path.iterdir()) == before


LYCORIS: dict[str, tuple[dict[str, torch.Tensor], dict[str, str], str]] = {
    "another method": (
        {"lora_down.weight": torch.ones(2, 64)},
        {},
        "q_proj: lora_down.weight is not of LyCORIS's GLoRA",
    ),
    "tucker": ({"bm.weight": torch.ones(2)}, {}, "Tucker factors are for convolutions"),
    "half": ({"a1.weight": torch.ones(64, 2)}, {}, "q_proj: a2.weight is missing"),
    "rslora": ({"a1.weight": torch.ones(64, 2)}, {"ss_network_args": '{"rs_lora": "True"}'}, "alpha / sqrt(r)"),
}


@pytest.mark.parametrize(("parts", "metadata", "message"), LYCORIS.values(), ids=LYCORIS)
def test_what_of_lycoris_is_refused(
    parts: dict[str, torch.Tensor],
    metadata: dict[str, str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stem = "lycoris_model_layers_0_self_attn_q_proj"
    save_file({f"{stem}.{name}": tensor for name, tensor in parts.items()}, tmp_path / "net.safetensors", metadata)
    command = ("import", tmp_path / "net.safetensors", "--out", tmp_path / "own")
    assert run(*command) == 2 and "give --base MODEL" in capsys.readouterr().err
    assert run(*command, "--base", "embedded:tiny-llama") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "own").exists()


def test_the_base_is_compared(
    tiny: ResolvedModel, biased: Path, peft_folder: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By name a warning, as PEFT stores no more; by the fingerprint where a run of this program trained the adapter."""
    theirs, _ = peft_folder(biased, LoraConfig(**TASK, target_modules=TARGETS, r=2, lora_alpha=3))
    assert run("import", theirs, "--base", tiny.folder, "--out", tmp_path / "own") == 0
    assert f"trained on a base called {biased}" in capsys.readouterr().out
    (tmp_path / "base.json").write_text(json.dumps({"name": "x", "fingerprint": "0" * 64, "dtype": "float32"}))
    (tmp_path / "recipe.yaml").write_text("")
    assert run("import", theirs, "--base", tiny.folder, "--out", tmp_path / "second") == 2
    assert "fingerprint 000000000000" in capsys.readouterr().err
