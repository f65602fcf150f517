"""Check adapter.peft against the configuration class that takes it: PEFT itself checks few values, and late."""

import contextlib
import dataclasses
import typing
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from glora_llm.errors import UserError, nearest

OWNED = {
    "peft_type": "adapter.method",
    "auto_mapping": "adapter.method",
    "base_model_name_or_path": "the model section",
    "genome": "adapter.genome",
    "supernet": "adapter.paths and adapter.supernet",
}
NO_EFFECT = (  # warnings of PEFT about what was given and does nothing
    ".*did not match any targeted module.*",
    ".*no parameter was matched.*",
    ".*no modules were excluded.*",
)


def check_arguments(config_class: Any, given: Mapping[str, Any]) -> None:
    """Check names and kinds of the arguments that a recipe gives to a method of PEFT.

    Args:
        config_class: the method's configuration, a dataclass.
        given: adapter.peft.

    Raises:
        UserError: for an argument that the class has not, that something else owns, or of another kind.
    """
    fields = {item.name for item in dataclasses.fields(config_class)}
    try:
        hints = typing.get_type_hints(config_class)
    except NameError:  # a name that PEFT imports for type checkers alone
        hints = {}
    for name, value in given.items():
        if name not in fields:
            raise UserError(
                f"adapter.peft.{name}: {config_class.__name__} has no such argument.{nearest(name, fields)}"
            )
        if name in OWNED:
            raise UserError(f"adapter.peft.{name} follows from {OWNED[name]}: take it away.")
        if name in hints and not _fits(value, hints[name]):
            expected = getattr(hints[name], "__name__", None) or str(hints[name])
            if typing.get_args(hints[name]):
                expected = str(hints[name]).replace("typing.", "")
            got = f"{value!r} ({type(value).__name__})"
            raise UserError(f"adapter.peft.{name}: got {got}; {config_class.__name__} takes {expected}.")


def _fits(value: Any, hint: Any) -> bool:
    """Tell whether a value is of the kind that a hint says; numbers are numbers, and texts are no truth values."""
    try:
        TypeAdapter(hint, config={"arbitrary_types_allowed": True}).validate_python(
            value, strict=isinstance(value, bool | str)
        )
    except ValidationError as error:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and any(item["type"].startswith(("int", "float")) for item in error.errors())
    except Exception as error:  # noqa: BLE001 - a hint that pydantic has no schema for
        return "pydantic" in type(error).__module__
    return True


@contextlib.contextmanager
def no_effect_is_an_error(given: Mapping[str, Any]) -> Iterator[None]:
    """Turn PEFT's warnings that an argument has no effect into errors, and its exceptions into messages.

    Args:
        given: adapter.peft; where it is empty, exceptions that say nothing to a user are defects and pass.

    Raises:
        UserError: naming what was given.
    """
    try:
        with warnings.catch_warnings():
            for message in NO_EFFECT:
                warnings.filterwarnings("error", message=message)
            yield
    except Warning as warning:
        raise UserError(f"adapter.peft {dict(given)} has no effect: {warning}") from warning
    except (AttributeError, LookupError, ImportError, ArithmeticError, AssertionError, RuntimeError) as error:
        if not given:
            raise
        raise UserError(f"adapter.peft {dict(given)} cannot be used: {type(error).__name__}: {error}.") from error
