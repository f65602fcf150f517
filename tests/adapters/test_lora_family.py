"""LoRA dropout, PeriodicLoRA and LORS: their formulas, what PEFT saves and loads, merges, and that they learn."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from glora_llm.adapters.inject import inject, tuner_layers
from glora_llm.adapters.lora_dropout import Masks, Sample
from glora_llm.adapters.methods import METHODS, unmerged
from glora_llm.adapters.weights import save_adapter, trainables
from glora_llm.errors import UserError
from glora_llm.schema import AdapterSection
from tests.adapters.module_models import tiny_model
from tests.adapters.test_inject import llama
from tests.adapters.test_stateful import Training

FAMILY = ("lora_dropout", "periodic_lora", "lors")
IDS = torch.arange(24).reshape(2, 12)


def adapted(name: str, seed: int = 1, base: Any = None, **peft: Any) -> Any:
    """Return an adapted tiny LLaMA whose trained numbers are all random, and PeriodicLoRA's past is not empty."""
    section = AdapterSection(method=name, rank=4, targets=["q_proj", "down_proj"], peft=peft or None)
    model = inject(base or llama(), section, seed=0, steps=20)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        for layer in tuner_layers(model).values():
            if hasattr(layer, "lora_past"):
                shapes = (4, layer.in_features), (layer.out_features, 4)
                for _ in range(2):
                    a, b = (0.3 * torch.randn(shape, generator=generator) for shape in shapes)
                    layer.lora_past["default"].append(a, b)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("name", FAMILY)
def test_it_is_a_sum_of_products_saved_loaded_merged_and_taken_away(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    plain, found = logits(llama()), logits(model)
    dense = llama()
    for place, layer in tuner_layers(model).items():
        pairs = [(layer.lora_A["default"].weight, layer.lora_B["default"].weight)]
        if name == "periodic_lora":
            past = layer.lora_past["default"]
            pairs += [(past.down[k : k + 4], past.up[:, k : k + 4]) for k in (0, 4)]
        if name == "lors":
            pairs.append((layer.lora_shared["default"].down, layer.lora_shared["default"].up))
        weight = dense.get_submodule(place).weight
        weight.data += 16 / 4 * torch.stack([b @ a for a, b in pairs]).sum(0).detach()
    assert (found - plain).abs().max() > 0.1
    torch.testing.assert_close(found, logits(dense), rtol=1e-4, atol=1e-4)

    masters = {f"master/{key}": p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
    save_adapter(model, masters, tmp_path, "base")
    again = PeftModel.from_pretrained(llama(), str(tmp_path))
    torch.testing.assert_close(logits(again), found, rtol=0, atol=0)
    with again.disable_adapter():
        torch.testing.assert_close(logits(again), plain, rtol=0, atol=0)
    model.save_pretrained(tmp_path / "by_peft")  # without our own list of names
    assert load_file(tmp_path / "by_peft/adapter_model.safetensors").keys() == _names(tmp_path)
    model.base_model.merge_adapter()
    torch.testing.assert_close(logits(model), found, rtol=1e-4, atol=1e-4)
    model.base_model.unmerge_adapter()
    torch.testing.assert_close(logits(model), found, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(again.merge_and_unload()), found, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model.unload()), plain, rtol=1e-4, atol=1e-5)


def _names(folder: Path) -> Any:
    return load_file(folder / "adapter_model.safetensors").keys()


@pytest.mark.parametrize("name", FAMILY)
def test_it_learns(name: str) -> None:
    torch.manual_seed(0)
    model = inject(llama(), AdapterSection(method=name, rank=4, peft=None), seed=0, steps=30).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5, losses


def test_lora_dropout_drops_columns_of_a_and_rows_of_b() -> None:
    model = adapted("lora_dropout", p=0.25).train()
    layer = next(iter(tuner_layers(model).values()))
    a, b, x = layer.lora_A["default"].weight, layer.lora_B["default"].weight, torch.randn(3, 5, layer.in_features)
    torch.manual_seed(7)
    found = layer(x) - layer.get_base_layer()(x)
    torch.manual_seed(7)
    columns, rows = torch.rand(a.shape[1]) >= 0.25, torch.rand(b.shape[0]) >= 0.25
    assert 0 < rows.sum() < len(rows)
    wanted = 4 * (x * columns / 0.75) @ a.T @ b.T * rows / 0.75
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (found[..., ~rows] == 0).all()

    masks = Masks(0.25, 0, Sample())
    drawn = [masks.draw(True, (a, b)) for _ in range(4000)]
    assert all(pair is not None for pair in drawn)
    for side, size in enumerate((a.shape[1], b.shape[0])):
        mean = torch.stack([pair[side] for pair in drawn if pair is not None]).mean(0)
        assert mean.shape == (size,) and (mean - 1).abs().max() < 5 * math.sqrt(1 / 3 / 4000)
    assert masks.draw(False, (a, b)) is None and Masks(0.0, 0, Sample()).draw(True, (a, b)) is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_lora_dropout_has_the_same_masks_in_recomputation(reentrant: bool) -> None:
    layer = next(iter(tuner_layers(adapted("lora_dropout").train()).values()))
    x, gradients = torch.randn(3, 5, layer.in_features, requires_grad=True), []
    for recomputed in (False, True):
        torch.manual_seed(3)
        y = checkpoint(layer, x, use_reentrant=reentrant) if recomputed else layer(x)
        torch.randn(10)  # between forward and backward
        gradients.append(torch.autograd.grad(y.square().sum(), [x, *_factors(layer)], retain_graph=False)
                         if not reentrant else _backward(y, x, layer))  # fmt: skip
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)


