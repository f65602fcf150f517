"""GLoRA on an embedding: the slots act on the rows that are looked up.

Letters: V tokens, d dimensions, r rank, t the token that is looked up.

A lookup is the row t of W0 (V, d), the product of a one-hot row vector with W0. So the matrix is the stored one, with
O = V and I = d, and its new row is row t of W0 + W0 A + B:

    f(t) = W0[t] + W0[t] A + B[t] + 1 e'                 A = A_d A_u, (d, r)(r, d);   B = B_d B_u, (V, r)(r, d)

- A acts on the side of the dimensions: W0 A is the formula as written, for W0 as it is stored. A on the side of the
  tokens, (V, V), would cost 2 r V numbers and a product with all of W0 in every step, and would move the rows of tokens
  that training never showed by the random start of A_u. `hadamard` multiplies row t by (A_d A_u)[t], (V, r)(r, d);
  mode vector is a gain for each token, scalar one gain.
- B shifts rows: B_d starts at zero, so a token that training never shows keeps its row. Mode vector adds b[t] to each
  dimension.
- E, (d), is added to every row: a one-hot input has exactly one, so this is merged into W0 exactly. Scalar likewise.
- C has no meaning: a prompt is a constant added to the input, which is a token's number. D scales a bias, which an
  embedding does not have.

Only looked-up rows are read. Dropout acts on the input of A's factors, the row; B's is a number, which is not dropped.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, embedding

from glora_llm.errors import AdapterError
from glora_llm.glora.block import block_factors
from glora_llm.glora.config import GLoRAConfig
from glora_llm.glora.frozen_weight import dense_weight
from glora_llm.glora.layer import GLoRALinear
from glora_llm.glora.linear import Slots, effective
from glora_llm.glora.path import LayerPath
from glora_llm.schema.slots import BLOCK

NO_MEANING = {
    "C": "adds a constant to a layer's input, and the input of an embedding is the number of a token",
    "D": "scales the frozen bias, and an embedding has none",
}


def glora_rows(tokens: Tensor, rows: Tensor, s: Slots, composition: str, dropped: Tensor) -> Tensor:
    """Compute f(t).

    Args:
        tokens: integers, (...).
        rows: W0 of these tokens, (..., d).
        s: in the dtype of the rows.
        dropped: rows after dropout.

    Returns:
        (..., d).
    """
    y = rows
    if s.a_down is not None and s.a_up is not None:
        if composition == "product":
            y = y + s.a_scale * (dropped @ s.a_down) @ s.a_up
        else:
            y = y + s.a_scale * dropped * (embedding(tokens, s.a_down) @ s.a_up)
    if s.a_down is not None and s.a_blocks is not None:
        factors = block_factors(embedding(tokens, s.a_down), s.a_blocks, s.a_scale)
        y = (rows.unflatten(-1, (-1, BLOCK)) * factors[..., None]).to(rows.dtype).flatten(-2)
    if s.a_gain is not None:
        y = y + _of_tokens(s.a_gain, tokens) * rows
    if s.b_down is not None and s.b_up is not None:
        y = y + s.b_scale * embedding(tokens, s.b_down) @ s.b_up
    if s.b_shift is not None:
        y = y + _of_tokens(s.b_shift, tokens)
    return y if s.e is None else y + s.e


def _of_tokens(values: Tensor, tokens: Tensor) -> Tensor:
    """Return a value for each token, (..., 1), or the one for all."""
    return values if values.numel() == 1 else embedding(tokens, values[:, None])


class GLoRAEmbedding(GLoRALinear):
    """A frozen `nn.Embedding` with GLoRA slots on its rows."""

    merges_into_bias = False

    @property
    def b0(self) -> None:
        """None: an embedding has no bias."""

    def update_layer(self, adapter_name: str, config: GLoRAConfig, path: LayerPath, generator: Any = None) -> None:
        """Allocate the slots of one adapter.

        Raises:
            AdapterError: for a slot that has no meaning here, or a supernet.
        """
        if config.choices:
            raise AdapterError(
                "A supernet is of linears and convolutions, whose layers all have the slots A, B, C and E; this is an "
                "embedding. Leave it out of adapter.targets, or train fixed slots."
            )
        if config.d_without_bias == "none":
            path = path.without("D")
        for slot, reason in NO_MEANING.items():
            if path[slot].mode != "none":
                raise AdapterError(
                    f"Slot {slot} {reason}. An embedding has A, B and E: set {slot} to none, or give it its own slots "
                    "by `paths`."
                )
        super().update_layer(adapter_name, config, path, generator)

    def _slot_shape(self, slot: str) -> tuple[int, int]:
        """Return (O, I) of the slot: E is a row."""
        return (self.in_features if slot == "E" else self.out_features), self.in_features

    @torch.no_grad()
    def merged_weight(self, adapter_names: list[str]) -> tuple[Tensor, None]:
        """Return weight (V, d) with the adapters in it, in float32 (float64 for a float64 base), and None."""
        dtype = torch.promote_types(self._merged_dtype(), torch.float32)
        w0 = dense_weight(self._original(), dtype)
        weight = w0.clone()
        for name in adapter_names:
            own = self.slots(name).to(dtype)
            weight += effective(w0, None, own._replace(e=None), self.composition[name])[0] - w0
            weight += 0 if own.e is None else own.e
        return weight, None

    def _one(self, x: Tensor, adapter_name: str) -> Tensor:
        rows: Tensor = self.base_layer(x)
        rate = self.dropout[adapter_name]
        dropped = dropout(rows, rate) if rate and self.training else rows
        slots = self.slots(adapter_name).to(rows.dtype)
        return glora_rows(x, rows, slots, self.composition[adapter_name], dropped)
