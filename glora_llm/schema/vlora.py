"""The section `vlora`: layers that share weights (Vertical LoRA, arXiv 2406.09315)."""

from typing import Annotated, Literal, get_args

from pydantic import Field

from glora_llm.schema.section import PositiveInt, Section, key

Topology = Literal["chain", "star"]
BaseGradient = Literal["all", "first"]
Start = Literal["paper", "kaiming", "small"]
Sharing = Literal["adjacent", "cycle"]
Increments = Literal["next", "all"]
Gain = Literal["row", "column", "diagonal"]
Form = Literal["auto", "composed", "thin"]

# Key of the section -> its values, in the order of the error messages.
VLORA_CHOICES: dict[str, tuple[str, ...]] = {
    "topology": get_args(Topology),
    "base_gradient": get_args(BaseGradient),
    "start": get_args(Start),
    "form": get_args(Form),
    "sharing": get_args(Sharing),
    "increments": get_args(Increments),
}
GAINS: tuple[str, ...] = get_args(Gain)


LrFactor = Annotated[float, Field(gt=0, le=1000)]


class VLoRARates(Section):
    """Factors on training.lr by the part of a shared weight."""

    base: LrFactor = key(1.0, "of the weights that k layers share", "x training.lr")
    b: LrFactor = key(1.0, "of an increment's B, which starts at zero", "x training.lr")
    a: LrFactor = key(1.0, "of an increment's A", "x training.lr")
    gain: LrFactor = key(1.0, "of row and column gains and the diagonal", "x training.lr")


class VLoRASection(Section):
    """Vertical LoRA: every k like layers share a base, and each next one adds a low-rank increment (docs/vlora.md)."""

    layers_per_compound: PositiveInt | dict[str, PositiveInt] | None = key(
        4, "k, layers that share one base: one for all, or linear -> k; null: the whole model", "layers"
    )
    rank: PositiveInt | dict[str, PositiveInt] = key(8, "r of an increment: one for all, or linear -> r")
    alpha: Annotated[float, Field(gt=0)] | None = key(None, "an increment is scaled by alpha / rank; none: by 1")
    topology: Topology = key("chain", "an increment is added to the previous layer, or to the base")
    base_gradient: BaseGradient = key("all", "the base learns from all layers, or from the first alone")
    start: Start = key(
        "paper", "paper: increments are zero; kaiming: both factors are random; small: both, of size start_scale"
    )
    form: Form = key("auto", "how a layer is computed; auto: the cheaper for each input")
    targets: list[str] | None = key(None, "names of linears inside a layer, whole or their ends; none: all of them")
    sharing: Sharing = key("adjacent", "layers of a compound: k neighbours, or every (L / k)-th layer of L")
    increments: Increments = key("next", "which layers of a compound add an increment: all but the first, or all")
    gains: list[Gain] | dict[str, list[Gain]] = key(
        [], "row and column factors and a diagonal beside B A: for all linears, or linear -> gains"
    )
    start_scale: Annotated[float, Field(gt=0, le=1)] = key(
        0.1, "start small: size of an increment at the start", "x the base's entries (root mean square)"
    )
    norm_spread: Annotated[float, Field(ge=0, lt=1)] = key(
        0.0, "standard deviation, around 1, of the gains that the layers' norms start with"
    )
    lr_factors: VLoRARates | Literal["auto"] | None = key(
        None, "rates of bases and increments; auto: 1 / sqrt(k) and, of B, sqrt(3 I / r) / s; none: 1"
    )
    decay_increments: bool = key(True, "training.weight_decay is for the matrices of increments too")


TRAINING_KEYS = frozenset({"lr_factors", "decay_increments"})  # which are of a run, and not of the model's shape
