"""YAML text -> plain values and the line of each, within bounds: depth, number of entries, size of numbers."""

import math
import re
from collections.abc import Callable
from typing import Any

import yaml

from glora_llm.errors import UserError

Location = tuple[str | int, ...]
DEEPEST, MOST_ENTRIES = 64, 100_000  # an anchor counts wherever it is used
LONGEST_SHOWN = 120  # characters of a value in a message
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `3e-4` is a number, `no` and `on` are words, `010` and `1:30` are no numbers."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node, to a depth that Python can follow."""
        self.depth += 1
        if self.depth > DEEPEST:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"it nests deeper than {DEEPEST}", mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


_REPLACED = {_TAG + kind for kind in ("bool", "int", "float", "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag not in _REPLACED]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_NUMBER = r"^[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|Inf)$|^\.nan$"
_SCALARS = {
    "bool": re.compile(r"^(?:true|false)$"),
    "int": re.compile(r"^[-+]?(?:0|[1-9]\d*|0x[0-9a-fA-F]+)$", re.ASCII),
    "float": re.compile(_NUMBER, re.ASCII),
}
for _kind_of_scalar, _first in (("bool", "tf"), ("int", "-+0123456789"), ("float", "-+0123456789.")):
    _Loader.add_implicit_resolver(_TAG + _kind_of_scalar, _SCALARS[_kind_of_scalar], list(_first))


class Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or YAML 1.2 would read as something else."""


Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *_Loader.yaml_implicit_resolvers.get(first, [])]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
}


def parse(text: str, place: Callable[[int], str]) -> tuple[Any, dict[Location, int]]:
    """Return the values of a YAML text, and the line of every key and list entry.

    Args:
        place: a line -> how messages name it.

    Raises:
        UserError: for what `_lines` refuses.
        yaml.YAMLError: when it is no YAML, or nests too deep.
    """
    loader = _Loader(text)
    root = loader.get_single_node()
    lines = _lines(root, place)
    return None if root is None else loader.construct_document(root), lines


def _lines(root: yaml.Node | None, place: Callable[[int], str]) -> dict[Location, int]:
    """Return the line of every key and list entry.

    Raises:
        UserError: for a key that stands twice in one mapping, a tag that is not known or does not fit, a number that
            is not finite or too large, and anchors that hold themselves or repeat too much.
    """
    found: dict[Location, int] = {}
    todo: list[tuple[Location, yaml.Node | None]] = [((), root)]
    while todo:
        at, node = todo.pop()
        if node is not None:
            problem = _fault(node) or (len(at) > DEEPEST and "an anchor holds itself")
            if problem or len(found) > MOST_ENTRIES:
                problem = problem or f"its anchors make more than {MOST_ENTRIES:,} entries"
                raise UserError(f"{place(node.start_mark.line + 1)}: {problem}.")
        inside: list[tuple[Location, yaml.Node, yaml.Node]] = []
        if isinstance(node, yaml.MappingNode):
            inside = [((*at, name.value), name, value) for name, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            inside = [((*at, index), value, value) for index, value in enumerate(node.value)]
        for location, mark, value in inside:
            line = mark.start_mark.line + 1
            if not isinstance(location[-1], str | int) or (mark is not value and mark.tag == f"{_TAG}null"):
                raise UserError(f"{place(line)}: a list, a mapping or nothing stands where a key is expected.")
            if location in found:
                dotted = ".".join(map(str, location))
                raise UserError(f"{place(line)}: '{dotted}' stands on line {found[location]} already.")
            found[location] = line
            todo.append((location, value))
    return found


def _fault(node: yaml.Node) -> str | None:
    """Return what is wrong with the tag or the number of a node, without a closing full stop."""
    tag = node.tag.removeprefix(_TAG)
    if tag not in ("str", "null", "seq", "map", "merge", *_SCALARS):
        named = f"!!{tag}" if tag != node.tag else tag
        return f"the tag {named[:LONGEST_SHOWN]} is not known here; texts, numbers, lists and mappings need none"
    if tag not in _SCALARS:
        return None
    kinds = ("float", "int") if tag == "float" else (tag,)
    if not any(_SCALARS[kind].match(node.value) for kind in kinds):
        return f"'{node.value[:LONGEST_SHOWN]}' is tagged as !!{tag}, and is none"
    if tag == "int" and (len(node.value) > 20 or not -(2**63) <= int(node.value, 0) < 2**63):
        return f"{node.value[:20]}... has {len(node.value)} characters; expected a number below 2^63"
    if tag == "float" and not math.isfinite(float(node.value.replace(".inf", "inf").replace(".nan", "nan"))):
        return f"{node.value[:LONGEST_SHOWN]} is no finite number"
    return None
