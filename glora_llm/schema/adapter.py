"""The section `adapter`: the trained parameters."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from glora_llm.schema.section import LocalPath, PositiveInt, Rank, Section, key
from glora_llm.schema.slots import SUPERNET_MODES, Composition, Mode, Preset, Slot


class SlotSetting(Section):
    """One slot of a path, where the rank or alpha differs from the adapter's."""

    mode: Mode = key(..., "how the slot is parameterised")
    rank: Rank | None = key(None, "rank of modes lora and block; none: adapter.rank")
    alpha: Annotated[float, Field(gt=0)] | None = key(None, "none: adapter.alpha")


Slots = dict[Slot, Mode | SlotSetting]
SizedSlot = Literal["adapter", "lora", "prompt"]
Size = Annotated[int, Field(ge=0)]


class SupernetSection(Section):
    """The choices of a supernet (`adapter.paths: sample`): for every micro batch each layer draws a path of these."""

    modes: dict[Slot, list[Mode]] | None = key(
        None, "modes allowed, by slot; a slot that is not named may be any but block"
    )
    ranks: Annotated[list[Rank], Field(min_length=1)] = key(
        [8, 4, 2], "ranks of modes lora and block; smaller ones share the first columns of the largest"
    )

    sizes: dict[SizedSlot, Annotated[list[Size], Field(min_length=1)]] | None = key(
        None, "method noah: sizes of each part of a block, 0: none; what is not named may be 0, 5, 10, 50 or 100"
    )
    sandwich: Annotated[int, Field(ge=3)] | None = key(
        None,
        "of so many micro batches, counted through the run, one trains the largest path and the next one the smallest; "
        "none: all paths are drawn",
        "micro batches",
    )
    odds: dict[Slot, dict[Mode, Annotated[float, Field(ge=0)]]] | None = key(
        None, "how likely a mode of a slot is drawn, against its others; what is not named has 1"
    )
    distill: Annotated[float, Field(gt=0, le=1)] | None = key(
        None,
        "share of the divergence from the largest path's logits in the loss of all other paths (needs sandwich); costs "
        "a forward pass more for each micro batch",
    )

    @field_validator("sizes", mode="after")
    @classmethod
    def _each_size_once(cls, sizes: dict[str, list[int]] | None) -> dict[str, list[int]] | None:
        for slot, given in (sizes or {}).items():
            if len(set(given)) < len(given):
                raise ValueError(f"{slot} names a size twice: {given}")
        return sizes

    @field_validator("ranks", mode="after")
    @classmethod
    def _each_once(cls, ranks: list[int]) -> list[int]:
        if len(set(ranks)) < len(ranks):
            raise ValueError(f"{ranks} names a rank twice")
        return ranks

    @model_validator(mode="after")
    def _draws_that_can_be(self) -> "SupernetSection":
        for slot, given in (self.odds or {}).items():
            allowed = (self.modes or {}).get(slot, SUPERNET_MODES[slot])
            other = next((mode for mode in given if mode not in allowed), None)
            if other is not None:
                raise ValueError(f"odds: slot {slot} has no mode {other} in this supernet, but {', '.join(allowed)}")
            if not any(given.get(mode, 1.0) for mode in allowed):  # type: ignore[call-overload]
                raise ValueError(f"odds: every mode of slot {slot} has 0, so none can be drawn")
        if self.distill is not None and self.sandwich is None:
            raise ValueError("distill learns from the largest path, which sandwich trains: set sandwich, say to 4")
        return self


