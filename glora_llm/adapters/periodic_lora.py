"""PeriodicLoRA (arXiv 2402.16141): every `period` steps A and B are unloaded into the base and begin anew.

After k periods the increment is s (B_1 A_1 + ... + B_k A_k + B A), of rank up to (k + 1) r. The paper adds each product
to the base's weight. Here it stays a pair of frozen factors beside it: a 4-bit or 8-bit weight could not take it up
without rounding, a bfloat16 one neither, and a weight that ZeRO 3 divides is not read. So the sum is exact on every
base, a resumed run repeats it bit for bit, and merging it is the merge of a LoRA. What that costs: each period adds
r (I + O) float32 numbers a layer to every process and to the adapter folder, and the products of rank k r to a step.

Unloading with momentum m, the paper's remedy against unstable restarts: (1 - m) B A is unloaded, and m B A goes on
being trained, as A and m B; with m = 0 A is drawn anew and B is zero. Either way the model computes the same function
right after as right before. Adam's moments of A and B, and the count that corrects them, begin at zero. The learning
rate goes on by its schedule.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.utils import PeftType
from torch import Tensor, nn

from glora_llm.adapters.factors import (
    Factors,
    FactorsConfig,
    FactorsModel,
    FactorsVariant,
    add_type,
    draw_down,
    owned,
    register,
)
from glora_llm.errors import AdapterError
from glora_llm.schema import AdapterSection
from glora_llm.training.penalty import GradientOf
from glora_llm.training.whole_state import WholeState

PAST = ".lora_past."  # in the names of what was unloaded


@dataclass
class PeriodicLoraConfig(FactorsConfig):
    """LoRA's configuration, and:

    Args:
        period: optimizer steps between two unloadings; in a recipe by default a quarter of the steps.
        momentum: share of B A that goes on being trained behind an unloading.
        total_step: of the run; behind the last step nothing is unloaded.
        seed: draws A anew.

    Raises:
        AdapterError: for a period below 1, or a momentum outside of [0, 1).
    """

    own_type: ClassVar[PeftType] = add_type("periodic_lora")
    period: int = field(default=100, metadata={"help": "optimizer steps between two unloadings"})
    momentum: float = field(default=0.0, metadata={"help": "share of B A that goes on being trained"})
    total_step: int = field(default=0, metadata={"help": "steps of the run"})
    seed: int = field(default=0, metadata={"help": "draws A anew"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.period < 1:
            raise AdapterError(f"period is {self.period}; expected the steps between two unloadings, at least 1.")
        if not 0 <= self.momentum < 1:
            raise AdapterError(f"momentum is {self.momentum}; expected a share from 0 to below 1.")


class PastFactors(nn.Module):
    """The factors that were unloaded, one behind the other.

    Attributes:
        down: A_1 .. A_k (k r, I), float32.
        up: B_1 .. B_k (O, k r), float32.
    """

    down: Tensor
    up: Tensor

    def __init__(self, in_features: int, out_features: int, device: torch.device):
        super().__init__()
        self.register_buffer("down", torch.zeros(0, in_features, device=device))
        self.register_buffer("up", torch.zeros(out_features, 0, device=device))

    def append(self, down: Tensor, up: Tensor) -> None:
        """Add one period's factors A (r, I) and B (O, r)."""
        self.down = torch.cat([self.down, down.to(self.down)])
        self.up = torch.cat([self.up, up.to(self.up)], 1)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Take as many periods as were saved."""
        for name in ("down", "up"):
            saved = state_dict.get(prefix + name)
            if saved is not None:
                setattr(self, name, torch.empty(saved.shape, device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *args)


class PeriodicVariant(FactorsVariant):
    """The product that is trained, and those that were unloaded."""

    @staticmethod
    def factors(layer: Any, adapter: str) -> Iterator[Factors]:
        """Yield A and B, then all unloaded ones as one pair."""
        yield from FactorsVariant.factors(layer, adapter)
        past = layer.lora_past[adapter]
        if len(past.down):
            yield past.down, past.up


class PeriodicLoraModel(FactorsModel):
    """Puts LoRA layers into a model that hold what was unloaded."""

    variant = PeriodicVariant

    def extend(self, layer: Any, adapter_name: str, config: Any, name: str) -> None:
        """Give a layer a place for the factors that are unloaded."""
        device = layer.lora_A[adapter_name].weight.device
        owned(layer, "lora_past")[adapter_name] = PastFactors(layer.in_features, layer.out_features, device)


class PeriodicLora:
    """The unloadings of one model in training, a `StatefulMethod`.

    Args:
        model: a PeftModel whose tuner is PeriodicLoRA.
    """

    name: ClassVar[str] = "periodic_lora"
    trained: WholeState

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.peft_config["default"]
        self.layers = {name: m for name, m in model.named_modules() if hasattr(m, "lora_past")}
        self.steps_done, self.applied = 0, 0  # the second since the last unloading: Adam's own count

    @staticmethod
    def config_arguments(section: AdapterSection, steps: int) -> dict[str, Any]:
        """Return a period of a quarter of the steps."""
        return {"period": max(1, -(-steps // 4)), "total_step": steps}

    def penalty_gradients(self) -> dict[nn.Parameter, GradientOf]:
        """Return nothing: there is no penalty."""
        return {}

    def attach(self, trained: WholeState) -> None:
        """Take the parameters, masters and moments that an unloading changes."""
        self.trained = trained

    def step(self, skipped: bool) -> None:
        """Count the step, and unload at the end of a period."""
        self.steps_done += 1
        self.applied += not skipped
        if self.steps_done % self.config.period == 0 and self.steps_done != self.config.total_step:
            self._unload()

    def _names(self, layer: str) -> tuple[str, str]:
        return f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"

    @torch.no_grad()
    def _unload(self) -> None:
        masters, kept = self.trained.masters(), self.config.momentum
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.steps_done)
        values: dict[str, Tensor] = {}
        for layer, module in self.layers.items():
            a_name, b_name = self._names(layer)
            a, b = masters[a_name], masters[b_name]
            module.lora_past["default"].append(a, (1 - kept) * b)
            drawn = draw_down(tuple(a.shape), a, generator)
            values |= {a_name: a if kept else drawn, b_name: kept * b}
        self.trained.set_masters(values)
        self.trained.forget_moments(values)
        self.applied = 0
        self.trained.set_count(values, 0)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the steps done, and those applied since the last unloading; the factors are in the adapter itself."""
        return {}, {"step": self.steps_done, "applied": self.applied}

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Set what `state_dict` returned, and Adam's count of A and B."""
        self.steps_done, self.applied = values["step"], values["applied"]
        self.trained.set_count([name for layer in self.layers for name in self._names(layer)], self.applied)


def past_factors(model: nn.Module) -> dict[str, Tensor]:
    """Return what was unloaded, by name; nothing for other methods."""
    return {name: value for name, value in model.named_buffers() if PAST in name}


register("periodic_lora", PeriodicLoraConfig, PeriodicLoraModel)
