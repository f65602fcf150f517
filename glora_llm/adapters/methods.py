"""The adapter methods: what each can do here, and the paper that it comes from.

Everything that must know it reads this table: the check of a recipe, the overview of a run, the merge, and
`glora-llm methods`. A method of PEFT is here with the arguments that it needs to be saved and loaded by this trainer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from glora_llm.errors import UserError, nearest
from glora_llm.schema import AdapterSection


@dataclass(frozen=True)
class Method:
    """An adapter method that trains here.

    Args:
        source: the paper, by its number on arXiv, or where else it is described.
        unmerged: why its adapter cannot become part of a plain model; empty where it can.
        arguments: of the method's PEFT configuration, where PEFT's own defaults do not fit; adapter.peft wins.
        places: it knows where in a block it goes, which adapter.targets `all-linear` leaves to it.
        up: its factors that end in the layer's outputs, by their names in a layer: those of the larger rate of LoRA+.
        tuner: the PEFT type of which it is a preset, by `arguments`; empty: it has one of its own name.
        quantised: bases that are not dense on which it computes the same function as on a dense one with their values.
        kinds: of models that it trains, as `models.families` names them.
    """

    source: str
    unmerged: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    places: bool = False
    tuner: str = ""
    up: tuple[str, ...] = ()
    quantised: tuple[str, ...] = ("nf4", "fp4", "int8")
    kinds: tuple[str, ...] = ("text", "classification", "images")


KINDS = {
    "text": "language models",
    "classification": "language models with a head (task: classification, regression)",
    "images": "image classifiers",
}
OF_TEXT = ("text", "classification")

NONLINEAR = (
    "its nonlinearity is no part of a plain model. RUN/adapter is a PEFT folder, which PeftModel.from_pretrained loads "
    "where glora_llm.adapters.own is imported, and `glora-llm evaluate RUN` scores it as it is"
)


def _bottleneck(source: str, **arguments: Any) -> Method:
    """Return a preset of the bottleneck adapters in `bottleneck`."""
    up = tuple(f"bottleneck_up.default.{name}" for name in ("weight", "left", "right"))  # dense, or Compacter's
    return Method(source, NONLINEAR, arguments, places=True, tuner="bottleneck", up=up)


# of layers of PEFT that read the weight as a matrix of numbers, which int8 is not, or 4 bits neither
FOUR_BITS, NONE = ("nf4", "fp4"), ()
PROMPT_STAYS = (
    "its prompt stands before every sample, and no weight of a plain model holds that. PEFT loads the folder "
    "RUN/adapter on the base as it is"
)
MODULES_STAY = (
    "its adapters and prompts are modules and tokens of their own, and no weight of a plain model holds these. PEFT "
    "loads the folder RUN/adapter where glora_llm.adapters.own is imported; a structure of LoRA alone merges "
    "(adapter.peft={adapter: 0, prompt: 0})"
)
VISUAL_PROMPT_STAYS = (
    "its prompts are further tokens of its layers' input, and no weight of a plain model holds these. PEFT loads the "
    "folder RUN/adapter where glora_llm.adapters.own is imported"
)


def _prompt(source: str, tuner: str = "", **arguments: Any) -> Method:
    """Return a prompt of PEFT; see `prompts`."""
    return Method(source, PROMPT_STAYS, arguments, tuner=tuner, kinds=OF_TEXT)


METHODS: dict[str, Method] = {
    "glora": Method("2306.07967"),
    "full": Method("the whole model is trained", quantised=NONE),
    "lora": Method("2106.09685", up=("lora_B",)),
    "rslora": Method("2312.03732", up=("lora_B",)),
    "dora": Method("2402.09353", up=("lora_B",)),
    "adalora": Method("2303.10512", up=("lora_B",)),
    "beft": Method("2509.15974", "it gives a bias to every layer, and a LLaMA's linears have none"),
    "boft": Method("2311.06243"),
    "c3a": Method("2407.19342", quantised=FOUR_BITS),
    "deft": Method("PEFT's documentation", quantised=NONE, up=("deft_P",)),
    "delora": Method("2503.18225", quantised=NONE, up=("delora_B",)),
    "fourierft": Method("2405.03003"),
    "gralora": Method("2505.20355", quantised=FOUR_BITS, up=("gralora_B",)),
    "hira": Method("openreview.net, TwJrTz9cRS", up=("hira_B",)),
    "hra": Method("2405.17484", quantised=NONE),
    "ia3": Method("2205.05638"),
    "lily": Method("2407.09946", "PEFT has no merge for it", up=("lily_B",)),
    "ln_tuning": Method("2312.11420"),
    "loha": Method("2108.06098", quantised=("int8",), up=("hada_w1_a", "hada_w2_a")),
    "lokr": Method("2309.14859", quantised=("int8",), up=("lokr_w1_a", "lokr_w2_a")),
    "lora_dropout": Method("2404.09610", up=("lora_B",)),
    "lors": Method("2403.04303", up=("lora_B", "lora_shared.default.up")),
    "miss": Method("2409.15371"),
    "noah": Method(
        "2206.04673",
        MODULES_STAY,
        places=True,
        kinds=("images",),
        up=("query_up", "value_up", "noah_parts.default.up"),
    ),
    "oft": Method("2306.07280", arguments={"oft_block_size": 0}),
    "osf": Method("2504.07097", quantised=NONE),
    "peanut": Method("2410.01870", quantised=NONE, up=("peanut_B",)),
    "p_tuning": _prompt("2103.10385", num_virtual_tokens=20),
    "p_tuning_v2": _prompt("2110.07602", "prefix_tuning", num_virtual_tokens=20, prefix_projection=False),
    "prefix_tuning": _prompt("2101.00190", num_virtual_tokens=10, prefix_projection=True, encoder_hidden_size=512),
    "prompt_tuning": _prompt("2104.08691", num_virtual_tokens=20),
    "periodic_lora": Method("2402.16141", up=("lora_B",)),
    "psoft": Method("openreview.net, FSHrinMArK", quantised=NONE),
    "pvera": Method("2512.07703", arguments={"save_projection": False}),
    "randlora": Method("2502.00987"),
    "repadapter": Method("2302.08106", places=True, up=("repadapter_block.default.up",)),
    "road": Method("2409.00119"),
    "ssf": Method("2210.08823", places=True),
    "supertuning": Method("2607.09287", quantised=NONE, up=("supertuning_lora_B",)),
    "vpt": Method("2203.12119", VISUAL_PROMPT_STAYS, places=True, kinds=("images",)),
    "vera": Method("2310.11454", arguments={"save_projection": False}),
    "waveft": Method("2505.12532"),
    "houlsby": _bottleneck("1902.00751", places="both", activation="gelu_new"),
    "pfeiffer": _bottleneck("2005.00247", places="feed_forward", activation="relu"),
    "adaptformer": _bottleneck("2205.13535", parallel=True, activation="relu", scale=0.1),
    "parallel_adapter": _bottleneck("2110.04366", parallel=True, activation="relu", scale=4.0),
    "compacter": _bottleneck("2106.04647", places="both", activation="gelu_new", kronecker=4),
    "adapter_fusion": Method("2005.00247", NONLINEAR, places=True),
}

# methods whose layers in PEFT are none for transformers' Conv1D, as which GPT-2 has its linears
LINEAR_ALONE: tuple[str, ...] = (
    "beft", "boft", "c3a", "delora", "hra", "lily", "loha", "lokr", "miss", "oft", "osf", "peanut", "psoft", "road",
    "supertuning",
)  # fmt: skip
# methods that keep, from their injection on, what they compute of the base's values (merge/derived.py)
KEEP_BASE_VALUES = ("delora", "osf", "psoft", "supertuning")

_BASE_VALUES = "it chooses what to train by the values of the base, which a plan without weights does not have"
# methods of PEFT that do not train here -> why
REFUSED: dict[str, str] = {
    **dict.fromkeys(["adamss", "frod", "shira"], _BASE_VALUES),
    "adaption_prompt": "it puts prompts into attention layers of its own, which packed samples do not go through",
    "cartridge": "its prefix is distilled from a long text that the model has read, and a run here learns from samples",
    "cpt": "its prompt is the tokens of chosen examples with a loss of its own, which PEFT's forward pass alone has",
    "multitask_prompt_tuning": "it needs the number of a task with every record, and a run here has one task",
    "poly": "it needs the number of a task with every record, and a run here has one task",
    "shadow": "it replaces the model's own forward pass, and the loss here is computed from hidden states",
    "tinylora": "its trained vectors are shared between layers, and PEFT does not save them by their own names",
    "trainable_tokens": "it trains rows of the embedding by an index that a model without weights does not keep",
    **dict.fromkeys(
        ["unilora", "vblora"], "its layers share one trained tensor, which PEFT saves from a whole model alone"
    ),
    "xlora": "it mixes adapters that were trained before, and runs the model twice a step",
}


_REWRITES = (
    "it changes the base's weights, and what it trains is right on the changed base alone: merged into the original or "
    "served on it, it would be wrong"
)
# starts of PEFT (adapter.peft.init_lora_weights, up to a number of iterations) that are refused -> why
REFUSED_STARTS: dict[str, str] = {
    **dict.fromkeys(["pissa", "olora", "corda", "lora_ga", "loftq"], _REWRITES),
    "mica": "it computes B from the base's values and trains A alone, so B is in no saved adapter",
    "eva": "it is made of activations over the data, which are not computed here, and plain LoRA would be trained",
}
STARTS = (True, False, "gaussian", "orthogonal")  # of LoRA, which leave the base as it is


def check_start(section: AdapterSection) -> None:
    """Check that a start which PEFT computes leaves the base's weights as they are.

    Raises:
        UserError: for one that rewrites them, or that PEFT computes only where it is asked to by another call.
    """
    wanted = section.peft or {}
    if wanted.get("kasa_config") is not None:
        raise UserError(f"adapter.peft.kasa_config does not train here: {_REWRITES}. Take it away.")
    start = wanted.get("init_lora_weights", True)
    refused = refused_start(start)
    known = ", ".join(str(name).lower() for name in STARTS)
    if refused:
        raise UserError(f"adapter.peft.init_lora_weights {start} does not train here: {refused}. There is: {known}.")
    if start not in STARTS:
        raise UserError(f"adapter.peft.init_lora_weights '{start}' is unknown. There is: {known}.")


def refused_start(start: Any) -> str | None:
    """Return why a value of PEFT's `init_lora_weights` is refused, or None."""
    return REFUSED_STARTS.get(start.lower().partition("_niter_")[0]) if isinstance(start, str) else None


