"""SSF: the formula, written naively by hooks; where it goes; and an exact merge."""

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm

from glora_llm.adapters.ssf import SSFConfig, SSFLayer, adds_one
from glora_llm.errors import AdapterError
from tests.adapters.module_models import FAMILIES, batch, perturb, require_learning, tiny_model


def adapted(family: str, **settings: Any) -> tuple[Any, Any]:
    base = tiny_model(family)
    model = get_peft_model(base, SSFConfig(**settings), autocast_adapter_dtype=False)
    perturb(model)
    return base, model.eval()


def by_hooks(family: str, model: Any) -> Any:
    """Return a fresh base whose modules' outputs are scaled and shifted by hand."""
    fresh, held = tiny_model(family), dict(model.get_base_model().named_modules())

    def behind(scale: Tensor, shift: Tensor | None) -> Any:
        def hook(module: nn.Module, _: Any, y: Tensor) -> Tensor:
            where = [1, -1, 1, 1] if isinstance(module, nn.Conv2d) else [-1]
            return y * scale.reshape(where) + (0 if shift is None else shift.reshape(where))

        return hook

    for name, module in fresh.named_modules():
        layer: Any = held.get(name)
        if isinstance(layer, SSFLayer):
            shift = layer.ssf_shift.get("default")
            module.register_forward_hook(behind(layer.ssf_scale["default"], shift))
    return fresh


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_formula_and_merge(family: str) -> None:
    base, model = adapted(family)
    plain = tiny_model(family)(**batch(family)).logits
    logits = model(**batch(family)).logits
    torch.testing.assert_close(logits, by_hooks(family, model)(**batch(family)).logits, rtol=1e-12, atol=1e-12)
    assert (logits - plain).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(**batch(family)).logits, plain)
    model.merge_adapter(safe_merge=True)
    near = 1e-5 if family == "gemma" else 1e-9  # Gemma's norms multiply by their weight in float32
    torch.testing.assert_close(model(**batch(family)).logits, logits, rtol=near, atol=near)
    model.unmerge_adapter()
    assert torch.equal(model(**batch(family)).logits, logits)
    merged = model.merge_and_unload()
    assert type(merged) is type(base) and not any(isinstance(m, SSFLayer) for m in merged.modules())
    torch.testing.assert_close(merged(**batch(family)).logits, logits, rtol=near, atol=near)


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_it_learns_as_the_formula(family: str) -> None:
    model = get_peft_model(tiny_model(family), SSFConfig(), autocast_adapter_dtype=False).double()
    require_learning(model, lambda: by_hooks(family, model), family)


@pytest.mark.parametrize(
    ("base", "shape"),
    [
        (nn.Conv1d(3, 4, 2, bias=False), (2, 3, 6)),
        (nn.Conv3d(3, 4, 2), (2, 3, 4, 4, 4)),
        (nn.BatchNorm1d(4), (2, 4, 6)),
        (nn.BatchNorm1d(4), (2, 4)),
        (nn.GroupNorm(2, 4), (2, 4, 3, 3)),
        (ConvNextLayerNorm(4, data_format="channels_first"), (2, 4, 3, 4)),
        (nn.LayerNorm(4), (2, 3, 4)),
    ],
    ids=str,
)
@torch.no_grad()
def test_channels_are_where_the_layer_has_them(base: Any, shape: tuple[int, ...]) -> None:
    """As what the layer computes with the merged values."""
    layer: Any = SSFLayer(base.double().eval().requires_grad_(False))
    layer.update_layer("default", SSFConfig(init_std=0.5))
    layer.double().set_adapter("default")
    x = torch.randn(shape, dtype=torch.float64)
    adapted = layer(x)
    assert (adapted - base(x)).abs().max() > 0.05
    layer.merge()
    torch.testing.assert_close(layer(x), adapted, rtol=1e-10, atol=1e-10)


def test_places_of_the_paper() -> None:
    """A ViT: patch embedding, norms and linears have scale and shift, the head has none."""
    _, model = adapted("vit")
    named = {name: layer for name, layer in model.get_base_model().named_modules() if isinstance(layer, SSFLayer)}
    kinds = {name.rpartition(".")[2] for name in named}
    assert kinds == {
        *("projection", "layernorm_before", "layernorm_after", "layernorm"),
        *("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
    }
    assert all(len(layer.ssf_shift) for layer in named.values())
    width = 32
    per_block = 2 * width + 4 * width + (64 + width)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (2 * per_block + 2 * width)


def test_without_bias() -> None:
    """A LLaMA: a norm has a scale alone, a linear a shift too, unless told otherwise."""
    _, model = adapted("llama")
    layers = {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, SSFLayer)}
    assert {name.rpartition(".")[2] for name, layer in layers.items() if not layer.ssf_shift} == {
        *("input_layernorm", "post_attention_layernorm", "norm"),
    }
    assert layers["model.layers.0.mlp.up_proj"].added_biases() == [""]
    _, model = adapted("llama", shift_without_bias=False)
    layers = {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, SSFLayer)}
    assert not any(layer.ssf_shift or layer.added_biases() for layer in layers.values())
    merged = model.merge_and_unload()
    assert not any(getattr(m, "bias", None) is not None for m in merged.modules() if isinstance(m, nn.Linear))


def test_gemma_multiplies_by_one_plus_weight() -> None:
    assert adds_one(tiny_model("gemma").model.norm)
    assert not adds_one(tiny_model("llama").model.norm)


@torch.no_grad()
def test_two_adapters_save_load_and_delete(tmp_path: Any) -> None:
    _, model = adapted("vit")
    one = model(**batch("vit")).logits
    model.save_pretrained(tmp_path)
    torch.manual_seed(9)
    model.add_adapter("second", SSFConfig(init_std=0.3))
    model.base_model.set_adapter(["default", "second"])
    both = model(**batch("vit")).logits
    assert (both - one).abs().max() > 1e-3
    model.merge_adapter()
    torch.testing.assert_close(model(**batch("vit")).logits, both, rtol=1e-9, atol=1e-9)
    model.unmerge_adapter()
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(model(**batch("vit")).logits, one)
    again = PeftModel.from_pretrained(tiny_model("vit"), tmp_path, autocast_adapter_dtype=False).eval()
    assert torch.equal(again(**batch("vit")).logits, one)


def test_init_std_zero_changes_nothing() -> None:
    model = get_peft_model(tiny_model("bert"), SSFConfig(init_std=0.0), autocast_adapter_dtype=False)
    assert torch.equal(model(**batch("bert")).logits, tiny_model("bert")(**batch("bert")).logits)


def test_wrong_arguments() -> None:
    with pytest.raises(AdapterError, match=r"init_std is -1; expected a standard deviation"):
        SSFConfig(init_std=-1)
    with pytest.raises(AdapterError, match=r"wte: SSF scales the output of linears, .* this is of class Embedding"):
        get_peft_model(tiny_model("gpt2"), SSFConfig(target_modules=["wte"]))
