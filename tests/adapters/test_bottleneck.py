"""Bottleneck adapters compute what their papers write, on every family; saved, loaded and taken away by PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import gelu, relu

from glora_llm.adapters.bottleneck import BottleneckConfig
from glora_llm.adapters.inject import inject
from glora_llm.adapters.methods import METHODS
from glora_llm.adapters.projections import KroneckerProjection
from glora_llm.errors import AdapterError
from glora_llm.schema import AdapterSection
from tests.adapters.module_models import FAMILIES, batch, tiny_model

PRESETS = [name for name, method in METHODS.items() if method.tuner == "bottleneck"]
ROOT = "base_model.model."
# by family, in a block: attention, the first and the last module of the feed-forward network
PARTS = {
    **dict.fromkeys(["llama", "gemma"], ("self_attn", "mlp", "mlp")),
    "gpt2": ("attn", "mlp", "mlp"),
    "opt": ("self_attn", "fc1", "fc2"),
    "bert": ("attention.output.dense", "intermediate", "output.dense"),
    **dict.fromkeys(["vit", "neox"], ("attention", "mlp", "mlp")),
}
LAYERS = {
    **dict.fromkeys(["llama", "gemma"], "model.layers"),
    **{"gpt2": "transformer.h", "opt": "model.decoder.layers", "neox": "gpt_neox.layers"},
    **{"bert": "bert.encoder.layer", "vit": "vit.layers"},
}


def adapted(family: str, method: str, moved: bool = True, **peft: Any) -> Any:
    torch.manual_seed(0)
    section = AdapterSection(method=method, rank=8, peft=peft or None)
    model = inject(tiny_model(family), section, seed=0, steps=1).double().eval()
    for name, parameter in model.named_parameters():
        if "bottleneck_" in name and moved:
            nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def logits(model: Any, family: str) -> Tensor:
    found: Tensor = model(**batch(family)).logits
    return found


def naive(method: str, weights: dict[str, Tensor], place: str) -> Any:
    """Return A of one place as the papers write it."""

    def matrix(side: str) -> Tensor:
        found = {name.removeprefix(f"{place}.bottleneck_{side}."): t for name, t in weights.items() if place in name}
        if method != "compacter":
            return found["weight"]
        rule = next(tensor for name, tensor in weights.items() if "bottleneck_rule" in name)
        products = [torch.kron(rule[i], found["left"][i] @ found["right"][i]) for i in range(len(rule))]
        return torch.stack(products).sum(0).T

    def change(h: Tensor) -> Tensor:
        down, up = weights[f"{place}.bottleneck_down.bias"], weights[f"{place}.bottleneck_up.bias"]
        narrow = h @ matrix("down").T + down
        narrow = relu(narrow) if METHODS[method].arguments["activation"] == "relu" else gelu(narrow, approximate="tanh")
        return METHODS[method].arguments.get("scale", 1.0) * (narrow @ matrix("up").T + up)

    return change


def by_hooks(family: str, method: str, weights: dict[str, Tensor]) -> nn.Module:
    """Return a base with the formula hooked to its sublayers."""
    base = tiny_model(family)
    given: dict[str, Tensor] = {}

    def behind(place: str) -> Any:
        def hook(_: nn.Module, args: Any, out: Any) -> Any:
            y = out[0] if isinstance(out, tuple) else out
            y = y + naive(method, weights, place)(y)
            return (y, *out[1:]) if isinstance(out, tuple) else y

        return hook

    def beside(place: str) -> tuple[Any, Any]:
        def look(_: nn.Module, args: Any) -> None:
            given[place] = args[0]

        return look, lambda _, args, y: y + naive(method, weights, place)(given[place])

    for number in range(2):
        block = base.get_submodule(f"{LAYERS[family]}.{number}")
        attention, first, last = PARTS[family]
        name = f"{ROOT}{LAYERS[family]}.{number}"
        if METHODS[method].arguments.get("parallel"):
            look, add = beside(f"{name}.{last}")
            block.get_submodule(first).register_forward_pre_hook(look)
            block.get_submodule(last).register_forward_hook(add)
            continue
        block.get_submodule(last).register_forward_hook(behind(f"{name}.{last}"))
        if METHODS[method].arguments["places"] == "both":
            block.get_submodule(attention).register_forward_hook(behind(f"{name}.{attention}"))
    return base


@pytest.mark.parametrize(
    ("family", "method"),
    [(family, method) for family in FAMILIES for method in ("houlsby", "adaptformer")]
    + [("llama", method) for method in PRESETS if method not in ("houlsby", "adaptformer")],
)
def test_it_is_the_papers_formula(family: str, method: str, tmp_path: Path) -> None:
    model = adapted(family, method)
    model.save_pretrained(str(tmp_path))
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "adapter_model.safetensors")
    places = 4 if METHODS[method].arguments.get("places") == "both" else 2
    assert sum("bottleneck_up.bias" in name for name in weights) == places
    found = logits(model, family)
    torch.testing.assert_close(found, logits(by_hooks(family, method, weights), family), rtol=1e-10, atol=1e-10)
    plain = tiny_model(family)
    assert (found - logits(plain, family)).abs().max() > 1e-3
    loaded = PeftModel.from_pretrained(tiny_model(family), str(tmp_path)).double().eval()
    torch.testing.assert_close(logits(loaded, family), found, rtol=1e-6, atol=1e-6)
    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded, family), logits(plain, family), rtol=0, atol=0)
    with pytest.raises(AdapterError, match="nonlinearity"):
        loaded.merge_and_unload()
    torch.testing.assert_close(logits(loaded.unload(), family), logits(plain, family), rtol=0, atol=0)
    assert not any(module._forward_pre_hooks for module in loaded.modules())


@pytest.mark.parametrize("method", PRESETS)
@pytest.mark.parametrize("family", ["llama", "vit"])
def test_it_begins_as_the_base_and_learns(family: str, method: str) -> None:
    model = adapted(family, method, moved=False)
    assert torch.equal(logits(model, family), logits(tiny_model(family), family))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses, given = [], batch(family)
    for _ in range(8):
        loss = model(**given, labels=given.get("input_ids", torch.tensor([0, 1]))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_recomputed_activations_give_the_same_gradients(family: str) -> None:
    def gradients(again: bool) -> list[Tensor]:
        model = adapted(family, "adaptformer").train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if again:
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        given = batch(family)
        labels = given["input_ids"] if family in ("llama", "gpt2") else torch.tensor([0, 1])
        model(**given, labels=labels).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, again = gradients(False), gradients(True)
    assert len(plain) == len(again) >= 8
    torch.testing.assert_close(again, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shared", [True, False])
def test_a_kronecker_projection_is_the_sum_of_products(shared: bool) -> None:
    torch.manual_seed(0)
    projection = KroneckerProjection(12, 8, count=4, rank=2, to_zero=False, shared=shared).double()
    nn.init.normal_(projection.bias)
    x, rule = torch.randn(3, 5, 12).double(), torch.randn(4, 4, 4).double()
    rule = rule if shared else projection.rule
    whole = sum(torch.kron(rule[i], projection.left[i] @ projection.right[i]) for i in range(4))
    torch.testing.assert_close(projection(x, rule if shared else None), x @ whole + projection.bias)


def test_compacter_shares_its_rule_and_can_leave_it() -> None:
    def size(**peft: Any) -> int:
        model = adapted("llama", "compacter", **peft)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    one_place = 2 * (32 + 8) + 8 + 32  # left and right of two projections of 4 x (I/4 + O/4), and the biases
    assert size() == 4**3 + 4 * one_place
    assert size(kronecker_shared=False) == 4 * (one_place + 2 * 4**3)


def test_several_adapters_add_up() -> None:
    model = adapted("bert", "parallel_adapter")
    alone = logits(model, "bert")
    model.add_adapter("second", BottleneckConfig(rank=4, places="both", kronecker=2, init_weights=False))
    assert torch.equal(logits(model, "bert"), alone)
    model.base_model.set_adapter("second")
    second = logits(model.double(), "bert")
    assert (second - alone).abs().max() > 1e-4
    model.delete_adapter("second")
    assert torch.equal(logits(model, "bert"), alone)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"places": "norm"}, "places is 'norm'; expected attention, feed_forward or both"),
        ({"activation": "rellu"}, "activation 'rellu' is unknown. Did you mean 'relu'"),
        ({"rank": 0}, "rank 0"),
        ({"rank": 6, "kronecker": 4}, "kronecker 4 must divide"),
        ({"rank": 6, "kronecker": 3}, "kronecker 3 does not divide 32 inputs"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_wrong_arguments_are_named(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(AdapterError, match=says):
        get_peft_model(tiny_model("llama"), BottleneckConfig(**wrong))
