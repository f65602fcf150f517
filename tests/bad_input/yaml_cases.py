"""YAML and overrides."""

from tests.bad_input.case import RECIPE, Case, Change, bad, file


def recipe(text: str) -> Change:
    return file("recipe.yaml", text)


def instead(old: str, new: str) -> Change:
    assert old in RECIPE
    return recipe(RECIPE.replace(old, new))


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
ODD_TAGS = {
    "!!int abc": "training.steps=!!int abc",
    "!!float abc": "training.lr=!!float abc",
    "!!bool maybe": "data.packing=!!bool maybe",
    "!!timestamp abc": "training.steps=!!timestamp abc",
    "!!binary": "output.dir=!!binary abc",
    "!!set": "training.steps=!!set {1}",
    "!!omap": "adapter.slots=!!omap [A]",
    "!!pairs": "adapter.slots=!!pairs [A]",
    "!!python/name": "output.dir=!!python/name:os.system",
    "!!python/object": 'output.dir=!!python/object/apply:os.system ["touch evil"]',
    "!own": "output.dir=!own x",
}


def odd_tag(name: str) -> str:
    tag = name.split(maxsplit=1)[0]
    return f"is tagged as {tag}, and is none" if tag in ("!!int", "!!float", "!!bool") else f"the tag {tag}"


