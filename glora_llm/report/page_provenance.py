"""The section of a report's page on how a run was made and how to repeat it."""

import shlex
from typing import Any

from glora_llm import recipe as recipes
from glora_llm.report.page_blocks import Code, Facts, Table, machine, number
from glora_llm.report.run_record import RunRecord


def provenance(run: RunRecord) -> list[Any]:
    """Return base model, seed, hardware, versions, commit, commands, launches and recipe."""
    path = run.folder.path
    blocks: list[Any] = []
    last = run.launches[-1] if run.launches else {}
    base = run.base
    facts = [
        ("run folder", str(path)),
        ("base model", base.get("name", "–")),
        ("its revision", base.get("revision") or "–"),
        ("its fingerprint", base.get("fingerprint", "–")),
        ("computed in", base.get("dtype", "–")),
        ("seed", str(run.recipe.training.seed)),
        ("hardware", machine(last["hardware"]) if "hardware" in last else "not recorded"),
        ("processes", number(last.get("processes"))),
        ("versions", ", ".join(f"{key} {value}" for key, value in last.get("versions", {}).items()) or "not recorded"),
        ("commit", last.get("commit") or "not recorded (installed from a wheel, or an older run)"),
    ]
    blocks.append(Facts(facts))
    if last.get("command"):
        blocks.append(Code("The command that it was trained by", last["command"]))
    again = (
        f"glora-llm train --recipe {shlex.quote(str(path / 'recipe.yaml'))} output.dir={shlex.quote(f'{path}-again')}"
    )
    blocks.append(Code("To train it again, from the recipe with every default", again))
    if len(run.launches) > 1:
        rows = [
            [str(place), one.get("started", "–"), number(one.get("from_step")), number(one.get("processes")),
             str(one.get("commit") or "–")[:12]]
            for place, one in enumerate(run.launches, 1)
        ]  # fmt: skip
        head = ["launch", "began to train", "after step", "processes", "commit"]
        blocks.append(Table("Launches: the run was ended or failed, and went on", head, rows))
    blocks.append(Code("Recipe, with every default", recipes.dump(run.recipe), folded=True))
    return blocks