def check_method(section: AdapterSection) -> None:
    """Check that a recipe's method trains here.

    Raises:
        UserError: for an unknown method, or a method or a start of it that does not train here, with the reason.
    """
    name = section.method
    if name in REFUSED:
        raise UserError(
            f"adapter.method {name} does not train here: {REFUSED[name]}. `glora-llm methods` lists those that do."
        )
    if name not in METHODS:
        raise UserError(
            f"adapter.method '{name}' is unknown.{nearest(name, METHODS)} There is: {', '.join(sorted(METHODS))}."
        )
    check_start(section)


def check_kind(section: AdapterSection, kind: str) -> None:
    """Check that a method trains models of this kind.

    Raises:
        UserError: naming the kinds that it trains.
    """
    known = METHODS[section.method].kinds
    if kind not in known:
        raise UserError(
            f"adapter.method {section.method} trains {' and '.join(KINDS[name] for name in known)}, and this recipe "
            f"has one of the {KINDS[kind]}. `glora-llm methods` lists those for each."
        )


def check_quantised(section: AdapterSection, quantization: str) -> None:
    """Check that a method can be trained on a base that is quantised so.

    Raises:
        UserError: naming what its base may be.
    """
    known = METHODS[section.method].quantised
    if quantization == "none" or quantization in known:
        return
    others = f" or {', '.join(known)}" if known else ""
    raise UserError(
        f"adapter.method {section.method} does not train on a base in {quantization}: it computes with the numbers of "
        f"the weight, which {quantization} packs. Set model.quantization=none{others}, or take another method "
        "(`glora-llm methods`)."
    )


