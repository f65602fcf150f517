"""The base of all sections of a recipe. Strict: an unknown key or a value of another type is an error."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(gt=0, lt=1)]
PositiveInt = Annotated[int, Field(gt=0)]
Rank = Annotated[int, Field(gt=0, le=65_536)]


class Section(BaseModel):
    """Base of all sections: no unknown keys, no coercion by looks, read-only once made."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


def key(default: Any, text: str, unit: str = "", **limits: Any) -> Any:
    """Return a field with its meaning and its unit; `...` as default makes it required."""
    return Field(default, description=text, json_schema_extra={"unit": unit} if unit else None, **limits)
