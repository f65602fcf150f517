"""YAML file + `section.key=value` overrides -> a checked `Recipe`, with errors that name key, file and line."""

import dataclasses
import re
import typing
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from glora_llm.errors import UserError, nearest
from glora_llm.files.links import dangling
from glora_llm.files.yaml_text import Dumper, Location, parse
from glora_llm.schema import Recipe
from glora_llm.schema.section import expand_home

LONGEST_SHOWN = 120  # characters of a value in a message


@dataclasses.dataclass
class Origins:
    """The places where the keys of a recipe were written, for error messages."""

    file: str
    lines: dict[Location, int]
    overrides: dict[Location, str]

    def where(self, location: Location) -> str:
        """Return `FILE, line N` or `command line, KEY=VALUE` for the deepest known part of `location`."""
        if location not in self.lines:
            below = [text for at, text in self.overrides.items() if at[: len(location)] == location]
            if below and location:
                return f"command line, {below[0]}"
        for end in range(len(location), 0, -1):
            if location[:end] in self.overrides:
                return f"command line, {self.overrides[location[:end]]}"
            if location[:end] in self.lines:
                return f"{self.file}, line {self.lines[location[:end]]}"
        return self.file


def recipe_folders() -> list[Path]:
    """Return the folders of named recipes: the working folder's `recipes/`, then the package's own."""
    return [Path("recipes"), Path(str(resources.files("glora_llm"))) / "recipes", Path(__file__).parents[1] / "recipes"]


def named_recipes() -> dict[str, Path]:
    """Return name -> file of all recipes; the working folder's win over the package's.

    Recipes in a folder below are named with it: `paper/llama_alpaca`.
    """
    found: dict[str, Path] = {}
    for folder in recipe_folders():
        for file in sorted([*folder.glob("*.yaml"), *folder.glob("*/*.yaml")]):
            found.setdefault(file.relative_to(folder).with_suffix("").as_posix(), file)
    return found


def find_recipe(name: str) -> Path:
    """Return the file of a recipe given by name or by path.

    Raises:
        UserError: when there is no such recipe; the message lists the known ones.
    """
    try:
        path = Path(expand_home(name))  # a shell leaves the ~ of --recipe=~/mine.yaml
    except ValueError as error:
        raise UserError(f"--recipe {error}") from None
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            why = ": it is a folder, and a recipe is a file" if path.is_dir() else f" (looked in {Path.cwd()})"
            raise UserError(f"No recipe file '{name}'{why}.{dangling(path)}")
        return path
    if path.is_file():
        raise UserError(
            f"'{name}' is a file whose name ends in no .yaml: rename it, so that no name of a recipe is meant."
        )
    known = named_recipes()
    if name not in known:
        raise UserError(f"No recipe '{name}'; there is: {', '.join(sorted(known))}.{nearest(name, known)}")
    return known[name]


