"""Count the floating-point operations of a step and the device's peak rate, for the model FLOP utilisation."""

import re
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from glora_llm.training.sharding import element_count

# Dense bfloat16 peak with float32 accumulation in FLOP/s, by words that the device's name must all have; the first row
# that fits counts. From the vendors' data sheets, halved where they count sparsity: NVIDIA B200, GB200, H200, H100,
# GH200, A100, L40S, L40, L4, A40, A30, A10, A10G, AMD MI300X; the GA102, AD102 and GB202 architecture papers (RTX).
BF16_PEAKS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("A40", 150e12),
    ("A30", 165e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("RTX 6000 Ada", 364e12),
    ("RTX A6000", 155e12),
    ("RTX 5090", 209e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
    ("MI300X", 1307e12),
)
PARTS = {"MIG", "Laptop", "Max", "Ti", "D"}  # a part of a GPU, or a smaller one of a like name: measured


@dataclass(frozen=True)
class ModelCost:
    """The sizes of a model from which the cost of a step follows.

    Args:
        frozen: elements of the frozen matrices (embeddings, which are looked up, left out).
        trained: elements of the trained ones, and of the other trained parameters; a VLoRA linear counts as the dense
            one of its shape, which is what it computes.
        head: elements of the output head.
        layers: decoder layers.
        hidden: width of the attention (heads x head size).
        peak_flops: of one device, FLOP/s.
        head_trained: the head learns too.
        causal: half of the attention's products are masked.
    """

    frozen: int
    trained: int
    head: int
    layers: int
    hidden: int
    peak_flops: float
    head_trained: bool = False
    causal: bool = True

    def step_flops(self, tokens: int, targets: int, width: int) -> float:
        """Return the FLOPs of forward and backward over `tokens` tokens in rows of `width`.

        A frozen matrix costs 2 forward and 2 backward a token and element, a trained one 6. The head is computed for
        targets only. Attention's two products cost 4 x width x hidden a layer and token forward (half of it masked in
        a causal model), twice that backward. Recomputation is not counted.
        """
        attention = (0.5 if self.causal else 1.0) * 12 * width * self.hidden * self.layers
        head = targets * (6 if self.head_trained else 4) * self.head
        return tokens * (4 * self.frozen + 6 * self.trained + attention) + head


def measure_cost(
    model: nn.Module, config: object, dtype: torch.dtype, device: torch.device, causal: bool = True
) -> ModelCost:
    """Count the model's parameters (also those of 4-bit and partitioned ones) and find the device's peak."""
    return count_cost(model, config, peak_flops(dtype, device), causal)


def count_cost(model: nn.Module, config: object, peak: float, causal: bool = True) -> ModelCost:
    """Count the model's parameters, also those of 4-bit and partitioned ones; its weights may be on the meta device.

    Args:
        peak: of one device, FLOP/s.
    """
    head: Any = model.get_output_embeddings() or getattr(model, "score", None) or model.classifier  # type: ignore[operator]
    frozen = trained = 0
    for module in model.modules():
        if module is head or isinstance(module, nn.Embedding):
            continue
        own = sum(element_count(p) for p in module.parameters(recurse=False) if p.requires_grad)
        sides = _sides(module)
        if sides is None:
            trained += own
        elif own:
            trained += sides
        else:
            frozen += sides
    # a convolutional network has none of them
    layers, heads = getattr(config, "num_hidden_layers", 0), getattr(config, "num_attention_heads", 0)
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)  # type: ignore[attr-defined]
    learns = any(p.requires_grad for p in head.parameters())
    size_of_head = (
        head.in_features * head.out_features if hasattr(head, "in_features") else 0
    )  # else: of linears, above
    return ModelCost(frozen, trained, size_of_head, layers, heads * size, peak, learns, causal)


def _sides(module: Any) -> int | None:
    """Return O x I of a linear (nf and nx of transformers' Conv1D), None of other modules."""
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    return module.nf * module.nx if type(module).__name__ == "Conv1D" else None


def peak_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Return the FLOP/s that the device reaches at most: by data sheet, or by a matrix product measured here."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        known = bf16_peak(name)
        if known is not None:
            return known
    n = 4096 if device.type == "cuda" else 1024
    a = torch.ones(n, n, dtype=dtype, device=device)
    best = 0.0
    for _ in range(4):
        began = time.perf_counter()
        float((a @ a)[0, 0])
        best = max(best, 2 * n**3 / (time.perf_counter() - began))
    return best


def bf16_peak(name: str) -> float | None:
    """Return the dense bfloat16 peak of a GPU in FLOP/s by its name, or None where it has to be measured."""
    words = set(re.findall(r"[A-Za-z0-9]+", name))
    if words & PARTS:
        return None
    return next((peak for known, peak in BF16_PEAKS if set(known.split()) <= words), None)
