"""Each key of each shipped recipe misspelt once and given wrong types; data, model and genome files with odd bytes."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from glora_llm import recipe
from glora_llm.errors import UserError
from tests.bad_input.case import Case, Change, copy_model, file, outcome
from tests.written_records import write_questions

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
# hold names of other packages, of formats, and of test sets
FREE = ("model.config", "adapter.peft", "data.columns", "data.test", "data.revisions")
WRONG: tuple[Any, ...] = ([[1]], {"no": {"such": "key"}}, "\u2603", -(10**15), 2.5e300, True, "")
SEEDS = 6


def leaves(values: dict[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the place of every key, those inside sections too."""
    for name, value in values.items():
        yield (*at, name)
        if isinstance(value, dict) and ".".join((*at, name)) not in FREE:
            yield from leaves(value, (*at, name))


def changed(values: dict[str, Any], at: tuple[str, ...], change: Callable[[dict[str, Any], str], None]) -> str:
    """Return a recipe as YAML, with one key changed."""
    values = json.loads(json.dumps(values))
    spot = values
    for name in at[:-1]:
        spot = spot[name]
    change(spot, at[-1])
    return json.dumps(values, indent=1)  # which is YAML too


def misspell(spot: dict[str, Any], name: str) -> None:
    spot[name[:-1] + "qx"] = spot.pop(name)


def put(wrong: Any) -> Callable[[dict[str, Any], str], None]:
    return lambda spot, name: spot.update({name: wrong})


def told(folder: Path, text: str) -> str | None:
    """Return what is said of a recipe; None where it is taken."""
    (folder / "own.yaml").write_text(text)
    try:
        recipe.load(str(folder / "own.yaml"))
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda path: path.stem)
def test_each_key_misspelt_is_named_with_its_line(shipped: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(shipped.read_text())
    places = [at for at in leaves(values) if at[:2] != ("adapter", "slots") or len(at) < 3]
    assert len(places) > 20
    for at in places:
        said = told(tmp_path, changed(values, at, misspell))
        assert said is not None and f"{at[-1][:-1]}qx" in said and "own.yaml" in said, (at, said)


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda path: path.stem)
def test_no_value_of_a_wrong_type_ends_in_a_traceback(shipped: Path, tmp_path: Path) -> None:
    """A wrong value is refused, or is one that the key may have; at most a few of all may."""
    values = yaml.safe_load(shipped.read_text())
    taken = tried = 0
    for number, at in enumerate(leaves(values)):
        for wrong in (WRONG[number % len(WRONG)], WRONG[(number + 3) % len(WRONG)]):
            tried += 1
            taken += told(tmp_path, changed(values, at, put(wrong))) is None
    assert tried > 40 and taken < tried / 3


def flipped(content: bytes, seed: int) -> bytes:
    """Return bytes with a few of them changed, cut out or doubled."""
    draw, odd = random.Random(seed), bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(odd))
        action = draw.choice(("set", "cut", "double", "quote"))
        if action == "set":
            odd[place] = draw.randrange(256)
        elif action == "cut":
            del odd[place : place + draw.randint(1, 40)]
        elif action == "double":
            odd[place:place] = odd[place : place + draw.randint(1, 40)]
        else:
            odd[place:place] = draw.choice((b'"', b"{", b"[", b"\n", b"\0", b"9" * 50, b"NaN"))
    return bytes(odd)


def damage_records(seed: int) -> Change:
    def change(folder: Path) -> None:
        place = write_questions(folder / "rows.jsonl")
        place.write_bytes(flipped(place.read_bytes(), seed))

    return change


def damage_model(name: str, most: int, seed: int) -> Change:
    def change(folder: Path) -> None:
        place = copy_model(folder) / name
        content = place.read_bytes()
        place.write_bytes(flipped(content[:most], seed) + content[most:])

    return change


def damage_recipe(seed: int) -> Change:
    def change(folder: Path) -> None:
        place = folder / "recipe.yaml"
        place.write_bytes(flipped(place.read_bytes(), seed))

    return change


GENOME = json.dumps({f"model.layers.{n}.self_attn.q_proj": {"B": "vector", "A": "scalar"} for n in range(2)})
ODD: dict[str, Case] = {}
for _seed in range(SEEDS):
    ODD |= {
        f"records {_seed}": Case("", (), damage_records(_seed)),
        f"genome {_seed}": Case("", ("adapter.genome=g.json",), file("g.json", flipped(GENOME.encode(), _seed))),
        f"config.json {_seed}": Case("", ("model.name_or_path=model",), damage_model("config.json", 10**6, _seed)),
        f"header of the weights {_seed}": Case(
            "", ("model.name_or_path=model",), damage_model("model.safetensors", 2000, _seed)
        ),
        f"recipe {_seed}": Case("", (), damage_recipe(_seed)),
    }


@pytest.mark.parametrize("case", ODD.values(), ids=ODD)
def test_a_damaged_file_is_read_or_refused(case: Case, tmp_path: Path) -> None:
    found = outcome(case, tmp_path)
    assert found.code in (0, 2), found.said
    assert found.said.count("error: ") == (found.code == 2)
    assert not found.written