def _factors(layer: Any) -> list[Tensor]:
    return [layer.lora_A["default"].weight, layer.lora_B["default"].weight]


def _backward(y: Tensor, x: Tensor, layer: Any) -> list[Tensor]:
    for leaf in (x, *_factors(layer)):
        leaf.grad = None
    y.square().sum().backward()
    return [leaf.grad.clone() for leaf in (x, *_factors(layer)) if leaf.grad is not None]


def test_an_ensemble_is_the_mean_of_the_logits_of_its_masks() -> None:
    model = adapted("lora_dropout", p=0.3, ensemble=3)
    found, layers = logits(model), list(tuner_layers(model).values())
    assert torch.equal(logits(model), found), "its masks are fixed"
    alone = []
    for number in range(3):
        dense = copy.deepcopy(llama())
        for place, layer in tuner_layers(model).items():
            masks, (a, b) = layer.lora_masks["default"], _factors(layer)
            one = Masks(masks.p, masks.seed, Sample())
            one.sample.number = number
            diagonals = one.draw(False, (a, b))
            assert diagonals is not None
            dense.get_submodule(place).weight.data += 4 * (b * diagonals[1][:, None] @ (a * diagonals[0])).detach()
        alone.append(logits(dense))
    assert (alone[0] - alone[1]).abs().max() > 0.05
    torch.testing.assert_close(found, torch.stack(alone).mean(0), rtol=1e-4, atol=1e-4)
    assert layers[0].lora_masks["default"].sample.number is None
    with pytest.raises(ValueError, match="An ensemble of masks cannot write text"):
        model.generate(input_ids=IDS, max_new_tokens=2)
    section = AdapterSection(method="lora_dropout", peft={"ensemble": 3})
    assert "cannot be merged" in str(unmerged(section)) and unmerged(AdapterSection(method="lora_dropout")) is None


@pytest.mark.parametrize("momentum", [0.0, 0.25])
def test_an_unloading_changes_no_output_and_begins_anew(momentum: float) -> None:
    one = Training("periodic_lora", momentum=momentum)
    one.train(range(4))
    layer = next(iter(tuner_layers(one.model).values()))
    before = [factor.detach().clone() for factor in _factors(layer)]
    outputs: list[Tensor] = []
    one.method.step = _noting(one, outputs, one.method.step)  # type: ignore[method-assign]
    one.train(range(4, 5))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)
    a, b = _factors(layer)
    past = layer.lora_past["default"]
    assert past.down.shape == (4, layer.in_features) and past.up.shape == (layer.out_features, 4)
    assert torch.equal(a, past.down) == bool(momentum) and not torch.equal(before[1], b)
    torch.testing.assert_close(b * (1 - momentum), past.up * momentum)
    moments = {key: value for key, value in one.adam.gather(one.items) if not key.startswith("master/")}
    assert moments and all((value == 0).all() for value in moments.values())
    assert {float(state["step"]) for state in one.adam.optimizer.state.values()} == {0.0}
    one.train(range(5, 20))
    assert len(past.down) == 12, "three periods of five steps; none is unloaded behind the last step"


def _noting(one: Training, outputs: list[Tensor], step: Any) -> Any:
    def noted(skipped: bool) -> None:
        outputs.append(logits(one.model))
        step(skipped)
        outputs.append(logits(one.model))

    return noted


