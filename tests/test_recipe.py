"""Recipes: strictness, places in messages, overrides, round trips, and every recipe that is shipped."""

import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from glora_llm import recipe
from glora_llm.errors import UserError
from glora_llm.schema import Recipe

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "recipes").rglob("*.yaml"))
MINIMAL = """\
model:
  name_or_path: embedded:tiny-llama
data:
  format: alpaca
  source: rows.json
  max_tokens: 64
training:
  global_batch: 8
  micro_batch: 2
  steps: 3
  lr: 3e-4
output:
  dir: runs/x
"""

Keys = tuple[str, ...]


def sections(model: type[BaseModel] = Recipe, at: Keys = ()) -> Iterator[tuple[Keys, type[BaseModel]]]:
    """Yield the place of every section of the schema, those inside mappings too."""
    yield at, model
    for name, field in model.model_fields.items():
        for inside, section in models_in(field.annotation):
            yield from sections(section, (*at, name, *inside))


def models_in(annotation: Any) -> Iterator[tuple[Keys, type[BaseModel]]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield (), annotation
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is dict:
        literals = typing.get_args(arguments[0])
        for inside, section in models_in(arguments[1]):
            yield (literals[0] if literals else "q_proj", *inside), section
    else:
        for argument in arguments:
            yield from models_in(argument)


ALL_KEYS = [(at, name) for at, model in sections() for name in model.model_fields]


def misspelt(name: str) -> str:
    middle = len(name) // 2
    return name + name[-1] if len(name) <= 3 else name[:middle] + name[middle + 1 :]


def write(folder: Path, text: str) -> str:
    file = folder / "own.yaml"
    file.write_text(text)
    return str(file)


def failure(name: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        recipe.load(name, overrides)
    return str(caught.value)


def test_the_enumeration_found_the_schema() -> None:
    assert len(ALL_KEYS) > 40
    places = {at for at, _ in ALL_KEYS}
    assert {(), ("training",), ("adapter", "slots", "A"), ("adapter", "paths", "q_proj", "A")} <= places


@pytest.mark.parametrize(("at", "name"), ALL_KEYS, ids=lambda part: part if isinstance(part, str) else ".".join(part))
def test_a_misspelt_key_is_named_with_its_place_and_the_nearest_key(tmp_path: Path, at: Keys, name: str) -> None:
    values = yaml.safe_load(MINIMAL)
    spot = values
    for part in at:
        spot = spot.setdefault(part, {})
    spot[misspelt(name)] = 1
    text = yaml.safe_dump(values, sort_keys=False)
    lines = [number for number, line in enumerate(text.splitlines(), 1) if line.strip() == f"{misspelt(name)}: 1"]
    assert len(lines) == 1

    message = failure(write(tmp_path, text))
    dotted = ".".join((*at, misspelt(name)))
    assert f"own.yaml, line {lines[0]}: unknown key '{dotted}'. Did you mean '{name}'?" in message

    if at:
        message = failure(write(tmp_path, MINIMAL), f"{dotted}=1")
        assert f"command line, {dotted}=1: unknown key '{dotted}'. Did you mean '{name}'?" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.lr=fast", "training.lr: got 'fast' (text), expected a number or 'auto'."),
        ("training.lr=true", "got True (true or false), expected a number or 'auto'."),
        ("training.lr=0", "got 0 (integer), expected greater than 0 or 'auto'."),
        ("training.steps=2.5", "got 2.5 (number), expected an integer."),
        ("training.steps='3'", "got '3' (text), expected an integer."),
        ("training.betas=[0.9]", "'training.betas.1' is required."),
        ("training.betas=0.9", "got 0.9 (number), expected a list."),
        ("model.quantization=nf5", "expected 'none', 'nf4', 'fp4' or 'int8'. Did you mean 'nf4'?"),
        ("model.gradient_checkpointing=yes", "got 'yes' (text), expected true or false."),
        ("output.dir=5", "got 5 (integer), expected text."),
        ("adapter.targets=[q_proj, 3]", "adapter.targets.1: got 3 (integer), expected text."),
        ("adapter.slots.A=loar", "adapter.slots.A: got 'loar' (text), expected 'lora', 'block'"),
        ("adapter.slots.F=lora", "adapter.slots.F: got 'F' (text), expected 'A', 'B', 'C', 'D' or 'E'."),
        ("adapter.slots.A={mode: lora, rank: x}", "adapter.slots.A.rank: got 'x' (text), expected an integer."),
        ("adapter.paths={list_x: {A: nope}}", "adapter.paths.list_x.A: got 'nope'"),
        ("data.validation=1.5", "got 1.5 (number), expected less than 1 or an integer or text."),
        ("trainin.lr=1", "command line, trainin.lr=1: unknown key 'trainin'. Did you mean 'training'?"),
        ("training.global_batch=7", "global_batch 7 is not a multiple of micro_batch 2"),
        ("training.epochs=1", "give exactly one of steps and epochs"),
        ("training.lr", "is not an override: expected section.key=value"),
        ("lr=1", "is not an override: expected section.key=value"),
        ("training=3", "command line, training=3: training: got 3 (integer), expected a section of keys"),
        ("model.name_or_path.x=3", "'name_or_path' holds a value, not a section of keys."),
    ],
)
def test_a_wrong_value_is_one_message(tmp_path: Path, override: str, expected: str) -> None:
    message = failure(write(tmp_path, MINIMAL), override)
    assert expected in message
    assert len(message.splitlines()) == 1


