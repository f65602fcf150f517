"""Links to nowhere, in the place of files and folders that a recipe names."""

from pathlib import Path

from tests.bad_input.case import Case, Change, bad


def link(name: str) -> Change:
    """Return what makes a link whose target is not there."""

    def change(folder: Path) -> None:
        (folder / name).symlink_to("gone/x")

    return change


NOWHERE = "It is a link to gone/x, which is not there."
LINKS: dict[str, Case] = {
    f"{key} a link to nowhere": bad(NOWHERE, f"{key}={name}", change=link(name))
    for key, name in (
        ("data.source", "own.jsonl"),
        ("data.validation", "own.jsonl"),
        ("model.name_or_path", "base"),
        ("adapter.weights", "start"),
        ("adapter.genome", "genome.json"),
        ("training.deepspeed", "zero.json"),
    )
}
LINKS["--recipe a link to nowhere"] = bad(NOWHERE, change=link("own.yaml"), command=("train", "--recipe", "own.yaml"))
