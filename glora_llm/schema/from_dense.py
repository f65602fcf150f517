"""The section `model.from_dense`: the layers of a trained dense model share weights before they are trained on."""

from typing import Annotated

from pydantic import Field

from glora_llm.schema.section import Section, Share, key


class FromDenseSection(Section):
    """Make the model of name_or_path into VLoRA by truncated SVD; which layers share follows from what is lost."""

    budget: Share = key(..., "parameters of the layers' linears (the targets), as a share of the dense model's")
    targets: list[str] | None = key(
        None, "names of the linears inside a layer that may share, whole or their ends; none: all of them"
    )
    calibration_rows: Annotated[int, Field(ge=0)] = key(
        16, "training rows whose inputs and gradients weigh the errors of the linears; 0: weights alone", "rows"
    )
