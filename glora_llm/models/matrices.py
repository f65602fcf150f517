"""Layers whose weight is a matrix (O, I) for an adapter, and the layout in which each kind keeps it.

| layer | stored weight | the matrix | O | I |
|---|---|---|---|---|
| `nn.Linear` | (O, I) | itself | outputs | inputs |
| transformers' `Conv1D` (GPT-2) | (I, O) | transposed | outputs | inputs |
| `nn.Conv1d`, `2d`, `3d` | (O, I_c, k ...) | flattened | output channels | values under the kernel, I_c k ... |
| `nn.Embedding` | (V, d) | itself | tokens V | dimensions d |

I_c is the number of input channels of one group. A row of the matrix of a convolution is in the order of torch's
`unfold`: channel, then the places of the kernel.
"""

import math
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LINEARS = (nn.Linear, Conv1D)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
MATRICES = (*LINEARS, *CONVOLUTIONS, nn.Embedding)


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module computes W x + b of its last dimension: what PEFT's all-linear names."""
    return isinstance(module, LINEARS)


def matrix_shape(layer: Any) -> tuple[int, int]:
    """Return (O, I) of a layer's matrix, by its attributes: a quantised or partitioned weight has another shape."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    if isinstance(layer, CONVOLUTIONS):
        return layer.out_channels, layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    return int(layer.out_features), int(layer.in_features)


def as_matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight in the layout of `layer` as its matrix (O, I): a view."""
    if isinstance(layer, Conv1D):
        return weight.t()
    return weight.flatten(1) if weight.dim() > 2 else weight


def in_layout(layer: nn.Module, matrix: Tensor) -> Tensor:
    """Return a matrix (O, I) in the layout of the weight of `layer`: the inverse of `as_matrix`."""
    if is_transposed(layer):
        return matrix.t()
    if isinstance(layer, CONVOLUTIONS):
        return matrix.reshape(len(matrix), -1, *layer.kernel_size)
    return matrix


def is_transposed(layer: Any) -> bool:
    """Tell whether the files of a model hold the weight of this layer as (I, O): a Conv1D, quantised or not."""
    return isinstance(layer, Conv1D) or getattr(layer, "source_cls", None) is Conv1D


def dense_twin(like: Any, weight: Tensor, bias: Tensor | None, dtype: Any) -> nn.Module:
    """Return a frozen dense layer of the kind of `like` that holds weight (O, I) and bias (O) in `dtype`.

    Args:
        like: a layer of this module's table, or a linear of bitsandbytes (its twin is the layer that it stood for).
        bias: None: the layer has none; an embedding never has.
    """
    made: Any
    if is_transposed(like):
        made = Conv1D(1, 1)
        made.nf, made.nx = weight.shape
    elif isinstance(like, CONVOLUTIONS):
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        keys = {name: getattr(like, name) for name in names}
        kind = next(kind for kind in CONVOLUTIONS if isinstance(like, kind))
        made = kind(**keys, bias=bias is not None, padding_mode=like.padding_mode, device="meta", dtype=dtype)
    elif isinstance(like, nn.Embedding):
        made = nn.Embedding(len(weight), weight.shape[1], padding_idx=like.padding_idx, device="meta", dtype=dtype)
    else:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=dtype)
    made.weight = nn.Parameter(in_layout(like, weight).to(dtype).contiguous(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return made.train(like.training)