def test_all_errors_are_listed_at_once(tmp_path: Path) -> None:
    message = failure(
        write(tmp_path, MINIMAL.replace("steps: 3", "steps: three").replace("dir: runs/x", "dri: runs/x"))
    )
    assert "own.yaml, line 10: training.steps: got 'three'" in message
    assert "own.yaml, line 13: unknown key 'output.dri'. Did you mean 'dir'?" in message
    assert "own.yaml, line 12: 'output.dir' is required." in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected sections (model, adapter, data, ...), got nothing."),
        ("- a", "got list."),
        ("model: [", "is not valid YAML"),
        (MINIMAL + "model:\n  name_or_path: y\n", "own.yaml, line 14: 'model' stands on line 1 already."),
        (MINIMAL.replace("steps: 3", "lr: 1"), "own.yaml, line 11: 'training.lr' stands on line 10 already."),
        (MINIMAL + "adapter:\n", "adapter: got None (nothing), expected a section of keys."),
    ],
)
def test_a_broken_file(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in failure(write(tmp_path, text))


def test_a_file_that_is_no_text_or_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as text" in failure(str(tmp_path / "own.yaml"))
    assert "No recipe file" in failure(str(tmp_path / "none.yaml"))
    assert "Did you mean 'quickstart'?" in failure("quikstart")


@pytest.mark.parametrize(
    ("text", "value"), [("3e-4", 3e-4), ("1E-4", 1e-4), (".5", 0.5), ("1", 1.0), ("1.5e+2", 150.0), ("2.", 2.0)]
)
def test_numbers_are_those_of_yaml_1_2(tmp_path: Path, text: str, value: float) -> None:
    assert recipe.load(write(tmp_path, MINIMAL), [f"training.lr={text}"]).training.lr == value
    assert recipe.load(write(tmp_path, MINIMAL.replace("3e-4", text))).training.lr == value


@pytest.mark.parametrize("text", ["no", "on", "yes", "010", "1:30", "1_000", "2024-01-01", "nan", "1e5x"])
def test_words_stay_words(tmp_path: Path, text: str) -> None:
    assert recipe.load(write(tmp_path, MINIMAL), [f"output.dir={text}"]).output.dir == text


def test_overrides_win_and_the_last_one_counts(tmp_path: Path) -> None:
    overrides = ["training.steps=5", "training.steps=9", "adapter.slots.A=none", "adapter.targets=[q_proj, v_proj]"]
    loaded = recipe.load(write(tmp_path, MINIMAL), overrides)
    assert loaded.training.steps == 9
    assert loaded.adapter.slots == {"A": "none"}
    assert loaded.adapter.targets == ["q_proj", "v_proj"]


def test_a_whole_section_may_be_given_or_taken_away(tmp_path: Path) -> None:
    file = write(tmp_path, MINIMAL)
    assert recipe.load(file).search is None
    searched = recipe.load(file, ["search={}"])
    assert searched.search is not None and searched.search.strategy == "additive"
    changed = recipe.load(file, ["search={passes: 5}", "search.seed=3"]).search
    assert changed is not None and (changed.passes, changed.seed) == (5, 3)
    assert recipe.load(file, ["search.passes=5", "search=null"]).search is None


def test_a_resolved_recipe_loads_to_itself(tmp_path: Path) -> None:
    overrides = [
        "model.revision='1e10'",
        "data.split='no'",
        "data.system='2024-01-01'",
        "data.labels=['1', 'true', '0x1', '', 'a: b', 'é']",
        "data.validation=0.1",
        "data.test=20",
        "training.eps=1e-12",
        "training.betas=[0.9, 0.95]",
        "adapter.slots={A: {mode: lora, rank: 2}, B: vector}",
        "adapter.paths={'layers\\.0\\..*': {A: none}}",
        "adapter.lr_factors={C: 0.1}",
    ]
    loaded = recipe.load(write(tmp_path, MINIMAL), overrides)
    text = recipe.dump(loaded)
    again = recipe.load(write(tmp_path, text))
    assert again == loaded
    assert recipe.dump(again) == text


def name_of(file: Path) -> str:
    """Return the name of a shipped recipe, with the folder that it is in."""
    return file.relative_to(ROOT / "recipes").with_suffix("").as_posix()


def test_recipes_are_shipped() -> None:
    assert len(SHIPPED) >= 8
    assert {"quickstart", "tiny_cpu", "llama2_glora", "paper/llama_alpaca"} <= {name_of(file) for file in SHIPPED}
    assert {name_of(file) for file in SHIPPED} <= set(recipe.named_recipes())


@pytest.mark.parametrize("file", SHIPPED, ids=name_of)
def test_a_shipped_recipe_loads_and_introduces_itself(file: Path) -> None:
    loaded = recipe.load(str(file))
    assert 20 < len(loaded.description) < 120
    assert loaded.output.dir == f"runs/{name_of(file)}"
    assert (ROOT / "ds_configs" / f"{loaded.training.deepspeed}.json").is_file()
    header = re.match(r"(#.*\n)+", file.read_text())
    assert header, "a recipe begins with its header"
    assert re.search(rf"^# .*deepspeed (--num_gpus 2 )?train\.py --recipe {name_of(file)}$", header[0], re.MULTILINE)
    assert re.search(r"^# Expected: \S", header[0], re.MULTILINE)


@pytest.mark.parametrize("file", SHIPPED, ids=name_of)
def test_the_names_in_a_shipped_recipe_resolve(file: Path) -> None:
    from glora_llm.data.formats import FORMATS
    from glora_llm.models import embedded

    loaded = recipe.load(str(file))
    assert loaded.data.format in (*FORMATS.names(), "images")
    name = loaded.model.name_or_path or ""
    if name.startswith("embedded:"):
        assert name.removeprefix("embedded:") in embedded.names()


@pytest.mark.parametrize("family", ["lm", "lm_tiny"])
def test_language_models_differ_in_vlora_alone(family: str) -> None:
    one, other = (recipe.load(str(ROOT / "recipes" / f"{kind}_{family}.yaml")) for kind in ("vlora", "dense"))
    differing = {name for name in Recipe.model_fields if getattr(one, name) != getattr(other, name)}
    assert differing == {"description", "vlora", "output"} and other.vlora is None
    assert one.output.model_copy(update={"dir": ""}) == other.output.model_copy(update={"dir": ""})


def twins() -> list[tuple[str, str]]:
    """Return the pairs of recipes of which one says `Its twin is NAME`."""
    told = [(file.stem, re.search(r"Its twin is (\w+)", file.read_text())) for file in SHIPPED]
    return sorted({(min(name, found[1]), max(name, found[1])) for name, found in told if found})


def test_there_are_twins() -> None:
    assert {("llama2_glora", "llama2_lora"), ("smollm2_glue", "smollm2_lora_glue")} <= set(twins())
    assert {(f"llama2_glora_{task}", f"llama2_lora_{task}") for task in ("sharegpt", "gsm8k", "commonsense")} <= set(
        twins()
    )
    assert ("smollm2_lora_multiple_choice", "smollm2_multiple_choice") in twins()


@pytest.mark.parametrize(("one", "other"), twins(), ids=lambda name: name)
def test_twins_differ_in_one_section_alone(one: str, other: str) -> None:
    loaded = [recipe.load(str(ROOT / "recipes" / f"{name}.yaml")) for name in (one, other)]
    differing = {name for name in Recipe.model_fields if getattr(loaded[0], name) != getattr(loaded[1], name)}
    texts = [(ROOT / "recipes" / f"{name}.yaml").read_text() for name in (one, other)]
    section = "vlora" if any("only the section vlora differs" in text for text in texts) else "adapter"
    assert differing == {"description", "output", section}
    assert all(twin in text for twin, text in zip((other, one), texts, strict=True)), "each names the other"


def test_dense_and_vlora_differ_in_the_section_vlora_alone() -> None:
    one, other = (recipe.load(str(ROOT / "recipes" / f"vit_cifar10_{kind}.yaml")) for kind in ("vlora", "dense"))
    differing = {name for name in Recipe.model_fields if getattr(one, name) != getattr(other, name)}
    assert differing == {"description", "vlora", "output"}
