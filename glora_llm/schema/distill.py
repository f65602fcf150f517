"""The section `training.distill`: learning from the answers of another model."""

from typing import Annotated, Literal

from pydantic import Field

from glora_llm.schema.model import ModelSection
from glora_llm.schema.section import LocalPath, Section, key


class DistillSection(Section):
    """Learn from the logits of a frozen teacher too, on the same tokens."""

    teacher: LocalPath = key(
        ..., "a folder, a hub id or `embedded:NAME`, as model.name_or_path; with the tokenizer of the model"
    )
    revision: str | None = key(None, "hub revision of the teacher (branch, tag or commit)")
    quantization: Literal["none", "nf4"] = key("none", "nf4: the teacher in 4 bits, beside the model on each device")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "auto", "what the teacher is computed in; auto: bfloat16 on a GPU that has it, else float32"
    )
    weight: Annotated[float, Field(gt=0, le=1)] = key(
        0.5, "share of the divergence from the teacher in the loss; the cross entropy has the rest"
    )
    temperature: Annotated[float, Field(gt=0)] = key(
        1.0, "both logits are divided by it; the divergence is multiplied by its square"
    )
    states: Annotated[float, Field(ge=0)] = key(
        0.0, "weight of the layers' relative squared error against the teacher's states, added to the loss"
    )

    def as_model(self) -> ModelSection:
        """Return the teacher as a base model is described."""
        return ModelSection(
            name_or_path=self.teacher, revision=self.revision, quantization=self.quantization, dtype=self.dtype
        )
