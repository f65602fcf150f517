"""The configuration of GLoRA in PEFT's terms, and its PEFT type."""

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType

from glora_llm.errors import AdapterError, UserError
from glora_llm.glora.path import LayerPath, genome_from_slots, is_sized, make_path, path_for
from glora_llm.glora.supernet import SlotChoices, slot_choices
from glora_llm.schema.slots import COMPOSITIONS, DEFAULT_SLOTS


def add_peft_type(name: str) -> PeftType:
    """PEFT's types are a closed Enum; a method outside PEFT has to add its member by hand."""
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    return member


GLORA_LLM = add_peft_type("GLORA_LLM")


@dataclass
class GLoRAConfig(PeftConfig):
    """Configuration of a GLoRA adapter, as `get_peft_model` takes it.

    Args:
        target_modules: names, one regular expression, or `all-linear`.
        slots: slot -> mode, or slot -> {mode, rank, alpha}; default A lora, B lora, C vector, E vector.
        paths: regular expression on the module's name -> slots, for single layers; the last match wins.
        genome: layer name -> slots, as in a genome file, instead of `slots` and `paths`; a layer that it does not name
            has no slot.
        supernet: {modes: slot -> modes, ranks}: allocate all of them, a path is drawn at every micro step.
        rank: r of modes lora and block.
        alpha: modes lora and block are scaled by alpha / rank, or alpha / sqrt(rank) if `rank_stabilized`.
        composition: of A in mode lora: `product` W0 (A_d A_u), or `hadamard` W0 * (A_d A_u).
        dropout: of the input of the low-rank factors.
        modules_to_save: modules trained and saved in full.
        d_without_bias: what to do where D is asked for and the layer has no bias: `error`, or `none` (leave D out).
        seed: draws the start of the `up` factors; None: torch's default generator.
        scaling: `alpha`, or `even`: slots were scaled by their layer's weight too, by `scales`.
        scales: layer name -> slot -> mode -> factor on the slot, beside alpha / rank of a slot with a rank
            (`adapters.even` measures them); what is not there has 1.
        init_weights: True: the adapter changes nothing at the start; False: every number of it starts at random (the
            meaning of PEFT's methods; for tests).
    """

    target_modules: str | list[str] | None = field(default="all-linear")
    exclude_modules: str | list[str] | None = field(default=None)
    slots: dict[str, Any] = field(default_factory=lambda: dict(DEFAULT_SLOTS))
    paths: dict[str, dict[str, Any]] = field(default_factory=dict)
    genome: dict[str, dict[str, Any]] | None = None
    supernet: dict[str, Any] | None = None
    rank: int = 8
    alpha: float = 16.0
    rank_stabilized: bool = False
    composition: str = "product"
    dropout: float = 0.0
    modules_to_save: list[str] | None = None
    d_without_bias: str = "error"
    seed: int | None = None
    scaling: str = "alpha"
    scales: dict[str, dict[str, dict[str, float]]] | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = GLORA_LLM
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        try:
            self._check()
        except UserError as error:
            raise AdapterError(str(error)) from None

    def _check(self) -> None:
        if self.composition not in COMPOSITIONS:
            raise UserError(f"composition is '{self.composition}'; expected {' or '.join(COMPOSITIONS)}.")
        if self.rank < 1:
            raise UserError(f"`rank` should be a positive integer value but the value passed is {self.rank}")
        self._genome = None if self.genome is None else genome_from_slots(self.genome)
        if self._genome and is_sized(self._genome):
            raise UserError("the genome has the sizes of method noah, and this is glora: set adapter.method=noah.")
        self._check_composition()

    @property
    def choices(self) -> SlotChoices | None:
        """Modes and ranks that each slot may take in a supernet; None where the paths are fixed."""
        if self.supernet is None:
            return None
        ranks = self.supernet.get("ranks") or [self.rank]
        return slot_choices(self.supernet.get("modes"), ranks, self.alpha, self.scaling == "even")

    def _check_composition(self) -> None:
        """Refuse `hadamard` where no layer has A in mode lora, of which it is, and one has mode block."""
        paths = [self.path_of(""), *(self._path(slots) for slots in self.paths.values())]
        modes = {path["A"].mode for path in paths}
        fixed = self._genome is None and self.supernet is None
        if fixed and self.composition == "hadamard" and "block" in modes and "lora" not in modes:
            raise UserError(
                "composition hadamard is of slot A in mode lora, and A is in mode block here, whose gains multiply W0 "
                "by themselves. Leave composition at product."
            )

    def _path(self, slots: dict[str, Any]) -> LayerPath:
        return make_path(slots, self.rank, self.alpha, self.rank_stabilized)

    def path_of(self, name: str) -> LayerPath:
        """Return the path of the layer `name`."""
        if self._genome is not None:
            return self._genome.get(name, LayerPath(()))
        patterns = {pattern: self._path(slots) for pattern, slots in self.paths.items()}
        return path_for(name, self._path(self.slots), patterns)