def load(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name or path, apply overrides and check it.

    Args:
        name: a recipe's name, or the path of a YAML file.
        overrides: strings `section.key=value`, the value in YAML (`training.lr=1e-4`).

    Raises:
        UserError: for a missing file, broken YAML, an unknown key (with the nearest name) or a wrong value.
    """
    file = find_recipe(name)
    try:
        text = file.read_text(encoding="utf-8-sig")
        values, lines = parse(text, lambda line: f"{file}, line {line}")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as text: {error}. Save it as UTF-8.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected sections (model, adapter, data, ...), got {_kind(values)}.")
    origins = Origins(str(file), lines, {})
    for override in overrides:
        _apply(values, override, origins)
    return validate(values, origins)


def from_values(values: dict[str, Any], overrides: Sequence[str], source: str) -> Recipe:
    """Return a recipe of plain values with overrides; see `load`.

    Args:
        source: what the values come from, for messages.

    Raises:
        UserError: as `load`.
    """
    origins = Origins(source, {}, {})
    for override in overrides:
        _apply(values, override, origins)
    return validate(values, origins)


def validate(values: dict[str, Any], origins: Origins) -> Recipe:
    """Check plain values against the schema; all errors are listed at once, each with its place."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(_explain(error.errors(), values, origins))) from None


def dump(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML from which the run can be started again."""
    values = recipe.model_dump(mode="json", exclude_none=True)
    if recipe.data.benchmark is not None:  # a key that is left out would be filled again
        values["data"] = recipe.data.model_dump(mode="json") | values["data"]
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)


def value_text(value: Any) -> str:
    """Return a plain value as it is written behind `section.key=` on a command line."""
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=10**9)
    return text.removesuffix("\n").removesuffix("\n...")


def flat(recipe: Recipe) -> dict[str, Any]:
    """Return dotted key -> plain value, of the sections that are there; and `task`."""
    values = recipe.model_dump(mode="json", exclude={"description"})
    own = {"task": values.pop("task")}
    return own | {f"{section}.{key}": value for section, keys in values.items() for key, value in (keys or {}).items()}


def _apply(values: dict[str, Any], override: str, origins: Origins) -> None:
    name, equals, text = override.partition("=")
    parts = name.split(".")
    whole = name in Recipe.model_fields  # `search=null` takes a section away
    if not equals or not all(parts) or (len(parts) < 2 and not whole):
        raise UserError(f"'{override}' is not an override: expected section.key=value, such as training.lr=1e-4.")
    place = f"command line, {override[:LONGEST_SHOWN]}"
    try:
        value = parse(text, lambda _: place)[0]
    except yaml.YAMLError as error:
        if text[0] in "[{'\"*&!":  # else a text that only looks like YAML: `Answer: {a}: {b}`
            why = getattr(error, "problem", None) or error
            raise UserError(f"{place}: not valid YAML: {why}. Close what is open.") from None
        value = text
    spot: Any = values
    for part in parts[:-1]:
        spot = spot.setdefault(part, {}) if isinstance(spot, dict) else None
        if spot is None:
            raise UserError(f"'{override}': '{part}' holds a value, not a section of keys.")
    if not isinstance(spot, dict):
        raise UserError(f"'{override}': '{parts[-2]}' holds a value, not a section of keys.")
    spot[parts[-1]] = value
    origins.overrides[tuple(parts)] = override


def _explain(found: Sequence[Any], values: dict[str, Any], origins: Origins) -> list[str]:
    """Return one message for each wrong place, however many branches of a union failed there."""
    places: dict[Location, list[Any]] = {}
    for item in found:
        places.setdefault(_place(item, values), []).append(item)
    deepest = [at for at in places if not any(other[: len(at)] == at for other in places if len(other) > len(at))]
    return [_message(at, places[at], origins) for at in deepest]


def _place(item: Any, values: Any) -> Location:
    """Return the location without the names of union branches, which pydantic writes into it."""
    location: list[str | int] = []
    for index, part in enumerate(item["loc"]):
        missing = item["type"] == "missing" and index == len(item["loc"]) - 1
        if isinstance(values, dict) and part in values:
            values = values[part]
        elif isinstance(values, list) and isinstance(part, int):
            values = values[part] if part < len(values) else None
        elif not missing:
            continue
        location.append(part)
    return tuple(location)


def _message(location: Location, items: Sequence[Any], origins: Origins) -> str:
    dotted = ".".join(str(part) for part in location)
    where, item = origins.where(location), items[0]
    if item["type"] == "extra_forbidden":
        known = _fields_at(location[:-1])
        return f"{where}: unknown key '{dotted}'.{nearest(str(location[-1]), known)} Known here: {', '.join(known)}."
    if item["type"] == "missing":
        return f"{origins.where(location[:-1])}: '{dotted}' is required."
    if item["type"] == "value_error":
        return f"{where}: {dotted}: {item['msg'].removeprefix('Value error, ')}."
    expected = " or ".join(dict.fromkeys(_expected(other["msg"]) for other in items))
    choices = re.findall(r"'([^']*)'", " ".join(str(other.get("ctx", {}).get("expected", "")) for other in items))
    hint = nearest(str(item["input"]), choices)
    shown = repr(item["input"])
    shown = shown if len(shown) <= LONGEST_SHOWN else f"{shown[:LONGEST_SHOWN]}..."
    if isinstance(item["input"], dict) and "text" in expected.split(" or "):
        hint = " Put quotes around a text that holds a colon or braces."
    return f"{where}: {dotted}: got {shown} ({_kind(item['input'])}), expected {expected}.{hint}"


def _expected(message: str) -> str:
    """Return pydantic's `Input should be ...` in a recipe's words."""
    text = re.sub(r"^(Input|Keys) should be ", "", message)
    text = re.sub(r"a valid dictionary or instance of \w+", "a section of keys", text)
    text = re.sub(r"^\w+ should have (at (?:least|most) \d+) items? after validation, not \d+$", r"\1 entries", text)
    words = {"dictionary": "a mapping", "tuple": "a list", "list": "a list", "string": "text", "strings": "text"}
    words |= {"number": "a number", "integer": "an integer", "boolean": "true or false"}
    return re.sub(r"^(?:a valid )?(\w+)$", lambda match: words.get(match[1], match[0]), text)


def _kind(value: Any) -> str:
    kinds = {dict: "mapping", list: "list", str: "text", bool: "true or false", int: "integer", float: "number"}
    return "nothing" if value is None else kinds.get(type(value), type(value).__name__)


def _fields_at(location: Location) -> list[str]:
    """Return the known keys of the section at `location`."""
    model: Any = Recipe
    for part in location:
        model = _model_in(model.model_fields[part].annotation) if part in getattr(model, "model_fields", {}) else model
        if model is None:
            return []
    return list(model.model_fields)


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_model_in(argument) for argument in typing.get_args(annotation))
    return next((model for model in inner if model is not None), None)
