"""Write docs/recipe_reference.md, the tables of docs/tasks.md and that of docs/methods.md, or --check them.

The first two come from glora_llm/schema/, the last one from glora_llm/adapters/.
"""

import argparse
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from glora_llm.adapters.formulas import FORMULAS
from glora_llm.adapters.methods import METHODS
from glora_llm.schema import (
    DistillSection,
    FromDenseSection,
    GenerateSection,
    ImagesSection,
    Recipe,
    SlotSetting,
    SupernetSection,
)
from glora_llm.schema.benchmarks import BENCHMARKS
from glora_llm.schema.scores import SCORES
from glora_llm.schema.vlora import VLoRARates

TARGET = Path(__file__).parents[1] / "docs" / "recipe_reference.md"
TASKS, METHODS_PAGE = TARGET.parent / "tasks.md", TARGET.parent / "methods.md"
BEGIN = "<!-- made by `make docs` from glora_llm/{} -->\n"
END = "<!-- end -->"
OPENING = """\
# Recipe reference

Every key of a recipe. Generated from `glora_llm/schema/` by `make docs`; change it there.

A recipe is a YAML file with the sections below. A key that is not listed here is an error, and so is a value of
another type. On the command line, a key is written `section.key=value`, the value as in YAML: `training.lr=1e-4`,
`'adapter.targets=[q_proj, v_proj]'`, `adapter.slots.A=none`. Text that would read as a number or as true or false wants
quotes. `null` is the same as leaving the key out; where a meaning says "none:", it tells what happens then.
`glora-llm recipes NAME` prints a recipe with every default filled in.
"""
LIMITS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
WORDS = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null", Any: "anything"}
PLURAL = {"text": "texts", "anything": "values"}
# Models inside of sections -> their titles.
NESTED: dict[type[BaseModel], str] = {
    SlotSetting: "A slot's setting",
    SupernetSection: "A supernet",
    ImagesSection: "The keys of images",
    GenerateSection: "The keys of generate",
    VLoRARates: "The keys of lr_factors",
    DistillSection: "The keys of distill",
    FromDenseSection: "The keys of from_dense",
}
WITHIN: dict[str, tuple[type[BaseModel], ...]] = {
    "adapter": (SlotSetting, SupernetSection),
    "data": (ImagesSection,),
    "evaluation": (GenerateSection,),
    "vlora": (VLoRARates,),
    "training": (DistillSection,),
    "model": (FromDenseSection,),
}


