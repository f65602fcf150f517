"""`glora-llm compare`: options, budgets, and the folder of another comparison."""

import json
from collections.abc import Callable
from pathlib import Path

from tests.bad_input.case import Case, file

COMMAND = ("compare", "--recipe", "recipe.yaml")
ROWS = "data.test=4"


def wrong(says: str, *words: str, change: Callable[[Path], object] | None = None, rows: str = ROWS) -> Case:
    """Return a case of compare; what it does not say of methods and budget is right."""
    defaults = {"--methods": "lora,glora", "--budget": "5k", "--out": "out"}
    given = set(words[::2])
    right = [part for option, value in defaults.items() if option not in given for part in (option, value)]
    if "--time" in given and "--budget" not in given:
        right = [part for part in right if part not in ("--budget", "5k")]
    return Case(says, (*right, *words, *([rows] if rows else [])), change, command=COMMAND)


def another_comparison(folder: Path) -> None:
    """Write what a comparison of another recipe leaves."""
    content = {"settings": {"recipe": {}, "budget": "1 s"}, "trials": {}, "speeds": {}, "seconds": {}}
    file("out/comparison.json", json.dumps(content))(folder)


COMPARISONS: dict[str, Case] = {
    "compare with neither budget nor time": Case(
        "one of the arguments --budget --time is required", ("--methods", "lora"), command=COMMAND
    ),
    "compare with both": Case(
        "argument --time: not allowed with argument --budget",
        ("--methods", "lora", "--budget", "5k", "--time", "60"),
        command=COMMAND,
    ),
    "an unknown method": wrong("--methods: 'lorra' is unknown. Did you mean 'lora'?", "--methods", "glora,lorra"),
    "an unknown preset": wrong(
        "--methods: 'glora:hirra' is unknown. Did you mean 'glora:hira'?", "--methods", "glora:hirra"
    ),
    "a method twice": wrong("--methods names lora twice.", "--methods", "lora,dora,lora"),
    "no method": wrong("--methods names none; expected some as lora,dora", "--methods", ","),
    "methods that all do not train": wrong(
        "adaption_prompt cannot run: adapter.method adaption_prompt does not train here", "--methods", "adaption_prompt"
    ),
    "targets that the model has not": wrong(
        "--methods: 'lora@q_prj+v_proj': adapter.targets: 'q_prj' matches no module. Did you mean 'q_proj'? Linears of",
        *("--methods", "glora,lora@q_prj+v_proj"),
    ),
    "targets twice": wrong("--methods: 'lora@q_proj+q_proj' names q_proj twice.", "--methods", "lora@q_proj+q_proj"),
    "a method on the same targets twice": wrong(
        "--methods names lora@v_proj+q_proj twice, as lora@q_proj+v_proj too.",
        *("--methods", "lora@q_proj+v_proj,lora@v_proj+q_proj"),
    ),
    "no targets behind an @": wrong("--methods: 'lora@' names no modules behind the @", "--methods", "glora,lora@"),
    "targets of a model that is trained as a whole": wrong(
        "--methods: 'full@q_proj': method full is in no modules of its own", "--methods", "lora,full@q_proj"
    ),
    "an unknown method with targets": wrong(
        "--methods: 'lorra' is unknown. Did you mean 'lora'?", "--methods", "lorra@q_proj"
    ),
    "a race of one": wrong("--race is between two methods or more, and", "--methods", "lora", "--race"),
    "a race against the time": wrong("--race is about --budget: with --time", "--time", "60", "--race"),
    "a race without a validation before the end": wrong(
        "--race stops methods at validations, and evaluation.every=", "--race", "evaluation.every=100"
    ),
    "no method that rate auto covers": wrong(
        "ia3 cannot run: training.lr is auto, which is one rate for", "--methods", "ia3,vera", "--rates", "auto"
    ),
    "a race of methods that rate auto does not cover": wrong(
        "vera cannot run: training.lr is auto", "--methods", "ia3,vera", "--rates", "auto", "--race"
    ),
    "rates, one of them auto": wrong("--rates: 'auto' is no learning rate; expected some as", "--rates", "1e-3,auto"),
    "rates of text": wrong("--rates: 'fast' is no learning rate; expected some as", "--rates", "1e-3,fast"),
    "a rate of 0": wrong("--rates: '0' is no learning rate", "--rates", "0"),
    "a rate twice": wrong("--rates names 0.001 twice.", "--rates", "1e-3,0.001"),
    "zero seeds": wrong("--seeds is '0'; expected a number from 1 to 1000.", "--seeds", "0"),
    "seeds of text": wrong("--seeds is 'three'; expected a number from 1", "--seeds", "three"),
    "a budget of text": wrong("--budget 'small' is no limit; expected something like 0.5M", "--budget", "small"),
    "a budget of 0": wrong("--budget is '0'; expected a number of parameters above 0", "--budget", "0"),
    "a budget below every rank": wrong(
        "--budget 100 is met within 25% by no value of lora, glora. Nearest: lora", "--budget", "100"
    ),
    "a budget above every rank": wrong("--budget 900,000,000 is met within 25% by no value", "--budget", "900M"),
    "a time of text": wrong("--time is 'soon'; expected seconds of training above 0", "--time", "soon"),
    "an unknown score": wrong("'acuracy' is no score. Did you mean 'accuracy'?", "--score", "acuracy"),
    "1000 jobs": wrong("--jobs is 1000; expected 1 to ", "--jobs", "1000"),
    "a text that is not there": wrong("none.txt", "--forgetting", "none.txt"),
    "compare without test rows": wrong("compare judges by test rows, and the recipe has none: set data.test", rows=""),
    "compare without validation rows": wrong(
        "compare chooses learning rates by validation rows, and the recipe has none", "data.validation=null"
    ),
    "a folder that holds something else": wrong(
        "--out out holds no comparison, and is not empty: thesis.txt", change=file("out/thesis.txt", "text")
    ),
    "a file in the place of the folder": wrong("--out out is a file, and a folder is", change=file("out", "text")),
    "a comparison.json that is cut off": wrong(
        "out/comparison.json", change=file("out/comparison.json", '{"settings": {')
    ),
    "a folder of another comparison": wrong(
        "out holds another comparison: the recipe, or an override of it", change=another_comparison
    ),
}
