"""AdapterFusion: the paper's formula; a folder that is whole in itself; adapters that differ are refused."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import relu

from glora_llm.adapters.bottleneck import BottleneckConfig
from glora_llm.adapters.fusion import AdapterFusionConfig
from glora_llm.cli import main
from glora_llm.errors import AdapterError
from tests.adapters.module_models import batch, tiny_model
from tests.in_process import alone, train_in_process  # noqa: F401 - a fixture

BLOCK = {"llama": "model.layers.{}.mlp", "bert": "bert.encoder.layer.{}.output.dense"}
FIRST = {"llama": "model.layers.{}.mlp", "bert": "bert.encoder.layer.{}.intermediate"}


def trained(family: str, folder: Path, seed: int, **settings: Any) -> str:
    """Save a bottleneck adapter of random numbers; return its folder."""
    torch.manual_seed(seed)
    model = get_peft_model(tiny_model(family), BottleneckConfig(init_weights=False, **{"rank": 4} | settings))
    for name, parameter in model.named_parameters():
        if "bottleneck_" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(folder))
    return str(folder)


@torch.no_grad()
def logits(model: Any, family: str) -> Tensor:
    found: Tensor = model(**batch(family)).logits
    return found


def by_hooks(family: str, sources: list[str], scales: list[float], parallel: bool, fusion: dict[str, Tensor]) -> Any:
    """Return a base with the paper's formula, written out, at the feed-forward network of every block."""
    model, files = tiny_model(family), [load_file(f"{source}/adapter_model.safetensors") for source in sources]
    given: dict[str, Tensor] = {}

    def fused(place: str, h: Tensor) -> Tensor:
        key = f"base_model.model.{place}"
        z = []
        for file, scale in zip(files, scales, strict=True):
            w = {name: file[f"{key}.bottleneck_{name}"].double() for name in ("down.weight", "down.bias")}
            v = {name: file[f"{key}.bottleneck_{name}"].double() for name in ("up.weight", "up.bias")}
            narrow = relu(h @ w["down.weight"].T + w["down.bias"])
            z.append(scale * (narrow @ v["up.weight"].T + v["up.bias"]))
        q, k, v_, b = (
            fusion[f"{key}.fusion_attention.default.{name}"] for name in ("query", "key", "value", "query_bias")
        )
        products = torch.stack([((h @ q.T + b) * (one @ k.T)).sum(-1) for one in z])
        shares = products.softmax(0)
        values = torch.stack([one @ v_.T for one in z])
        return (shares.unsqueeze(-1) * values).sum(0)

    for number in range(2):
        place, first = BLOCK[family].format(number), FIRST[family].format(number)
        if parallel:
            model.get_submodule(first).register_forward_pre_hook(
                lambda _, args, place=place: given.__setitem__(place, args[0])
            )
        model.get_submodule(place).register_forward_hook(
            lambda _, args, y, place=place: y + fused(place, given[place] if parallel else y)
        )
    return model


@pytest.mark.parametrize(("family", "parallel"), [("llama", False), ("llama", True), ("bert", True)])
def test_it_is_the_papers_formula_and_its_folder_is_whole(family: str, parallel: bool, tmp_path: Path) -> None:
    scales = [0.5, 2.0, 1.0]
    sources = [
        trained(family, tmp_path / f"{seed}", seed, scale=scale, parallel=parallel) for seed, scale in enumerate(scales)
    ]
    torch.manual_seed(5)
    model = get_peft_model(tiny_model(family), AdapterFusionConfig(adapters=sources)).double().eval()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 4 and all("fusion_attention" in name for name in trainable)
    for name, parameter in trainable.items():
        if not name.endswith("value"):
            nn.init.normal_(parameter, std=0.3)
        else:
            assert torch.equal(parameter, torch.eye(32).double())
            parameter.data += 0.1 * torch.randn(32, 32)
    found = logits(model, family)
    fusion = {name: parameter.detach() for name, parameter in trainable.items()}
    expected = logits(by_hooks(family, sources, scales, parallel, fusion), family)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert (found - logits(tiny_model(family), family)).abs().max() > 1e-3

    model.save_pretrained(str(tmp_path / "fusion"))
    for source in sources:
        shutil.rmtree(source)
    loaded = PeftModel.from_pretrained(tiny_model(family), str(tmp_path / "fusion")).double().eval()
    torch.testing.assert_close(logits(loaded, family), found, rtol=1e-6, atol=1e-6)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, family), logits(tiny_model(family), family))
    with pytest.raises(AdapterError, match="cannot be merged"):
        loaded.merge_and_unload()


