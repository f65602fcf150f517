"""AdaLoRA (arXiv 2303.10512): an orthogonality penalty, and a budget of ranks that is divided anew after each step.

PEFT computes both. This calls them at the right place of the training loop, and keeps the state of PEFT's allocator.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from glora_llm.errors import UserError
from glora_llm.glora.path import PEFT_ROOT
from glora_llm.schema import AdapterSection
from glora_llm.training.penalty import GradientOf
from glora_llm.training.whole_state import WholeState

ALLOCATOR_TENSORS = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # importance of each factor, its mean and its uncertainty

FACTORS = ("lora_A", "lora_B", "lora_E")


class AdaLoRA:
    """The budget of one AdaLoRA model, a `StatefulMethod`.

    Args:
        model: a PeftModel whose tuner is AdaLoRA.
    """

    name: ClassVar[str] = "adalora"
    trained: WholeState

    def __init__(self, model: Any) -> None:
        self.model, self.tuner = model, model.base_model
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

    def penalty_gradients(self) -> dict[nn.Parameter, GradientOf]:
        """Return the gradients of the weighted mean of |A A' - 1| and |B' B - 1| (Frobenius) over all factors."""
        layers = [m for m in self.tuner.modules() if isinstance(getattr(m, "lora_A", None), nn.ParameterDict)]
        downs = [dict(layer.lora_A.named_parameters()) for layer in layers]
        ups = [dict(layer.lora_B.named_parameters()) for layer in layers]
        weight = float(self.config.orth_reg_weight) / sum(map(len, [*downs, *ups]))
        found = {a: partial(_away_from_orthogonal_rows, weight) for named in downs for a in named.values()}
        return found | {b: partial(_away_from_orthogonal_columns, weight) for named in ups for b in named.values()}

    def attach(self, trained: WholeState) -> None:
        """Take the parameters, and have the gradients of each step kept."""
        self.trained = trained
        trained.keep_gradients()

    def step(self, skipped: bool) -> None:
        """Give the ranks to the layers that use them; nothing after a step that was skipped.

        The same as PEFT's `update_and_allocate`, which reads each parameter's own values and gradient: here they are
        whole ones, of all processes. Where the step that fixes the ranks was skipped, the next one fixes them.
        """
        self.steps_done += 1
        if skipped:
            return
        allocator, last = self.tuner.rankallocator, self.config.total_step - self.config.tfinal
        whole = _Whole.of(self.trained, with_gradients=self.steps_done < last)
        if self.steps_done < last:
            _, pattern = allocator.update_and_allocate(whole, self.steps_done)
            self.config.rank_pattern = pattern or self.config.rank_pattern
        elif allocator.exp_avg_ipt:
            _, self.config.rank_pattern = allocator.update_and_allocate(whole, self.steps_done, force_mask=True)
            allocator.reset_ipt()
        elif self.config.rank_pattern:
            allocator.mask_using_rank_pattern(whole, self.config.rank_pattern)
        self.trained.set_masters(whole.pruned())

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


def require_budget(config: Any) -> None:
    """Check that ranks are taken away, and not given: PEFT does not, and fails once it prunes.

    Raises:
        UserError: when the ranks at the end are more than those at the start.
    """
    if config.target_r > config.init_r:
        raise UserError(
            f"adapter.peft.target_r is {config.target_r} and init_r is {config.init_r}: AdaLoRA takes ranks away, from "
            "init_r in every layer down to target_r on average. Set target_r to less."
        )


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


def _away_from_orthogonal_rows(weight: float, a: Tensor) -> Tensor:
    """Return the gradient of weight x |A A' - 1| (Frobenius), 2 weight (A A' - 1) A / |A A' - 1|, of A (r, I)."""
    away = a @ a.T - torch.eye(len(a), dtype=a.dtype, device=a.device)
    norm = torch.linalg.matrix_norm(away).clamp(min=torch.finfo(a.dtype).tiny)  # at 0, the gradient is 0 too
    return (2 * weight / norm) * (away @ a)


def _away_from_orthogonal_columns(weight: float, b: Tensor) -> Tensor:
    """Return the gradient of weight x |B' B - 1| (Frobenius), of B (O, r)."""
    return _away_from_orthogonal_rows(weight, b.T).T


class _Whole:
    """A stand-in for the model that PEFT's allocator reads and prunes: whole values by name, each with its gradient.

    Args:
        values: of the factors, by their names in the base model.
    """

    def __init__(self, values: dict[str, Tensor]):
        self.values = values

    @classmethod
    def of(cls, trained: WholeState, with_gradients: bool) -> "_Whole":
        """Gather the factors; all processes call it together."""
        gradients = trained.gradients() if with_gradients else {}
        trained.forget_gradients()
        values = {name: value for name, value in trained.masters().items() if ".lora_" in name}
        for name, value in values.items():
            value.grad = gradients.get(name)
        return cls({name.removeprefix(PEFT_ROOT): value for name, value in values.items()})

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        """Return the factors as a model does."""
        return self.values.items()

    def pruned(self) -> dict[str, Tensor]:
        """Return what the allocator may have changed, the singular values, by their names in the PEFT model."""
        return {PEFT_ROOT + name: value for name, value in self.values.items() if ".lora_E." in name}
