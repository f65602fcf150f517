"""The section `vlora`: layers that share weights (Vertical LoRA, arXiv 2406.09315)."""

from typing import Annotated, Literal, get_args

from pydantic import Field

from glora_llm.schema.section import PositiveInt, Section, key

Topology = Literal["chain", "star"]
BaseGradient = Literal["all", "first"]
Start = Literal["paper", "kaiming"]
Form = Literal["auto", "composed", "thin"]

# Key of the section -> its values, in the order of the error messages.
VLORA_CHOICES: dict[str, tuple[str, ...]] = {
    "topology": get_args(Topology),
    "base_gradient": get_args(BaseGradient),
    "start": get_args(Start),
    "form": get_args(Form),
}


class VLoRASection(Section):
    """Vertical LoRA: every k like layers share a base, and each next one adds a low-rank increment (docs/vlora.md)."""

    layers_per_compound: PositiveInt | None = key(4, "k, layers that share one base; null: the whole model", "layers")
    rank: PositiveInt | dict[str, PositiveInt] = key(8, "r of an increment: one for all, or linear -> r")
    alpha: Annotated[float, Field(gt=0)] | None = key(None, "an increment is scaled by alpha / rank; none: by 1")
    topology: Topology = key("chain", "an increment is added to the previous layer, or to the base")
    base_gradient: BaseGradient = key("all", "the base learns from all layers, or from the first alone")
    start: Start = key("paper", "paper: increments are zero; kaiming: both factors are random")
    form: Form = key("auto", "how a layer is computed; auto: the cheaper for each input")
    targets: list[str] | None = key(None, "names of linears inside a layer, whole or their ends; none: all of them")