YAML: dict[str, Case] = {
    **{f"tag {name}": bad(odd_tag(name), text) for name, text in ODD_TAGS.items()},
    **{
        f"tag {name} in the file": bad(odd_tag(name), change=instead("steps: 3", f"steps: {text.partition('=')[2]}"))
        for name, text in ODD_TAGS.items()
        if name != "!!python/name"  # its colon ends a word between braces
    },
    "nested 1,000 deep": bad(
        "recipe.yaml is not valid YAML: it nests deeper than 64",
        change=recipe(RECIPE + "search: " + "[" * 1000 + "]" * 1000),
    ),
    "nested 100,000 deep": bad(
        "recipe.yaml is not valid YAML: it nests deeper than 64",
        change=recipe(RECIPE + "search: " + "[" * 100_000 + "]" * 100_000),
    ),
    "a mapping 1,500 deep": bad(
        "recipe.yaml is not valid YAML: it nests deeper than 64",
        change=recipe(RECIPE + "search: " + "{a: " * 1500 + "1" + "}" * 1500),
    ),
    "nested 1,000 deep in an override": bad(
        "not valid YAML: it nests deeper than 64. Close what is open.", "adapter.slots=" + "[" * 1000 + "]" * 1000
    ),
    "an anchor that holds itself": bad("an anchor holds itself.", change=recipe(RECIPE + "search: &a {budget: [*a]}")),
    "a list that holds itself": bad("an anchor holds itself.", change=recipe(RECIPE + "evaluation: &a [*a]")),
    "an override that holds itself": bad("*a}: an anchor holds itself.", "adapter.slots=&a {A: *a}"),
    "a billion laughs": bad("its anchors make more than 100,000 entries.", change=recipe(RECIPE + LAUGHS)),
    "a billion laughs in a known key": bad(
        "its anchors make more than 100,000 entries.", change=recipe(LAUGHS + RECIPE + "search: {budget: *i}")
    ),
    "an integer of 5,000 digits": bad(
        "99999999999999999999... has 5000 characters; expected a number below",
        change=instead("steps: 3", "steps: " + "9" * 5000),
    ),
    "an integer of 5,000 digits in an override": bad(
        "99999999999999999999... has 5000 characters; expected a number below", "training.steps=" + "9" * 5000
    ),
    "an unclosed list in an override": bad(
        "not valid YAML: expected ',' or ']', but got '<stream end>'. Close", "adapter.targets=[q_proj, v_proj"
    ),
    "an unclosed mapping in an override": bad(
        "lora: not valid YAML: expected ',' or '}', but got '<stream end>'.", "adapter.slots={A: lora"
    ),
    "an unclosed quote in an override": bad(
        "not valid YAML: found unexpected end of stream. Close what is open.", "output.dir='run"
    ),
    "a tab": bad(
        "recipe.yaml is not valid YAML: while scanning for the next token", change=recipe("model:\n\tname_or_path: x\n")
    ),
    "an unknown anchor": bad(
        "not valid YAML: found undefined alias 'nothing'. Close what is open.", "training.steps=*nothing"
    ),
    "a key twice": bad("'output' stands on line 5 already.", change=recipe(RECIPE + "output: {dir: other}\n")),
    "a key twice in a section": bad(
        "'training.steps' stands on line 4 already.", change=instead("steps: 3", "steps: 3, steps: 4")
    ),
    "a key twice in an override": bad(
        "lora, A: vector}: 'A' stands on line 1 already.", "adapter.slots={A: lora, A: vector}"
    ),
    "null as a key": bad(
        "a list, a mapping or nothing stands where a key is expected.", change=recipe(RECIPE + "null: 1\n")
    ),
    "a number as a key": bad("1: got 1 (integer), expected text.", change=recipe(RECIPE + "1: 1\n")),
    "a list as a key": bad(
        "a list, a mapping or nothing stands where a key is expected.", change=recipe(RECIPE + "? [a]\n: 1\n")
    ),
    "two documents": bad(
        "recipe.yaml is not valid YAML: expected a single document in the stream",
        change=recipe(RECIPE + "---\n" + RECIPE),
    ),
    "an empty file": bad("expected sections (model, adapter, data, ...), got nothing.", change=recipe("")),
    "a list": bad("expected sections (model, adapter, data, ...), got list.", change=recipe("[a, b]")),
    "a word": bad("expected sections (model, adapter, data, ...), got text.", change=recipe("tiny_cpu")),
    "binary": bad(
        "recipe.yaml cannot be read as text: 'utf-8' codec can't decode",
        change=file("recipe.yaml", bytes(range(256))),
    ),
    "latin1": bad(
        "recipe.yaml cannot be read as text: 'utf-8' codec can't decode",
        change=file("recipe.yaml", RECIPE.encode() + b"# caf\xe9"),
    ),
    "UTF-16": bad(
        "recipe.yaml cannot be read as text: 'utf-8' codec can't decode",
        change=file("recipe.yaml", RECIPE.encode("utf-16")),
    ),
    "a null byte": bad(
        "recipe.yaml is not valid YAML: unacceptable character #x0000: special",
        change=file("recipe.yaml", RECIPE.encode() + b"# \0"),
    ),
    "a byte order mark": bad("", change=file("recipe.yaml", b"\xef\xbb\xbf" + RECIPE.encode())),
    "CRLF": bad("", change=file("recipe.yaml", RECIPE.replace("\n", "\r\n"))),
    "a section that is a list": bad("training: got [1] (list), expected a section of keys.", "training=[1]"),
    "a section that is a text": bad("training: got 'fast' (text), expected a section of keys.", "training=fast"),
    "a section that is nothing": bad("training: got None (nothing), expected a section of keys.", "training=null"),
    "an override without a section": bad("expected section.key=value, such as training.lr=1e-4.", "lr=1e-4"),
    "an override without a value": bad("training.lr: got None (nothing), expected a number or 'auto'.", "training.lr="),
    "an override with an empty key": bad("expected section.key=value, such as training.lr=1e-4.", "training..lr=1"),
    "an override below a value": bad("'lr' holds a value, not a section of keys.", "training.lr.x=1"),
    "an override below a text": bad("'dir' holds a value, not a section of keys.", "output.dir.x=1"),
    "an unknown section": bad("unknown key 'trainning'. Did you mean 'training'? Known here:", "trainning.lr=1"),
    "an unknown recipe": bad(
        "No recipe 'tiny_cpuu'; there is: bench_search, dense_1b_small,",
        command=("train", "--recipe", "tiny_cpuu", "--dry-run"),
    ),
    "a recipe file that is not there": bad(
        "No recipe file 'mine.yaml' (looked in .).",
        command=("train", "--recipe", "mine.yaml", "--dry-run"),
    ),
    "a recipe file of another ending": bad(
        "'./mine.txt' is a file whose name ends in no .yaml: rename it, so that",
        command=("train", "--recipe", "./mine.txt", "--dry-run"),
        change=file("mine.txt", RECIPE),
    ),
    "a recipe that is a folder": bad(
        "No recipe file 'x.yaml': it is a folder, and a recipe is a file.",
        command=("train", "--recipe", "x.yaml", "--dry-run"),
        change=lambda folder: (folder / "x.yaml").mkdir(),
    ),
}
