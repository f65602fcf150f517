"""The methods that are compared: each an adapter section, with one number that sets how many parameters it trains."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from glora_llm.adapters.methods import METHODS, REFUSED
from glora_llm.adapters.prompt_arguments import PROMPT_METHODS
from glora_llm.errors import UserError, nearest
from glora_llm.schema import AdapterSection
from glora_llm.schema.slots import Preset

PRESETS = tuple(f"glora:{name}" for name in get_args(Preset))
# structures within a budget, by their predictor; and the default slots in even scaling, at a constant alpha
CHOSEN = tuple(f"glora:{name}" for name in get_args(AdapterSection.model_fields["predictor"].annotation))
EVEN = "glora:even"
ALL = "1000G"  # parameters: a structure at the recipe's rank, where the comparison sets no number
# methods whose number of parameters another argument of PEFT sets than the rank
KNOBS = {
    **dict.fromkeys(["fourierft", "waveft"], "n_frequency"),
    **{"c3a": "block_size", "boft": "boft_block_size", "vpt": "num_tokens"},
    "p_tuning_v2": "num_virtual_tokens",
    **dict.fromkeys(["p_tuning", "prefix_tuning"], "encoder_hidden_size"),  # of the MLP that gives the prompt
}
WITHOUT_KNOB: tuple[str, ...] = ("full", "ia3", "ln_tuning", "beft", "road", "osf", "ssf", "adapter_fusion")
WITHOUT_KNOB += ("glora:bitfit", "glora:ssf", "glora:ia3_like")
WITHOUT_KNOB += ("prompt_tuning",)  # as many parameters as a LoRA's would be a prompt of some thousand tokens
WITHOUT_TARGETS = ("full", *PROMPT_METHODS)
WHOLE = ("full", "osf")  # train whole weights, at a fraction of an adapter's rate
RATES = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)  # of adapters
FULL_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4)  # of a model that is trained as a whole


@dataclass(frozen=True)
class Contender:
    """A method of adapter.method, a preset of GLoRA, or a way to choose GLoRA's structure within the budget.

    Args:
        name: as the user wrote it: `lora`, `glora:hira`, `glora:agreement`, `lora@q_proj+v_proj`.
    """

    name: str

    @property
    def kind(self) -> str:
        """The name without targets."""
        return self.name.partition("@")[0]

    @property
    def targets(self) -> str | list[str] | None:
        """The value of adapter.targets; None: the recipe's."""
        given = self.name.partition("@")[2]
        return given if given == "all-linear" else given.split("+") if given else None

    @property
    def method(self) -> str:
        """The value of adapter.method."""
        return self.kind.partition(":")[0]

    @property
    def knob(self) -> str | None:
        """The setting of the number of parameters: `rank`, `budget` or an argument of PEFT; None: there is none."""
        if self.kind in CHOSEN:
            return "budget"
        return None if self.kind in WITHOUT_KNOB else KNOBS.get(self.method, "rank")

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates that are tried where the user names none."""
        return FULL_RATES if self.method in WHOLE else RATES

    def settings(self, base: AdapterSection, value: int | None) -> dict[str, Any]:
        """Return the adapter section as plain values.

        What the recipe says of targets, dropout and saved modules holds for every method that has none of its own. A
        rank keeps the recipe's alpha / rank, so that the scale of the update does not follow the number of parameters;
        where the recipe's adapter.scaling is even, all methods keep alpha as it is, by which the best rate does not
        depend on the rank.

        Args:
            base: of the recipe.
            value: of the knob; None: what the recipe, or else the method, has.
        """
        own = base.method == self.method
        plain = base.model_dump(mode="json", exclude_none=True)
        kept = {"targets", "rank", "alpha", "modules_to_save"} | ({"dropout"} if base.dropout else set())
        if own and not base.is_supernet and ":" not in self.kind:
            kept = plain.keys() - {"genome", "weights", "supernet", "budget", "predictor", "budget_rows"}
        found = {"method": self.method} | {key: plain[key] for key in kept if key in plain and key != "method"}
        if self.kind in CHOSEN:
            found |= {"predictor": self.kind.partition(":")[2], "budget": ALL}
        elif ":" in self.kind and self.kind != EVEN:
            found["preset"] = self.kind.partition(":")[2]
        if self.kind in (*CHOSEN, EVEN):
            found["scaling"] = "even"
        if self.targets is not None:
            found["targets"] = self.targets
        if value is not None and self.kind in (*CHOSEN, EVEN):
            found[self.knob or "rank"] = value
        elif value is not None and self.knob == "rank":
            found |= {"rank": value, "alpha": base.alpha * (1 if base.scaling == "even" else value / base.rank)}
        elif value is not None:
            found["peft"] = found.get("peft", {}) | {self.knob: value}
        return found


def contenders(text: str) -> list[Contender]:
    """Return the methods of `--methods`, in its order.

    Raises:
        UserError: for an unknown method or preset, for targets that are none, for what is named twice, and for none.
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise UserError("--methods names none; expected some as lora,dora,glora,glora:hira,lora@q_proj+v_proj.")
    found = [Contender(name) for name in names]
    there: dict[tuple[str, frozenset[str]], Contender] = {}
    for one in found:
        _check_name(one.kind)
        other = there.setdefault((one.kind, frozenset(_check_targets(one))), one)
        if other is not one:
            same = "" if other.name == one.name else f", as {other.name} too"
            raise UserError(f"--methods names {one.name} twice{same}.")
    return found


def _check_targets(one: Contender) -> list[str]:
    """Return the modules that a contender names; none where it takes the recipe's.

    Raises:
        UserError: for an empty name, for one that stands there twice, and for a method that has no targets.
    """
    if "@" not in one.name:
        return []
    names = [one.targets] if isinstance(one.targets, str) else one.targets or []
    if not names or not all(name and name == name.strip() and "@" not in name for name in names):
        raise UserError(f"--methods: '{one.name}' names no modules behind the @; expected some as lora@q_proj+v_proj.")
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise UserError(f"--methods: '{one.name}' names {twice} twice.")
    if one.method in WITHOUT_TARGETS:
        raise UserError(f"--methods: '{one.name}': method {one.method} is in no modules of its own: leave @... out.")
    return names


def _check_name(name: str) -> None:
    ours = (*PRESETS, *CHOSEN, EVEN)
    if name.startswith("glora:") and name not in ours:
        raise UserError(f"--methods: '{name}' is unknown.{nearest(name, ours)} There is: {', '.join(ours)}.")
    known: Sequence[str] = [*METHODS, *ours]
    if name not in known and name not in REFUSED:
        raise UserError(
            f"--methods: '{name}' is unknown.{nearest(name, known)} There is: {', '.join(sorted(METHODS))}; "
            f"{', '.join(ours)}."
        )
