"""AdaLoRA (arXiv 2303.10512): an orthogonality penalty, and a budget of ranks that is divided anew after each step.

PEFT computes both. This calls them at the right place of the training loop, and keeps the state of PEFT's allocator.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from glora_llm.errors import UserError
from glora_llm.glora.path import PEFT_ROOT
from glora_llm.schema import AdapterSection

ALLOCATOR_TENSORS = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # importance of each factor, its mean and its uncertainty

FACTORS = ("lora_A", "lora_B", "lora_E")


class AdaLoRA:
    """The budget of one AdaLoRA model, a `StatefulMethod`.

    Args:
        model: a PeftModel whose tuner is AdaLoRA.
    """

    name: ClassVar[str] = "adalora"
    needs_whole_gradients: ClassVar[bool] = True

    def __init__(self, model: Any) -> None:
        self.tuner = model.base_model
        self.config = model.peft_config[self.tuner.trainable_adapter_name]
        self.steps_done = 0

    @staticmethod
    def config_arguments(section: AdapterSection, steps: int) -> dict[str, Any]:
        """Return the budget: from 1.5 r down to r on average, between a tenth and four fifths of the steps."""
        return {
            "target_r": section.rank,
            "init_r": round(1.5 * section.rank),
            "total_step": steps,
            "tinit": steps // 10,
            "tfinal": steps // 5,
            "deltaT": max(1, steps // 100),
        }

    def penalty(self) -> Tensor:
        """Return the weighted mean of |A A' - 1| and |B' B - 1| (Frobenius) over all factors, a scalar."""
        parts = []
        for layer in self.tuner.modules():
            if isinstance(getattr(layer, "lora_A", None), nn.ParameterDict):
                parts += [_distance_to_identity(a @ a.T) for a in layer.lora_A.values()]
                parts += [_distance_to_identity(b.T @ b) for b in layer.lora_B.values()]
        return float(self.config.orth_reg_weight) * torch.stack(parts).mean()

    def step(self) -> None:
        """Give the ranks to the layers that use them; nothing after a step that was skipped as not finite."""
        self.steps_done += 1
        if any(p.requires_grad and p.grad is None for p in self.tuner.parameters()):
            return
        self.tuner.update_and_allocate(self.steps_done)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the allocator's tensors as `KIND/PARAMETER`, the steps done and the ranks of each layer."""
        allocator = self.tuner.rankallocator
        tensors = {f"{kind}/{name}": t for kind in ALLOCATOR_TENSORS for name, t in getattr(allocator, kind).items()}
        return tensors, {"step": self.steps_done, "rank_pattern": self.config.rank_pattern or {}}

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Set the allocator to what `state_dict` returned."""
        for name, tensor in tensors.items():
            kind, _, parameter = name.partition("/")
            getattr(self.tuner.rankallocator, kind)[parameter] = tensor
        self.steps_done, self.config.rank_pattern = values["step"], values["rank_pattern"] or None


def freeze_rank_numbers(model: nn.Module) -> None:
    """Freeze what the scale is divided by, which PEFT lets go of on a model without weights."""
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)


def kept_ranks(rank_pattern: Mapping[str, list[bool]]) -> dict[str, list[bool]]:
    """Return which ranks each factor of a saved adapter still has, by the name that it is saved under.

    Args:
        rank_pattern: of the saved PEFT configuration: `LAYER.lora_E` -> one flag a rank.
    """
    layers = {name.removesuffix(".default").rpartition(".")[0]: kept for name, kept in rank_pattern.items()}
    return {f"{PEFT_ROOT}{layer}.{factor}": kept for layer, kept in layers.items() for factor in FACTORS}


def pruned_shape(whole: tuple[int, ...], kept: list[bool], name: str) -> tuple[int, ...]:
    """Return the shape that a factor is saved in: A (r, I) and E (r, 1) without pruned rows, B (O, r) without columns.

    Raises:
        UserError: when the saved adapter began with another number of ranks.
    """
    side = 1 if name.endswith("lora_B") else 0
    if whole[side] != len(kept):
        raise UserError(
            f"adapter.weights: {name} began with {len(kept)} ranks, and here with {whole[side]} (1.5 x adapter.rank). "
            "Set the rank that it was trained with."
        )
    return tuple(sum(kept) if place == side else size for place, size in enumerate(whole))


def spread(saved: Tensor, kept: list[bool], fresh: Tensor, name: str) -> Tensor:
    """Return a whole factor with the saved ranks at their places. Pruned ones are zero in E, and fresh in A and B.

    Args:
        saved: the factor without its pruned ranks.
        kept: one flag a rank.
        fresh: the factor as it was drawn, in its whole shape.
    """
    whole = torch.zeros_like(fresh) if name.endswith("lora_E") else fresh.clone()
    places = torch.tensor(kept, device=fresh.device)
    (whole.T if name.endswith("lora_B") else whole)[places] = (saved.T if name.endswith("lora_B") else saved).to(whole)
    return whole


def _distance_to_identity(gram: Tensor) -> Tensor:
    """Return |G - 1| (Frobenius) of a Gram matrix (r, r)."""
    return torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
