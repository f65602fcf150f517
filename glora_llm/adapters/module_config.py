"""Base class of the configurations of this trainer's own PEFT methods (`tuner.ModuleTuner`)."""

from dataclasses import dataclass, field
from typing import ClassVar

from peft import PeftConfig
from peft.utils import PeftType

from glora_llm.errors import AdapterError

ALL = "all-linear"  # of adapter.targets: all places of the method


@dataclass
class ModuleConfig(PeftConfig):
    """The configuration of a method that is put around modules, as `get_peft_model` takes it.

    Args:
        target_modules: names, one regular expression, or `all-linear` or None for all places of the method.
        exclude_modules: names that are left out.
        modules_to_save: modules trained and saved in full.
    """

    own_type: ClassVar[PeftType]
    target_modules: str | list[str] | None = field(default=ALL)
    exclude_modules: str | list[str] | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.own_type
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]


def require_dropout(share: float) -> None:
    """Check a probability of dropout.

    Raises:
        AdapterError: for one outside of [0, 1).
    """
    if not 0 <= share < 1:
        raise AdapterError(f"dropout is {share}; expected at least 0 and less than 1.")
