"""`training.lr: auto`: one learning rate for a model's width, the same for GLoRA and every method of LoRA's kind.

A step of Adam moves each entry of a factor by about the rate. With `up` of size 1 / sqrt(I) in each entry, an update
`s down up` of rank r then moves a layer's output by up to s r times the rate, as the columns of `down` move together
(`even` has this of every slot). So what a rate does depends on the scale s of the method, and the number is divided by
it:

    rate = BASE_RATE (BASE_WIDTH / width) ^ WIDTH_EXPONENT  x  (REFERENCE_ALPHA / rank ^ RANK_EXPONENT) / s

- RANK_EXPONENT 1: with alpha constant and s = alpha / r the best rate does not depend on the rank; with alpha = 2 r, a
  constant scale, it falls as 1 / r. Measured on SST-2 at ranks 1, 4, 16 and 64: 0.99 of LoRA, 1.00 of even GLoRA
  (docs/benchmarks/frontier.md). Published results agree in part. muA (arXiv 2602.06204) finds two regimes by start and
  scale, one where the best rate "remains roughly invariant across ranks" and one where it "scales inversely with rank";
  "LoRA Without Regret" (Thinking Machines, 2025) finds it about independent of the rank at alpha / r. Columns that do
  not move together would ask for 1 / sqrt(r), which rsLoRA (arXiv 2312.03732) proves for gradients of one size.
- BASE_RATE is of SmolLM2-135M (width 576) at alpha 16: between the best rates of two tasks, 1.5e-3 for 75 steps of
  SST-2 and 4.8e-3 for 75 of Banking77, and good for both (docs/benchmarks/frontier.md). The best rate depends on the
  task and on the number of steps, which no rule here knows; the fit of the next line, of long runs, has 2.6e-3 for this
  width.
- WIDTH_EXPONENT is that of Thinking Machines' published fit for LLaMA: 5e-4 (2000 / width) ^ 0.781 at alpha 32, for
  long runs. It is taken over, not measured here, and no law: their exponent for Qwen is 0.0775. Theory has 1/2 as the
  bound of stability for one rate of both factors (arXiv 2406.08447).

With training.loraplus_ratio the number is that of `down`, and training.lr, which is `up`'s, the number over the ratio.

GLoRA's slots A, C, D, E move outputs as B does with `adapter.scaling: even`; without it, `adapter.lr_factors` does
that, roughly.
"""

from dataclasses import dataclass
from typing import Any

from glora_llm.errors import UserError
from glora_llm.schema import AdapterSection, SupernetSection
from glora_llm.schema.slots import DEFAULT_SLOTS, PRESETS

BASE_RATE = 3.5e-3
BASE_WIDTH = 576
WIDTH_EXPONENT = 0.781
REFERENCE_ALPHA = 16.0
RANK_EXPONENT = 1.0
DIGITS = 3  # of the rate
# arguments of PEFT that give another scale or start, and the value by which they do not
OF_PEFT = {"r": None, "lora_alpha": None, "alpha_pattern": None, "use_rslora": False, "init_lora_weights": True}
COVERED = ("glora", "lora", "rslora", "dora", "lora_dropout", "periodic_lora")  # s down up, down zero at the start


@dataclass(frozen=True)
class AutoRate:
    """The number that stands for `training.lr: auto`.

    Args:
        lr: peak learning rate.
        reason: what it was computed of, in words.
    """

    lr: float
    reason: str


def check_rate(section: AdapterSection) -> None:
    """Check that `training.lr: auto` has a number for a method.

    Raises:
        UserError: for a method that is not covered, naming those that are; for arguments of PEFT by which it has
            another scale or start; for slots without one of B's kind.
    """
    if section.method not in COVERED:
        why = (
            "a model that is trained as a whole wants about a tenth of an adapter's rate, which also depends on how "
            "long it trains"
            if section.is_full
            else "its best rate follows no rule that this trainer knows"
        )
        raise UserError(
            f"training.lr is auto, which is one rate for {', '.join(COVERED)}, and adapter.method is "
            f"{section.method}: {why}. Give a number, or let `glora-llm compare` find it."
        )
    other = [name for name, value in (section.peft or {}).items() if name in OF_PEFT and value != OF_PEFT[name]]
    if other:
        raise UserError(
            f"training.lr is auto, which goes by adapter.rank, adapter.alpha and a zero start, and adapter.peft sets "
            f"{other[0]}. Give a number."
        )
    if section.method == "glora" and section.scaling != "even" and not _has_b(section):
        raise UserError(
            "training.lr is auto, which is the rate of a slot B in mode lora, and these slots have none: their own "
            "scale is another. Set adapter.scaling=even, which brings all slots to B's, or give a number."
        )


def auto_rate(section: AdapterSection, width: int | None, model: str, loraplus_ratio: float = 1.0) -> AutoRate:
    """Return the rate for an adapter on a model.

    Args:
        width: of the model's hidden states; None: it has no single one.
        model: its name, for the message.
        loraplus_ratio: of the rate of `down` to the one that is returned.

    Raises:
        UserError: as `check_rate`, and for a model without a single width.
    """
    check_rate(section)
    if not width:
        raise UserError(
            f"training.lr is auto, which goes by the width of a model's hidden states, and {model} has no single "
            "hidden_size. Give a number."
        )
    of_width = BASE_RATE * (BASE_WIDTH / width) ** WIDTH_EXPONENT
    rank, alpha = _of_b(section)
    stabilized = section.rank_stabilized or section.method == "rslora"
    if section.scaling == "even" and not stabilized:
        scale, said = alpha / rank**RANK_EXPONENT, f"alpha {alpha:g} in even scaling"
    else:
        scale = alpha / (rank**0.5 if stabilized else rank)
        said = f"alpha {alpha:g} and rank {rank}, so a scale of {scale:.3g}"
    if loraplus_ratio != 1:
        said += f"; over training.loraplus_ratio {loraplus_ratio:g}"
    lr = of_width * REFERENCE_ALPHA / rank**RANK_EXPONENT / scale / loraplus_ratio
    lr = float(f"{lr:.{DIGITS}g}")
    return AutoRate(lr, f"{of_width:.3g} for the width {width}; {said}")


def width_of(config: Any) -> int | None:
    """Return the width of a model's hidden states by its configuration; None where it has no single one."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    width = getattr(text, "hidden_size", None)
    return width if isinstance(width, int) else None


def _of_b(section: AdapterSection) -> tuple[int, float]:
    """Return rank and alpha of slot B, which may have its own; those of the adapter elsewhere.

    Of a supernet it is the largest rank, whose scale all share (in even scaling the rank does not matter).
    """
    if section.method == "glora" and section.is_supernet:
        return max((section.supernet or SupernetSection()).ranks), section.alpha
    given: Any = (section.slots or {}).get("B")
    own = given if section.method == "glora" else None
    return getattr(own, "rank", None) or section.rank, getattr(own, "alpha", None) or section.alpha


def _has_b(section: AdapterSection) -> bool:
    """Tell whether some slot B may be a product of two factors: slots of single layers and genomes are trusted."""
    if section.paths is not None or section.genome is not None or section.budget is not None:
        return True
    slots: Any = PRESETS[section.preset] if section.preset else section.slots or DEFAULT_SLOTS
    given = slots.get("B", "none")
    return (given if isinstance(given, str) else getattr(given, "mode", None)) == "lora"