def check_loraplus(section: AdapterSection, ratio: float) -> None:
    """Check that a ratio of learning rates is given to a method of two factors (LoRA+).

    Raises:
        UserError: naming those that have them.
    """
    if ratio == 1 or section.method == "glora" or section.method not in METHODS or METHODS[section.method].up:
        return
    known = ["glora", *(name for name, method in METHODS.items() if method.up)]
    raise UserError(
        f"training.loraplus_ratio is {ratio:g}: LoRA+ has a second learning rate for the second of two factors, and "
        f"adapter.method {section.method} has none. Set training.loraplus_ratio=1, or take one of {', '.join(known)}."
    )


def unmerged(section: AdapterSection) -> str | None:
    """Return why no adapter of this method can be merged, or None where it can."""
    masks = (section.peft or {}).get("ensemble") if section.method == "lora_dropout" else None
    if masks:
        return (
            f"An ensemble of {masks} masks cannot be merged: the mean of its outputs is no single weight. Merge plain "
            "A and B, which the masks have for their mean: set adapter.peft.ensemble=0."
        )
    if section.method == "noah":
        from glora_llm.adapters.noah_sizes import is_lora_alone  # torch, which a list of methods can do without

        if is_lora_alone(section):
            return None
    reason = METHODS[section.method].unmerged
    return f"An adapter of method {section.method} cannot be merged: {reason}." if reason else None
