"""The merged folder, loaded by plain transformers, says what the base with its adapter says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from glora_llm.errors import UserError
from glora_llm.evaluation.trained import load_adapted
from glora_llm.glora import GLoRALinear
from glora_llm.merge.model_merge import write_merged
from glora_llm.tasks.text import TextTask
from tests.merge.conftest import ALL_MODES, IDS, Train, Trained, logits


def reload(folder: Path) -> Any:
    """The folder as plain transformers reads it; every tensor has to be there."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def merge(trained: Trained, out: Path, dtype: str = "float32") -> Path:
    write_merged(trained.plan, trained.folder.adapter, out, trained.dtype, dtype)
    assert not list(out.parent.glob(".writing-*"))
    return out


CASES: dict[str, dict[str, Any]] = {
    "product with C and E": {"slots": ALL_MODES},
    "product with C and E on nf4": {"slots": ALL_MODES, "model": {"quantization": "nf4"}},
    "product with C and E on fp4, single": {
        "slots": ALL_MODES,
        "model": {"quantization": "fp4", "double_quantization": False},
    },
    "vectors on int8": {
        "slots": dict.fromkeys("ABCE", "vector"),
        "model": {"quantization": "int8"},
    },
    "hadamard on nf4": {"slots": ALL_MODES, "composition": "hadamard", "model": {"quantization": "nf4"}},
    "scalars": {"slots": {"A": "scalar", "B": "scalar", "C": "lora", "E": "scalar"}},
    "another path by layer, on nf4": {
        "slots": {"A": "lora", "B": "lora"},
        "paths": {r"layers\.1\..*q_proj": {"C": "lora", "E": "scalar"}},
        "model": {"quantization": "nf4"},
    },
    "some targets": {"slots": ALL_MODES, "targets": ["down_proj"]},
    "preset ssf": {"preset": "ssf"},
    "lora": {"method": "lora"},
    "rslora": {"method": "rslora", "model": {"quantization": "nf4"}},
    "dora": {"method": "dora"},
    "dora on nf4": {"method": "dora", "model": {"quantization": "nf4"}},
    "adalora": {"method": "adalora", "training": {"deepspeed": "zero0"}},
    "ia3": {"method": "ia3", "targets": ["k_proj", "v_proj"], "peft": {"feedforward_modules": []}},
    "the head too": {"slots": ALL_MODES, "modules_to_save": ["lm_head"]},
    "the head too, lora on nf4": {"method": "lora", "modules_to_save": ["lm_head"], "model": {"quantization": "nf4"}},
    "the embedding too": {"slots": {"B": "lora"}, "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("name", CASES)
def test_merged_equals_unmerged(name: str, train: Train, tmp_path: Path) -> None:
    trained = train(**CASES[name])
    expected, base = trained.logits(), logits(AutoModelForCausalLM.from_pretrained(trained.plan.base.folder).eval())
    assert (expected - base).abs().max() > 0.05
    model = reload(merge(trained, tmp_path / "out"))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert getattr(model.config, "quantization_config", None) is None
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_the_weights_are_those_of_the_loaded_model(quantization: str, dtype: str, train: Train, tmp_path: Path) -> None:
    """Tensor by tensor from the files, or at once from the model that was trained: the same bits."""
    trained = train(slots=ALL_MODES, model={"quantization": quantization, "dtype": dtype})
    written = load_file(merge(trained, tmp_path / "out") / "model.safetensors")
    model = load_adapted(trained.plan, trained.folder.adapter)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, GLoRALinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        weight, bias = layer.merged_weight(["default"])
        assert torch.equal(written[f"{name}.weight"], weight), name
        assert bias is not None and torch.equal(written[f"{name}.bias"], bias), name


@pytest.mark.parametrize(
    ("keys", "switches"),
    [
        ({"slots": ALL_MODES}, (True, True)),
        ({"slots": ALL_MODES, "targets": ["q_proj"]}, (True, False)),
        ({"slots": {"E": "scalar"}, "targets": ["up_proj"]}, (False, True)),
        ({"slots": {"A": "lora", "B": "lora"}}, (False, False)),
    ],
)
def test_bias_switches(keys: dict[str, Any], switches: tuple[bool, bool], train: Train, tmp_path: Path) -> None:
    out = merge(train(**keys), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert (config["attention_bias"], config["mlp_bias"]) == switches
    assert config["dtype"] == "float32" and config["use_cache"] is True
    biases = {name for name in load_file(out / "model.safetensors") if name.endswith(".bias")}
    assert len(biases) == 2 * (4 * switches[0] + 3 * switches[1])


@pytest.fixture(scope="module")
def plain(train: Train) -> Trained:
    return train(slots=ALL_MODES, merge={"max_shard_gb": 1e-4})


def test_several_shards(plain: Trained, tmp_path: Path) -> None:
    out = merge(plain, tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    held: dict[str, str] = {}
    size = 0
    for file in files:
        tensors = load_file(out / file)
        held |= dict.fromkeys(tensors, file)
        bytes_here = sum(tensor.nbytes for tensor in tensors.values())
        assert bytes_here <= 1e5 or len(tensors) == 1
        size += bytes_here
        with safe_open(out / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert held == index["weight_map"] and size == index["metadata"]["total_size"]
    torch.testing.assert_close(logits(reload(out)), plain.logits(), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_written_in_another_dtype(dtype: str, plain: Trained, tmp_path: Path) -> None:
    model = reload(merge(plain, tmp_path / "out", dtype))
    assert {value.dtype for value in model.parameters()} == {getattr(torch, dtype)}
    expected = plain.logits()
    assert (logits(model.float()) - expected).abs().mean() < 0.02 * expected.std()


def test_the_folder_is_complete(plain: Trained, tmp_path: Path) -> None:
    out = merge(plain, tmp_path / "out")
    text, task = "What is 1 and 2?", plain.plan.task
    assert isinstance(task, TextTask)
    assert AutoTokenizer.from_pretrained(out)(text).input_ids == task.tokenizer(text).input_ids
    base = plain.plan.base.folder / "generation_config.json"
    assert (out / "generation_config.json").read_bytes() == base.read_bytes()
    generated = reload(out).generate(IDS, max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, IDS.shape[1] + 3)


def test_an_existing_folder_is_left_alone(plain: Trained, tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("kept")
    with pytest.raises(UserError, match=r"exists already; name a new folder, or delete it"):
        merge(plain, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["kept.txt"]


def test_nothing_is_left_of_a_merge_that_failed(train: Train, tmp_path: Path) -> None:
    trained = train(slots=ALL_MODES)
    file = trained.folder.adapter / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "layers.1.mlp.up_proj.slot_E" in name)
    weights[name][0] = float("nan")
    save_file(weights, file)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj: .* not finite"):
        merge(trained, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def changed(trained: Trained, keep: str) -> None:
    """Drop all tensors of the adapter whose name lacks `keep`."""
    file = trained.folder.adapter / "adapter_model.safetensors"
    weights: dict[str, Tensor] = {name: value for name, value in load_file(file).items() if keep in name}
    save_file(weights, file)


def test_an_adapter_that_lacks_a_tensor(train: Train, tmp_path: Path) -> None:
    trained = train(slots=ALL_MODES)
    changed(trained, "layers.0.")
    with pytest.raises(UserError, match=r"does not fit the recipe: it lacks .*layers\.1\."):
        merge(trained, tmp_path / "out")


def test_an_adapter_with_a_tensor_too_many(train: Train, tmp_path: Path) -> None:
    trained = train(slots=ALL_MODES)
    file = trained.folder.adapter / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(iter(weights)).replace("layers.0", "layers.7")
    save_file(weights | {name: torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"it has .*layers\.7\..*, which the recipe has not"):
        merge(trained, tmp_path / "out")


def test_a_run_without_an_adapter(plain: Trained, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no adapter: the run has not ended"):
        write_merged(plain.plan, tmp_path / "nothing", tmp_path / "out", torch.float32, "float32")
