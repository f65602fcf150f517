"""The base of all sections of a recipe. Strict: an unknown key or a value of another type is an error."""

import os.path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Share = Annotated[float, Field(gt=0, lt=1)]
PositiveInt = Annotated[int, Field(gt=0)]
Rank = Annotated[int, Field(gt=0, le=65_536)]


def expand_home(path: str) -> str:
    """Return a path with ~ or ~USER at its beginning replaced by that home folder, as a shell does.

    Raises:
        ValueError: when there is no such user.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"'{path}': no user has that name, so ~ has no home folder. Write the whole path, or ./{path}")
    return expanded


LocalPath = Annotated[str, AfterValidator(expand_home)]


class Section(BaseModel):
    """Base of all sections: no unknown keys, no coercion by looks, read-only once made."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


def key(default: Any, text: str, unit: str = "", **limits: Any) -> Any:
    """Return a field with its meaning and its unit; `...` as default makes it required."""
    return Field(default, description=text, json_schema_extra={"unit": unit} if unit else None, **limits)
