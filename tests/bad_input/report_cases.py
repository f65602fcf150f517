"""Reports of what is no run, or is damaged, and where they cannot be written."""

from pathlib import Path

from tests.bad_input.case import Case, both, file
from tests.bad_input.run_cases import run

REPORT = ("report", "run", "--out", "report.html")


def _unwritable(folder: Path) -> None:
    (folder / "report.html").mkdir()


def _below(folder: Path) -> None:
    (folder / "runs").mkdir()
    (folder / "run").rename(folder / "runs" / "run")


def damaged(says: str, name: str, content: str) -> Case:
    """Return the case of a run with one file that is wrong."""
    return Case(says, (), run(file(f"run/{name}", content)), command=REPORT)


REPORTS: dict[str, Case] = {
    "report: nothing there": Case(
        "There is no folder none. Give the output.dir of a run,", (), command=("report", "none")
    ),
    "report: a file": Case("recipe.yaml is a file. Give the folder of a run", (), command=("report", "recipe.yaml")),
    "report: the parent of a run": Case(
        "There are runs in it: runs/run", (), both(run(), _below), command=("report", "runs")
    ),
    "report: --out a folder": Case(
        "report.html is a folder, and the report is a file: give --out",
        (),
        both(run(), _unwritable),
        command=REPORT,
    ),
    "report: --out in a folder that is not there": Case(
        "There is no folder none to write report.html in.",
        (),
        run(),
        command=("report", "run", "--out", "none/report.html"),
    ),
    "report: --out a file of another kind": Case(
        "report.html is there already, and is no report: it is not",
        (),
        both(run(), file("report.html", "my notes")),
        command=REPORT,
    ),
    "report: summary.json cut off": damaged("run/summary.json is not valid JSON:", "summary.json", '{"steps": '),
    "report: recipe.yaml no recipe": damaged("run/recipe.yaml: expected sections", "recipe.yaml", "[]"),
    "report: merge_report.json a list": damaged(
        "run/merged/merge_report.json holds a list;", "merged/merge_report.json", "[]"
    ),
    "report: an evaluation that is cut off": damaged("run/eval/arc.json is not valid JSON:", "eval/arc.json", "{"),
    "report: comparison.json without methods": damaged(
        "run/comparison.json has no list of methods,", "comparison.json", "{}"
    ),
    "report: a genome that is a list": damaged("run/genome.json holds a list;", "genome.json", "[]"),
}
