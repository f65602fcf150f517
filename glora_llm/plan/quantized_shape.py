"""Sizes of a weight as bitsandbytes stores it, without its values."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from glora_llm.models.matrices import matrix_shape

BLOCK = 64  # values of a 4-bit weight with one scale
SCALE_BLOCK = 256  # scales with one scale of their own (double quantisation)
CODES, SCALE_CODES = 16, 256  # values that 4 bits, and the 8 bits of a quantised scale, stand for
FLOAT32 = 4  # bytes of an element


class QuantizedShape:
    """One weight (O, I) in 4 or 8 bits.

    bitsandbytes' own `Params4bit` quantises real values when it is made, and holds no tensor without storage. This
    stands for it while memory is computed: it makes a plain parameter with the `quant_state` that its readers look for.

    Args:
        linear: the dense layer, on any device.
        quantization: `nf4`, `fp4` or `int8`.
        dtype: to which the values are unpacked; 4-bit ones are also stored as elements of it, so that ZeRO 3 divides
            them like any other parameter.
        double: the scales of 4-bit blocks are quantised too.
    """

    def __init__(self, linear: nn.Module, quantization: str, dtype: torch.dtype, double: bool):
        self.shape = torch.Size(matrix_shape(linear))
        self.int8, self.dtype, self.double = quantization == "int8", dtype, double

    @property
    def stored(self) -> int:
        """The size of the packed values, in elements of `dtype`."""
        return self.shape.numel() // (1 if self.int8 else 2) // self.dtype.itemsize

    @property
    def state_bytes(self) -> int:
        """Bytes of scales and codes, which every process holds whole."""
        if self.int8:
            return FLOAT32 * self.shape[0]
        scales = math.ceil(self.shape.numel() / BLOCK)
        if not self.double:
            return FLOAT32 * (scales + CODES)
        return scales + FLOAT32 * (math.ceil(scales / SCALE_BLOCK) + SCALE_CODES + CODES + 1)

    def empty_linear(self, bias: nn.Parameter | None) -> Any:
        """Return a `Linear4bit` of this shape on the meta device, with the dense layer's bias.

        Also for int8: a step unpacks both to the same dense matrix, and keeps nothing else of them.
        """
        from bitsandbytes.nn import Linear4bit

        out_features, in_features = self.shape
        made: Any = Linear4bit(
            in_features, out_features, bias=False, compute_dtype=self.dtype, quant_storage=self.dtype, device="meta"
        )
        packed = torch.empty(self.shape.numel() // 2 // self.dtype.itemsize, 1, dtype=self.dtype, device="meta")
        made.weight, made.bias = nn.Parameter(packed, requires_grad=False), bias
        made.weight.quant_state = self._quant_state()
        made.weight.compress_statistics, made.weight.quant_type = self.double, "nf4"  # PEFT reads these two
        return made

    def _quant_state(self) -> Any:
        from bitsandbytes.functional import QuantState

        def empty(elements: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(elements, dtype=dtype, device="meta")

        scales = math.ceil(self.shape.numel() / BLOCK)
        common: dict[str, Any] = {"shape": self.shape, "blocksize": BLOCK, "quant_type": "nf4", "dtype": self.dtype}
        if not self.double:
            return QuantState(absmax=empty(scales), code=empty(CODES), **common)
        sizes = {"absmax": empty(math.ceil(scales / SCALE_BLOCK)), "code": empty(SCALE_CODES)}
        second = QuantState(**sizes, blocksize=SCALE_BLOCK, dtype=torch.float32)
        return QuantState(
            absmax=empty(scales, torch.uint8), code=empty(CODES), offset=empty(1)[0], state2=second, **common
        )