class AdapterSection(Section):
    """The trained parameters: GLoRA, one of its presets, any method of PEFT, or the whole model."""

    method: str = key("glora", "glora; a PEFT method: lora, rslora, dora, adalora, ia3, ...; or full: the whole model")
    preset: Preset | None = key(None, "a system that GLoRA generalises, as slots (instead of `slots`)")
    targets: str | list[str] = key("all-linear", "all-linear, module names, or a regular expression on the whole name")
    rank: Rank = key(8, "rank of every slot in mode lora or block")
    alpha: Annotated[float, Field(gt=0)] = key(16.0, "a slot in mode lora or block is scaled by alpha / rank")
    scaling: Literal["alpha", "even"] = key(
        "alpha",
        "alpha: slots are scaled by alpha / rank alone; even: by their layer's weight too, so that a step of "
        "training.lr changes a layer's output alike in every slot, mode, rank and layer",
    )
    rank_stabilized: bool = key(False, "scale by alpha / sqrt(rank) instead (rsLoRA)")
    composition: Composition = key("product", "A in mode lora: W0 (A_d A_u), or W0 * (A_d A_u)")
    slots: Slots | None = key(None, "mode (or mode, rank, alpha) by slot; default A lora, B lora, C vector, E vector")
    paths: dict[str, Slots] | Literal["sample"] | None = key(
        None,
        "slots of single layers: regular expression on the module name -> slots, the last match wins; or `sample`: "
        "train a supernet, from which a search chooses the slots of each layer",
    )
    supernet: SupernetSection | None = key(None, "what `paths: sample` draws from; none: everything")
    genome: LocalPath | None = key(None, "a genome file (a search writes RUN/genome.json): the slots of every layer")
    budget: list[str] | str | int | float | None = key(
        None,
        "slots, ranks and targets of every layer are chosen at the start within this: parameters (0.1M), seconds that "
        "they add to a step (20ms), or memory (12MB); several by commas",
        "limit",
    )
    predictor: Literal["uniform", "first_step", "energy", "curvature", "agreement", "short_run"] = key(
        "uniform",
        "of adapter.budget, what a slot is worth: uniform: B alone, of one rank everywhere; the others by gradients of "
        "adapter.budget_rows samples; short_run: along a short training of these (docs/glora.md)",
    )
    budget_rows: PositiveInt | None = key(
        None,
        "training samples whose gradients a predictor reads; default: 2 % of those that the run trains on, 64 to 256; "
        "of short_run those of 5 % of the steps, 4 steps at least",
        "samples",
    )
    weights: LocalPath | None = key(
        None,
        "an adapter folder to begin with (RUN/adapter), of the same method and slots; for a supernet also a LoRA, or "
        "GLoRA with slot B alone, with which its slot B begins",
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = key(0.0, "dropout of the input of the low-rank factors")
    lr_factors: dict[Slot, Annotated[float, Field(ge=0)]] | None = key(
        None, "factor on training.lr by slot; what is not named keeps its measured default", "x training.lr"
    )
    modules_to_save: list[str] | None = key(None, "modules trained and saved in full beside the adapter")
    peft: dict[str, Any] | None = key(None, "further arguments of the PEFT method's own config class")

    @property
    def is_supernet(self) -> bool:
        """True if paths are drawn while it trains."""
        return self.paths == "sample"

    @property
    def is_full(self) -> bool:
        """True if every parameter of the model is trained, and there is no adapter."""
        return self.method == "full"

    @field_validator("targets", mode="after")
    @classmethod
    def _name_or_expression(cls, targets: str | list[str]) -> str | list[str]:
        """Take a single name as a list of one; any other text is a regular expression, which must compile."""
        if isinstance(targets, list) or targets == "all-linear":
            return targets
        if re.fullmatch(r"\w+", targets):
            return [targets]
        _require_expression(targets)
        return targets

    @field_validator("paths", mode="after")
    @classmethod
    def _expressions(cls, paths: Any) -> Any:
        for pattern in paths if isinstance(paths, dict) else ():
            _require_expression(pattern)
        return paths

    @model_validator(mode="after")
    def _one_source_of_slots(self) -> "AdapterSection":
        if self.slots is not None and not self.slots:
            raise ValueError("slots is empty: give a slot its mode (B: lora), or leave slots out for the default")
        if self.preset and self.slots:
            raise ValueError("preset and slots exclude each other: adapter.slots=null takes the recipe's slots away")
        self._check_budget()
        chosen = [n for n in ("preset", "slots", "paths", "genome") if getattr(self, n) is not None]
        if len(chosen) > 1 and ("genome" in chosen or self.is_supernet):
            name = "genome" if "genome" in chosen else "paths: sample"
            raise ValueError(f"{name} says all about the slots: adapter.{chosen[0]}=null takes {chosen[0]} away")
        if self.preset == "lossless4" and self.dropout:
            raise ValueError(
                "dropout is of the input of the low-rank factors of A and B, and preset lossless4 has none: "
                "adapter.dropout=0 takes it away"
            )
        searched = self.method == "noah"
        only_glora = ("preset", "slots", "paths", "genome", "lr_factors")
        given = [n for n in only_glora if getattr(self, n) is not None]
        if searched:
            given = [n for n in given if n != "genome" and not (n == "paths" and self.is_supernet)]
        if self.method != "glora" and given:
            raise ValueError(
                f"{given[0]} belongs to method glora, not to '{self.method}': adapter.{given[0]}=null takes it away"
            )
        self._check_supernet()
        if self.method != "glora" and self.scaling != "alpha":
            raise ValueError(f"scaling {self.scaling} belongs to method glora, not to '{self.method}'")
        if self.is_full and any((self.peft, self.weights, self.modules_to_save)):
            raise ValueError("method full trains the whole model: peft, weights and modules_to_save belong to adapters")
        if self.method == "glora" and self.peft:
            raise ValueError("peft holds arguments of PEFT's own methods; glora has keys of its own")
        return self

    def _check_supernet(self) -> None:
        if self.supernet and not self.is_supernet:
            raise ValueError("supernet is what `paths: sample` draws from: set adapter.paths=sample")
        if self.rank_stabilized and self.is_supernet:
            raise ValueError("rank_stabilized is of fixed ranks, and a supernet scales by alpha / rank: take it away")
        plain, sized = SupernetSection(), self.method == "noah"
        others = ("modes", "ranks", "odds", "distill") if sized else ("sizes",)
        foreign = [n for n in others if self.supernet and getattr(self.supernet, n) != getattr(plain, n)]
        if foreign:
            here = "sizes" if sized else "modes and ranks"
            raise ValueError(f"supernet.{foreign[0]} is not of method {self.method}, whose supernet has {here}")

    def _check_budget(self) -> None:
        if self.budget is None:
            if self.predictor != "uniform" or self.budget_rows is not None:
                raise ValueError("predictor and budget_rows are of adapter.budget: set that too")
            return
        if self.method != "glora":
            raise ValueError(f"budget belongs to method glora, not to '{self.method}'")
        for name in ("preset", "paths", "genome", "weights"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"budget chooses the slots of every layer, and {name} says them: take one of them away"
                )


def _require_expression(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"'{pattern}' is no regular expression: {error}") from None
