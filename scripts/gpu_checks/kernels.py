"""Check 2: unpacking of quantised weights and the GLoRA functions on the device, against the CPU in float64."""

import copy
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from glora_llm.glora.frozen_weight import dense_weight
from glora_llm.glora.linear import Slots, effective, glora_linear
from glora_llm.models.kernels import apply_liger
from scripts.gpu_checks.context import Context
from scripts.gpu_checks.report import Row, absent, compared

OUT, IN, RANK, TOKENS = 320, 256, 8, 64
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative error of a product and of a gradient
PRODUCTS = {"aten.mm.default", "aten.addmm.default", "aten.bmm.default", "aten.mv.default"}


def check(context: Context) -> Iterator[Row]:
    """Unpack, multiply and differentiate."""
    for quantization in ("nf4", "fp4", "int8"):
        yield _unpacking(context, quantization)
    for dtype in dict.fromkeys((torch.float32, context.dtype)):
        for composition in ("product", "hadamard"):
            yield _glora_function(context, composition, dtype)
    yield _int8_products(context)
    yield _liger(context)


def quantized_linear(quantization: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a seeded random linear (O, I), quantised by bitsandbytes on the device."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    values = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0), device="cpu").to(dtype)
    if quantization == "int8":
        layer: Any = Linear8bitLt(IN, OUT, bias=False, has_fp16_weights=False)
        layer.weight = Int8Params(values, requires_grad=False, has_fp16_weights=False)
    else:
        layer = Linear4bit(IN, OUT, bias=False, compute_dtype=dtype, quant_type=quantization, quant_storage=dtype)
        layer.weight = Params4bit(values, requires_grad=False, quant_type=quantization, quant_storage=dtype)
    return layer.to(device)


def _unpacking(context: Context, quantization: str) -> Row:
    """The device's bytes, moved to the CPU and unpacked there, are the device's own values."""
    layer = quantized_linear(quantization, context.dtype, context.device)
    here = dense_weight(layer, context.dtype).cpu()
    moved = copy.deepcopy(layer).to("cpu")
    there = dense_weight(moved, context.dtype)
    worst = float((here - there).abs().max())
    bound = 0.0 if context.is_rehearsal else 1e-2 * float(there.abs().max())
    return compared(
        f"{quantization} unpacked", f"the CPU's values within {bound:.1e}", f"{worst:.1e} apart", worst <= bound
    )


def _glora_function(context: Context, composition: str, dtype: torch.dtype) -> Row:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") / 4

    first = OUT if composition == "hadamard" else IN
    given: dict[str, Any] = {
        "a_down": draw(first, RANK), "a_up": draw(RANK, IN), "b_down": draw(OUT, RANK), "b_up": draw(RANK, IN),
        "c": draw(IN), "e": draw(OUT),
    }  # fmt: skip
    w0, x, dy = draw(OUT, IN), draw(TOKENS, IN), draw(TOKENS, OUT)
    expected = _by_formula(composition, w0, x, dy, given)
    at: dict[str, Any] = {"device": context.device, "dtype": dtype}
    leaves: dict[str, Any] = {name: value.to(**at).requires_grad_() for name, value in given.items()}
    inputs, weight = x.to(**at).requires_grad_(), w0.to(**at)
    y = glora_linear(inputs, lambda: weight, OUT, None, Slots(**leaves), composition)
    y.backward(dy.to(**at))
    measured = [y.detach(), inputs.grad, *(leaf.grad for leaf in leaves.values())]
    pairs = zip(measured, expected, strict=True)
    worst = max(float((got.cpu().double() - want).norm() / want.norm()) for got, want in pairs if got is not None)
    name = f"GLoRA {composition}, {str(dtype).removeprefix('torch.')}"
    return compared(name, f"within {BOUNDS[dtype]:.0e} of float64", f"{worst:.1e}", worst <= BOUNDS[dtype], error=worst)


def _by_formula(composition: str, w0: Tensor, x: Tensor, dy: Tensor, given: dict[str, Any]) -> list[Tensor]:
    leaves: dict[str, Any] = {name: value.clone().requires_grad_() for name, value in given.items()}
    inputs = x.clone().requires_grad_()
    weight, bias = effective(w0, None, Slots(**leaves), composition)
    y = nn.functional.linear(inputs, weight, bias)
    return [y.detach(), *torch.autograd.grad(y, [inputs, *leaves.values()], dy)]


class _Products(TorchDispatchMode):
    """Notes the dtypes of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(operation) in PRODUCTS:
            self.dtypes |= {item.dtype for item in args if isinstance(item, Tensor)}
        return operation(*args, **(kwargs or {}))


def _int8_products(context: Context) -> Row:
    """An int8 base has no dtype of its own: everything is multiplied in the dtype of x."""
    from glora_llm.glora.config import GLoRAConfig
    from glora_llm.glora.layer import GLoRALinear

    layer = GLoRALinear(quantized_linear("int8", torch.bfloat16, context.device))
    config = GLoRAConfig(rank=RANK, target_modules=["none"])
    layer.update_layer("default", config, config.path_of("none"))
    x = torch.randn(TOKENS, IN, generator=torch.Generator().manual_seed(2), device="cpu")
    with _Products() as products:
        layer(x.to(context.device, torch.bfloat16).requires_grad_()).float().sum().backward()
    found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in products.dtypes))
    return compared("products of an int8 base with bfloat16 inputs", "bfloat16", found, found == "bfloat16")


def _liger(context: Context) -> Row:
    name = "Liger kernels: same logits"
    if context.device.type != "cuda":
        return absent(name, "they need a GPU")
    if find_spec("liger_kernel") is None:
        return absent(name, "liger-kernel is not installed")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(context.device, context.dtype).eval()
    ids = torch.arange(128, device=context.device)[None]
    with torch.no_grad():
        plain = model(ids).logits.float()
        apply_liger(model)
        worst = float((model(ids).logits.float() - plain).abs().max() / plain.abs().max())
    bound = BOUNDS[context.dtype]
    return compared(name, f"within {bound:.0e}", f"{worst:.1e}", worst <= bound)