def main() -> int:
    """Write the reference, or check it; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 when the file is stale; write nothing")
    arguments = parser.parse_args()
    pages = {
        TARGET: reference(),
        TASKS: tasks_page(TASKS.read_text(encoding="utf-8")),
        METHODS_PAGE: methods_page(METHODS_PAGE.read_text(encoding="utf-8")),
    }
    if not arguments.check:
        for file, text in pages.items():
            file.write_text(text, encoding="utf-8")
        return 0
    stale = [file.name for file, text in pages.items() if not file.exists() or file.read_text(encoding="utf-8") != text]
    if stale:
        print(f"{', '.join(stale)} stale: run `make docs`", file=sys.stderr)
    return 1 if stale else 0


def tasks_page(text: str) -> str:
    """Return docs/tasks.md with its tables of benchmarks and scores made anew."""
    benchmarks = [
        "| name | task | what it asks | source | test rows | scores | from |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in BENCHMARKS.items():
        source = f"`{one.source}`" + (f" {one.subset}" if one.subset else "")
        cells = [f"`{name}`", one.kind.replace("_", " "), one.title, source, str(one.test or "none")]
        benchmarks.append("| " + " | ".join([*cells, ", ".join(one.metrics), one.paper]) + " |")
    scores = ["| score | better | meaning |", "|---|---|---|"]
    scores += [f"| `{name}` | {'higher' if one.higher else 'lower'} | {one.meaning} |" for name, one in SCORES.items()]
    for source, table in (("schema/benchmarks.py", benchmarks), ("schema/scores.py", scores)):
        text = _with_table(text, source, table)
    return text


KINDS = {"text": "text", "classification": "heads", "images": "images"}


def methods_page(text: str) -> str:
    """Return docs/methods.md with its table made anew."""
    table = ["| method | what is computed | trained | models | bases | merges | source |", "|" + "---|" * 7]
    for name, method in METHODS.items():
        formula, trained = FORMULAS[name]
        number = re.fullmatch(r"\d{4}\.\d{5}", method.source)
        cells = [
            f"`{name}`",
            f"`{formula}`",
            trained,
            ", ".join(KINDS[kind] for kind in method.kinds),
            ", ".join(method.quantised) or "dense",
            "no" if method.unmerged else "yes",
            f"[{method.source}](https://arxiv.org/abs/{method.source})" if number else method.source,
        ]
        table.append("| " + " | ".join(cells) + " |")
    return _with_table(text, "adapters/", table)


def _with_table(text: str, source: str, table: list[str]) -> str:
    """Return a page with the table made from `source` in the place of the one that it has."""
    before, begin, rest = text.partition(BEGIN.format(source))
    return before + begin + "\n".join(table) + "\n" + END + rest.partition(END)[2]


def reference() -> str:
    """Return the whole page."""
    parts = [OPENING]
    top = [(name, field) for name, field in Recipe.model_fields.items() if not _is_section(field)]
    parts.append("## Top level\n\n" + _table(top))
    for name, field in Recipe.model_fields.items():
        if _is_section(field):
            section = _section(field)
            needed = " Required." if field.is_required() else " May be left out."
            parts.append(f"## {name}\n\n{section.__doc__}{needed}\n\n{_table(section.model_fields.items())}")
            for kind in WITHIN.get(name, ()):
                parts.append(f"### {NESTED[kind]}\n\n{kind.__doc__}\n\n{_table(kind.model_fields.items())}")
    return "\n".join(parts)


def _table(fields: typing.Iterable[tuple[str, FieldInfo]]) -> str:
    rows = ["| key | type | unit | default | meaning |", "|---|---|---|---|---|"]
    for name, field in fields:
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        cells = [f"`{name}`", describe(field.annotation, field.metadata), str(extra.get("unit", ""))]
        cells += [_default(field), field.description or ""]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def describe(kind: Any, metadata: typing.Sequence[Any] = ()) -> str:
    """Return a type in words: `integer > 0 or text or none`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return describe(arguments[0], [*metadata, *_unfolded(arguments[1:])])
    if origin is Literal:
        words = ", ".join(f"`{value}`" for value in arguments)
    elif origin in (typing.Union, types.UnionType):
        words = " or ".join(describe(argument) for argument in arguments)
    elif origin is list:
        words = f"list of {_plural(describe(arguments[0]))}"
    elif origin is tuple:
        words = f"list of {len(arguments)} {_plural(describe(arguments[0]))}"
    elif origin is dict:
        inner = describe(arguments[1])
        words = f"mapping of {_plural(describe(arguments[0]))} to {f'({inner})' if ' ' in inner else inner}"
    elif kind in NESTED:
        words = NESTED[kind][0].lower() + NESTED[kind][1:]
    else:
        words = WORDS[kind]
    limits = [
        f"{sign} {getattr(item, name)}" for item in metadata for name, sign in LIMITS.items() if hasattr(item, name)
    ]
    return words + (f" {' and '.join(limits)}" if limits else "")


def _unfolded(metadata: typing.Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for item in metadata:
        found += item.metadata if isinstance(item, FieldInfo) else [item]
    return found


def _plural(words: str) -> str:
    return PLURAL.get(words, f"{words}s" if words.isalpha() else words)


def _is_section(field: FieldInfo) -> bool:
    kinds = typing.get_args(field.annotation) or (field.annotation,)
    return any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds)


def _section(field: FieldInfo) -> type[BaseModel]:
    """Return the section's class; one that may be null is `SearchSection | None`."""
    kinds = typing.get_args(field.annotation) or (field.annotation,)
    return next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))


def _default(field: FieldInfo) -> str:
    if field.is_required() or field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, tuple):
        return f"`{list(field.default)}`"
    words = {True: "true", False: "false", None: "null"}
    is_word = field.default is None or isinstance(field.default, bool)
    return "`" + (words[field.default] if is_word else str(field.default) or '""') + "`"


if __name__ == "__main__":
    raise SystemExit(main())
