"""Every key of a recipe: type, unit, default, meaning. `docs/recipe_reference.md` is generated from this package.

Strict: an unknown key or a value of another type is an error. Nothing here imports torch.
"""

from typing import Literal

from glora_llm.schema.adapter import AdapterSection, Slots, SlotSetting, SupernetSection
from glora_llm.schema.data import DataSection
from glora_llm.schema.distill import DistillSection
from glora_llm.schema.from_dense import FromDenseSection
from glora_llm.schema.images import ImagesSection
from glora_llm.schema.model import ModelSection
from glora_llm.schema.output import MergeSection, OutputSection
from glora_llm.schema.section import PositiveInt, Section, Share, key
from glora_llm.schema.training import EvaluationSection, GenerateSection, SearchSection, TrainingSection
from glora_llm.schema.vlora import VLoRASection

__all__ = [
    "AdapterSection",
    "DataSection",
    "DistillSection",
    "EvaluationSection",
    "FromDenseSection",
    "GenerateSection",
    "ImagesSection",
    "MergeSection",
    "ModelSection",
    "OutputSection",
    "PositiveInt",
    "Recipe",
    "SearchSection",
    "Section",
    "Share",
    "SlotSetting",
    "Slots",
    "SupernetSection",
    "TrainingSection",
    "VLoRASection",
    "key",
]


class Recipe(Section):
    """One run."""

    description: str = key("", "one line for `glora-llm recipes`")
    task: Literal["auto", "language_modeling", "classification", "regression"] = key(
        "auto",
        "auto: by data.format; classification and regression put a new head on the model (docs/tasks.md), "
        "language_modeling learns label words as text",
    )
    model: ModelSection
    adapter: AdapterSection = AdapterSection()
    vlora: VLoRASection | None = None
    data: DataSection
    training: TrainingSection
    evaluation: EvaluationSection = EvaluationSection()
    search: SearchSection | None = None
    merge: MergeSection = MergeSection()
    output: OutputSection

    @property
    def head(self) -> Literal["classification", "regression"] | None:
        """The kind of head that a text model gets; None: it learns tokens, or the data are images."""
        if self.task in ("classification", "regression"):
            return None if self.data.format == "images" else self.task  # type: ignore[return-value]
        return "regression" if self.data.format == "regression" else None