def test_lors_shares_by_name_and_shape_and_saves_it_once() -> None:
    model = adapted("lors", shared_rank=6)
    layers = tuner_layers(model)
    shared = {name.rpartition(".")[2]: layer.lora_shared["default"] for name, layer in layers.items()}
    assert len(layers) == 4 and shared["q_proj"] is not shared["down_proj"]
    assert all(layer.lora_shared["default"] is shared[name.rpartition(".")[2]] for name, layer in layers.items())
    saved = get_peft_model_state_dict(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(t.numel() for t in saved.values()) == sum(p.numel() for p in trained)
    sides = {name: layer.in_features + layer.out_features for name, layer in layers.items()}
    assert sum(p.numel() for p in trained) == 4 * sum(sides.values()) + 6 * sum(sides.values()) // 2
    assert sum("lora_shared" in name for name in saved) == 4


@pytest.mark.parametrize(
    ("name", "peft", "message"),
    [
        ("lora_dropout", {"p": 1.0}, "p is 1.0; expected a probability"),
        ("lora_dropout", {"ensemble": -1}, "ensemble is -1; expected a number of masks"),
        ("lora_dropout", {"use_dora": True}, "use_dora makes LoRA another method"),
        ("periodic_lora", {"period": 0}, "period is 0; expected the steps"),
        ("periodic_lora", {"momentum": 1.0}, "momentum is 1.0; expected a share"),
        ("lors", {"shared_rank": -2}, "shared_rank is -2; expected a rank"),
        ("lors", {"lora_bias": True}, "lora_bias makes LoRA another method"),
    ],
)
def test_wrong_arguments(name: str, peft: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapted(name, **peft)


def test_only_linears_are_adapted() -> None:
    section = AdapterSection(method="lors", targets=["embed_tokens"])
    with pytest.raises(UserError, match="is a Embedding, and only linears are adapted"):
        inject(llama(), section, seed=0, steps=20)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.up and not method.places])
def test_the_larger_rate_of_loraplus_is_of_the_factors_that_end_in_the_outputs(name: str) -> None:
    """By shape: of all trained tensors with a side of the rank, those with one of the outputs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    inputs, outputs = 64, 160
    sizes = {"hidden_size": inputs, "intermediate_size": outputs, "num_hidden_layers": 2, "num_attention_heads": 2}
    peft: dict[str, Any] | None = {"decompose_both": True} if name == "lokr" else None
    section = AdapterSection(method=name, rank=2, targets=["up_proj"], peft=peft)
    model = inject(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)), section, seed=0, steps=20)
    ups = {item.name for item in trainables(model, section, 8.0) if item.lr_factor == 8.0}
    sides = {p: tuple(p.shape) for p in model.parameters() if p.requires_grad}
    of_outputs = {outputs, outputs // 2} | ({16, 10} if name == "lokr" else set())
    of_rank = {1, 2, 3, 4}  # AdaLoRA begins with 1.5 r, GraLoRA has blocks of a half, Lily 2 B in one
    derived = {
        key for key, p in model.named_parameters()
        if len(sides.get(p, ())) > 1 and of_rank & set(sides[p]) and of_outputs & set(sides[p])
        and "peanut_A" not in key  # reads the outputs of W
    }  # fmt: skip
    assert ups == derived and ups


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.up and method.places])
def test_the_larger_rate_of_loraplus_is_of_up_projections(name: str) -> None:
    """By shape, too: (width, r); Compacter's are factors of Kronecker products."""
    family = "llama" if "text" in METHODS[name].kinds else "vit"
    section = AdapterSection(method=name, rank=8)
    model = inject(tiny_model(family), section, seed=0, steps=20)
    items = trainables(model, section, 8.0)
    ups = {tuple(item.parameter.shape) for item in items if item.lr_factor == 8.0}
    assert ups == {"compacter": {(4, 2, 1), (4, 1, 8)}, "repadapter": {(32, 4)}}.get(name, {(32, 8)})
    others = {tuple(item.parameter.shape) for item in items if item.lr_factor == 1.0}
    assert others and not ups & others


def test_methods_without_two_factors_have_no_loraplus() -> None:
    section = AdapterSection(method="ia3", targets=["q_proj"])
    model = inject(llama(), section, seed=0, steps=20)
    with pytest.raises(UserError, match=r"adapter.method ia3 has none.*take one of glora, lora, rslora, dora, adalora"):
        trainables(model, section, 4.0)
    assert all(item.lr_factor == 1.0 for item in trainables(model, section, 1.0))


def test_a_layer_without_factors_has_no_loraplus() -> None:
    section = AdapterSection(method="lokr", rank=8, targets=["q_proj"])  # small enough for whole matrices
    model = inject(llama(), section, seed=0, steps=20)
    assert isinstance(model, nn.Module)
    with pytest.raises(UserError, match=r"no layer of this model has a second factor with adapter.method lokr"):
        trainables(model, section, 4.0)
