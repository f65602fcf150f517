"""LoRA dropout (arXiv 2404.09610): whole columns of A and rows of B are dropped, not elements of the input.

In training, dW = s (D_B B) (A D_A), where D_A (I) and D_B (O) are diagonal with m / (1 - p), m ~ Bernoulli(1 - p),
drawn for each micro batch and layer; the rank is never dropped. The paper writes the masks m alone: dividing by 1 - p,
as dropout does, makes the adapter without masks their mean. The masks come from torch's generator, which the training
loop seeds for every micro batch: the same after a restart, in the recomputation of gradient checkpointing, and for any
number of processes.

In evaluation, dW = s B A, which is the mean of the masked ones: that is what merges. With `ensemble: N` the model is
evaluated under N fixed masks, and the mean is taken over the models' final hidden states: the mean of their logits
where the head is linear, as of every causal language model. That mean is no single weight: it cannot be merged.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.utils import PeftType
from torch import Tensor, nn

from glora_llm.adapters.factors import Factors, FactorsConfig, FactorsModel, FactorsVariant, add_type, register
from glora_llm.errors import AdapterError

MEANS = ("last_hidden_state", "pooler_output", "logits")  # what an ensemble averages of a model's output


@dataclass
class LoraDropoutConfig(FactorsConfig):
    """LoRA's configuration, and:

    Args:
        p: probability that a column of A, or a row of B, is dropped in training.
        ensemble: number of masks of the mean at test time; 0: plain A and B.
        ensemble_seed: of these masks.

    Raises:
        AdapterError: for a probability outside of [0, 1), or a negative number of masks.
    """

    own_type: ClassVar[PeftType] = add_type("lora_dropout")
    p: float = field(default=0.5, metadata={"help": "probability that a column of A or a row of B is dropped"})
    ensemble: int = field(default=0, metadata={"help": "masks of the mean at test time"})
    ensemble_seed: int = field(default=0, metadata={"help": "seed of these masks"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.p < 1:
            raise AdapterError(f"p is {self.p}; expected a probability from 0 to below 1.")
        if self.ensemble < 0:
            raise AdapterError(f"ensemble is {self.ensemble}; expected a number of masks, or 0 for none.")


class Sample:
    """The mask of the ensemble that the layers of one adapter compute with.

    Attributes:
        number: of the mask; None: plain A and B.
    """

    number: int | None

    def __init__(self) -> None:
        self.number = None


@dataclass(frozen=True)
class Masks:
    """The masks of one layer.

    Args:
        p: probability of a zero.
        seed: of the layer's masks in an ensemble.
        sample: of the adapter.
    """

    p: float
    seed: int
    sample: Sample

    def draw(self, training: bool, like: Factors) -> Factors | None:
        """Return the diagonals (I) of D_A and (O) of D_B for one forward pass, or None where nothing is dropped."""
        sizes = like[0].shape[1], like[1].shape[0]
        if training and self.p:
            device = like[0].device
            drawn = [torch.rand(size, device=device) for size in sizes]
        elif not training and self.sample.number is not None:
            generator = torch.Generator().manual_seed(self.seed * 65_537 + self.sample.number)
            drawn = [torch.rand(size, generator=generator).to(like[0].device) for size in sizes]
        else:
            return None
        first, second = ((values >= self.p).to(like[0].dtype) / (1 - self.p) for values in drawn)
        return first, second


class DropoutVariant(FactorsVariant):
    """Masks A and B in training, and in an ensemble."""

    @classmethod
    def computed(cls, layer: Any, adapter: str) -> Iterator[Factors]:
        """Yield A (r, I) without some columns, and B (O, r) without some rows."""
        for down, up in cls.factors(layer, adapter):
            diagonals = layer.lora_masks[adapter].draw(layer.training, (down, up))
            yield (down, up) if diagonals is None else (down * diagonals[0], up * diagonals[1][:, None])


class LoraDropoutModel(FactorsModel):
    """Puts LoRA layers with masks into a model, which it evaluates under several where an ensemble is asked for."""

    variant = DropoutVariant

    def __init__(self, model: nn.Module, config: Any, adapter_name: str, *args: Any, **kwargs: Any):
        super().__init__(model, config, adapter_name, *args, **kwargs)
        body: Any = getattr(self.model, getattr(self.model, "base_model_prefix", "") or "-", self.model)
        body.register_forward_pre_hook(self._begin_ensemble, with_kwargs=True)
        body.register_forward_hook(self._mean, with_kwargs=True)

    def extend(self, layer: Any, adapter_name: str, config: Any, name: str) -> None:
        """Give a layer its masks; in an ensemble, each layer has others."""
        if not hasattr(layer, "lora_masks"):
            layer.lora_masks = {}
        samples: dict[str, Sample] = self.__dict__.setdefault("_samples", {})
        counts: dict[str, int] = self.__dict__.setdefault("_layer_counts", {})
        number = counts[adapter_name] = counts.get(adapter_name, 0) + 1
        sample = samples.setdefault(adapter_name, Sample())
        layer.lora_masks[adapter_name] = Masks(config.p, config.ensemble_seed * 1_000_003 + number, sample)

    def _ensemble(self, body: nn.Module) -> tuple[int, list[Sample]]:
        """Return the number of masks of this forward pass (0: none, or it is one of an ensemble), and the adapters'."""
        active = [name for name in self.active_adapters if name in self.peft_config]
        samples = [self.__dict__["_samples"][name] for name in active if name in self.__dict__.get("_samples", {})]
        if body.training or not samples or samples[0].number not in (None, 0):
            return 0, samples
        return max(getattr(self.peft_config[name], "ensemble", 0) for name in active), samples

    def _begin_ensemble(self, body: nn.Module, args: Any, kwargs: Any) -> None:
        count, samples = self._ensemble(body)
        if count and kwargs.get("past_key_values") is not None:
            raise AdapterError(
                "An ensemble of masks cannot write text: each mask would need keys and values of its own. Set "
                "adapter.peft.ensemble=0, or evaluation.generate=null."
            )
        for sample in samples if count else ():
            sample.number = 0

    def _mean(self, body: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Average the output of the first mask with those of the others, in place."""
        count, samples = self._ensemble(body)
        if not count:
            return
        try:
            for number in range(1, count):
                for sample in samples:
                    sample.number = number
                further = body(*args, **kwargs)
                for name in MEANS:
                    if isinstance(output.get(name), Tensor):
                        output[name] = output[name] + further[name]
        finally:
            for sample in samples:
                sample.number = None
        for name in MEANS:
            if isinstance(output.get(name), Tensor):
                output[name] = output[name] / count


register("lora_dropout", LoraDropoutConfig, LoraDropoutModel)
