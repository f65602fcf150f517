import logging
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from glora_llm.errors import UserError
from glora_llm.models.load import compile_layers, compute_dtype, linear_names, load_base, meta_model
from glora_llm.models.resolve import ResolvedModel
from glora_llm.schema import ModelSection

CPU = torch.device("cpu")
IDS = torch.tensor([[1, 40, 41, 42, 43, 44, 45, 3], [1, 90, 91, 92, 93, 94, 95, 3]])
KINDS = {"none": nn.Linear, "nf4": bnb.nn.Linear4bit, "fp4": bnb.nn.Linear4bit, "int8": bnb.nn.Linear8bitLt}
Section = Callable[..., ModelSection]


def dense_weight(layer: nn.Linear) -> torch.Tensor:
    """W0 (O, I) as bitsandbytes itself dequantises it."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return bnb.functional.int8_vectorwise_dequant(layer.weight.data, scales)
    return layer.weight.data


def dense_twin(model: PreTrainedModel, tiny: ResolvedModel) -> PreTrainedModel:
    """The same model with plain linears that hold the dequantised weights."""
    twin = load_base(ModelSection(name_or_path="x"), tiny.folder, CPU)
    for name in linear_names(model):
        twin.get_submodule(name).weight.data = dense_weight(model.get_submodule(name))
    return twin


def stored_bytes(model: PreTrainedModel) -> dict[str, bytes]:
    """Parameters as bytes: packed 4-bit blocks in a float dtype hold NaN patterns, which equal nothing."""
    return {name: value.detach().view(torch.uint8).numpy().tobytes() for name, value in model.named_parameters()}


@pytest.mark.parametrize("quantization", KINDS)
def test_loads_frozen_on_the_cpu(quantization: str, tiny: ResolvedModel, section: Section) -> None:
    model = load_base(section(quantization=quantization), tiny.folder, CPU)
    names = linear_names(model)
    assert len(names) == 2 * 7 and "lm_head" not in names
    assert {type(model.get_submodule(name)) for name in names} == {KINDS[quantization]}
    assert type(model.lm_head) is nn.Linear and type(model.model.embed_tokens) is nn.Embedding
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training and model.config.use_cache is False
    with torch.no_grad():
        logits = model(IDS).logits
    assert logits.shape == (2, 8, 260) and torch.isfinite(logits).all() and logits.std() > 0.1


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("double", [True, False])
def test_quantised_weights_are_bitsandbytes_own(
    quantization: str, double: bool, tiny: ResolvedModel, section: Section
) -> None:
    keys = section(quantization=quantization, double_quantization=double)
    model = load_base(keys, tiny.folder, CPU)
    weights = load_file(tiny.folder / "model.safetensors")
    for name in linear_names(model):
        original = weights[f"{name}.weight"]
        if quantization == "int8":
            stored, scales, _ = bnb.functional.int8_vectorwise_quant(original.half())
            expected = bnb.functional.int8_vectorwise_dequant(stored, scales)
        else:
            blocks, state = bnb.functional.quantize_4bit(
                original, quant_type=quantization, compress_statistics=double, blocksize=64
            )
            expected = bnb.functional.dequantize_4bit(blocks, state)
        assert torch.equal(dense_weight(model.get_submodule(name)), expected)
        assert (expected - original).abs().mean() < 0.2 * original.abs().mean()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_4bit_is_stored_in_the_compute_dtype(dtype: str, tiny: ResolvedModel, section: Section) -> None:
    model = load_base(section(quantization="nf4", dtype=dtype), tiny.folder, CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert model.get_submodule(linear_names(model)[0]).compute_dtype == getattr(torch, dtype)


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_an_evaluation_changes_neither_weights_nor_gradients(
    quantization: str, tiny: ResolvedModel, section: Section
) -> None:
    model = load_base(section(quantization=quantization), tiny.folder, CPU)
    before = stored_bytes(model)
    with torch.no_grad():
        evaluated = model(IDS).logits
    assert stored_bytes(model) == before
    twin = dense_twin(model, tiny)
    torch.testing.assert_close(evaluated, twin(IDS).logits, rtol=1e-4, atol=1e-5)

    gradients = []
    for candidate in (model.train(), twin.train()):
        embedded = candidate.model.embed_tokens(IDS).requires_grad_()
        candidate(inputs_embeds=embedded).logits.square().mean().backward()
        gradients.append(embedded.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-7)


def test_the_switch_that_stops_repacking_is_still_there(tiny: ResolvedModel, section: Section) -> None:
    model = load_base(section(quantization="nf4"), tiny.folder, CPU)
    assert {model.get_submodule(name).support_avx512bf16_for_cpu for name in linear_names(model)} == {False}


def test_int8_says_nothing_at_every_layer(
    tiny: ResolvedModel, section: Section, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_base(section(quantization="int8"), tiny.folder, CPU)
    with caplog.at_level(logging.WARNING):
        model(IDS)
    assert not [record for record in caplog.records if "MatMul8bitLt" in record.getMessage()]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_checkpointing_gives_the_same_gradient(quantization: str, tiny: ResolvedModel, section: Section) -> None:
    gradients = []
    for checkpointing in (False, True):
        keys = section(quantization=quantization, gradient_checkpointing=checkpointing)
        model = load_base(keys, tiny.folder, CPU).train()
        assert model.is_activation_checkpointing is checkpointing
        bias = nn.Parameter(torch.zeros(128))  # trainable inside, while the embeddings need no gradient
        layer = model.model.layers[0].mlp.up_proj
        layer.register_forward_hook(lambda module, rows, out, bias=bias: out + bias)
        model(IDS).logits.square().mean().backward()
        assert bias.grad is not None
        gradients.append(bias.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


def test_meta_model_is_the_real_one_without_weights(tiny: ResolvedModel, section: Section) -> None:
    real = load_base(section(), tiny.folder, CPU)
    meta = meta_model(section(quantization="nf4"), tiny.folder)
    shapes = [{name: value.shape for name, value in model.named_parameters()} for model in (real, meta)]
    assert shapes[0] == shapes[1] and linear_names(real) == linear_names(meta)
    assert {value.device.type for value in meta.parameters()} == {"meta"}
    assert not any(value.requires_grad for value in meta.parameters())


def test_dtype_rule(section: Section, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    assert compute_dtype(section(), CPU) == torch.float32
    assert compute_dtype(section(dtype="float16"), CPU) == torch.float16
    for has_it, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has_it=has_it, **_: has_it)
        assert compute_dtype(section(), cuda) == expected


@pytest.mark.parametrize("attention", ["eager", "sdpa", "auto"])
def test_attention_backends_agree(attention: str, tiny: ResolvedModel, section: Section) -> None:
    model = load_base(section(attention=attention), tiny.folder, CPU)
    reference = load_base(section(attention="eager"), tiny.folder, CPU)
    assert model.config._attn_implementation == ("segments" if attention == "auto" else attention)
    torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "device", "message"),
    [
        ({"attention": "flash_attention_2"}, "cpu", "flash_attention_2, which needs a GPU"),
        ({"attention": "flash_attention_2", "dtype": "bfloat16"}, "cuda", "flash-attn is not installed"),
        ({"kernels": "liger"}, "cpu", "its kernels need a GPU"),
    ],
)
def test_impossible_requests(
    keys: dict[str, Any],
    device: str,
    message: str,
    tiny: ResolvedModel,
    section: Section,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("glora_llm.models.attention.find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        load_base(section(**keys), tiny.folder, torch.device(device))


def test_no_bitsandbytes(tiny: ResolvedModel, section: Section, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glora_llm.models.load.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        load_base(section(quantization="nf4"), tiny.folder, CPU)


def test_a_missing_tensor_is_not_made_up(tiny_copy: Any, section: Section) -> None:
    weights = load_file(tiny_copy / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tiny_copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors .* lm_head\.weight"):
        load_base(section(), tiny_copy, CPU)


def test_compile_layers_compiles_each_decoder_layer(tiny: ResolvedModel, section: Section) -> None:
    model = load_base(section(compile=True), tiny.folder, CPU)
    assert not any(module._compiled_call_impl for module in model.modules())  # scoring and merging run as they are
    compile_layers(model)
    compiled = [name for name, module in model.named_modules() if module._compiled_call_impl]
    assert compiled == ["model.layers.0", "model.layers.1"]


def test_compile_leaves_fused_kernels_to_the_compiler(
    tiny: ResolvedModel, section: Section, monkeypatch: pytest.MonkeyPatch
) -> None:
    applied: list[PreTrainedModel] = []
    monkeypatch.setattr("glora_llm.models.load.uses_liger", lambda *_: True)
    monkeypatch.setattr("glora_llm.models.load.apply_liger", applied.append)
    for compiled in (True, False):
        load_base(section(compile=compiled), tiny.folder, CPU)
        assert bool(applied) is not compiled