def test_it_learns_and_the_adapters_stay(tmp_path: Path) -> None:
    sources = [trained("llama", tmp_path / f"{seed}", seed) for seed in range(2)]
    model = get_peft_model(tiny_model("llama"), AdapterFusionConfig(adapters=sources))
    frozen = {name: copy.deepcopy(buffer) for name, buffer in model.named_buffers() if "fusion_frozen" in name}
    assert len(frozen) == 2 * 4
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(8):
        loss = model(**batch("llama"), labels=batch("llama")["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(buffer, frozen[name]) for name, buffer in model.named_buffers() if name in frozen)


def test_adapters_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    good = trained("llama", tmp_path / "good", 0)
    lora = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(str(tmp_path / "lora"))
    (tmp_path / "empty").mkdir()
    damaged = shutil.copytree(good, tmp_path / "damaged")
    (damaged / "adapter_model.safetensors").write_bytes(b"\x00" * 30)
    wrong = {
        "names 0 folder": [],
        "names 1 folder": [good],
        "good twice": [good, good],
        "nowhere is no folder": [good, str(tmp_path / "nowhere")],
        "empty holds no adapter_model.safetensors": [good, str(tmp_path / "empty")],
        "lora is of PEFT type LORA": [good, str(tmp_path / "lora")],
        "damaged/adapter_model.safetensors is no safetensors file": [good, str(damaged)],
        "rank: 4, and .*r6 has: 6": [good, trained("llama", tmp_path / "r6", 1, rank=6)],
        "self_attn.* nothing there": [good, trained("llama", tmp_path / "both", 1, places="both")],
        "parallel: False": [good, trained("llama", tmp_path / "beside", 1, parallel=True)],
        "activation: relu": [good, trained("llama", tmp_path / "gelu", 1, activation="gelu")],
        "is of method compacter": [good, trained("llama", tmp_path / "product", 1, kronecker=4)],
        "this model has no such module": [
            trained("bert", tmp_path / "bert", 1),
            trained("bert", tmp_path / "bert2", 2),
        ],
    }
    for says, folders in wrong.items():
        with pytest.raises(AdapterError, match=says):
            get_peft_model(tiny_model("llama"), AdapterFusionConfig(adapters=folders))


SHORT = [
    "adapter.slots=null", "training.steps=2", "training.warmup=0", "training.deepspeed=zero3", "data.max_rows=64",
    "data.validation=4", "data.max_test_rows=4", "output.save_every=1", "output.keep=2", "merge.after_training=false",
]  # fmt: skip


def test_a_run_holds_its_adapters_and_knows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained, resumed and scored it is in run/test_methods_walk.py."""
    sources = []
    for seed in range(2):
        out = tmp_path / f"houlsby{seed}"
        one = ["adapter.method=houlsby", f"training.seed={seed}", "training.steps=1", f"output.dir={out}"]
        assert train_in_process("tiny_cpu", *SHORT, *one) == 0
        sources.append(str(out / "adapter"))
    peft = f"adapter.peft={{adapters: [{', '.join(sources)}]}}"
    fuse, out = ["adapter.method=adapter_fusion", peft, *SHORT], tmp_path / "fusion"
    assert train_in_process("tiny_cpu", *fuse, f"output.dir={out}") == 0
    weights = load_file(out / "adapter" / "adapter_model.safetensors")
    assert sum(".fusion_frozen." in name for name in weights) == 4 * 4

    other = json.loads((tmp_path / "houlsby0" / "base.json").read_text())
    (tmp_path / "houlsby0" / "base.json").write_text(json.dumps(other | {"fingerprint": "0" * 64, "name": "another"}))
    assert train_in_process("tiny_cpu", *fuse, f"output.dir={tmp_path / 'refused'}") == 2
    assert "adapter.peft.adapters: " in (said := capsys.readouterr().err) and "was trained on another" in said
    (tmp_path / "houlsby0" / "base.json").write_text(json.dumps(other))
    again = shutil.copytree(out, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "step-2")
    shutil.rmtree(again / "adapter")
    shutil.copytree(tmp_path / "houlsby1" / "checkpoints" / "step-1" / "adapter", sources[0], dirs_exist_ok=True)
    assert train_in_process("tiny_cpu", *fuse, f"output.dir={again}") == 2
    assert "these are not the adapters that" in capsys.readouterr().err

    for source in sources:
        shutil.rmtree(Path(source).parent)
    assert train_in_process("tiny_cpu", *fuse, f"output.dir={tmp_path / 'refused'}") == 2
    assert "is no folder" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
    assert main(["evaluate", str(out), "--split", "test"]) == 0
    file = shutil.copytree(out, tmp_path / "lacking") / "adapter" / "adapter_model.safetensors"
    save_file({name: t for name, t in weights.items() if "layers.1.mlp.fusion_frozen" not in name}, file)
    (file.parent / "manifest.json").unlink(missing_ok=True)
    assert main(["evaluate", str(tmp_path / "lacking"), "--split", "test"]) == 2
    assert "is damaged: it lacks base_model.model.model.layers.1.mlp.fusion_frozen" in capsys.readouterr().err
