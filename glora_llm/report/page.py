"""`glora-llm report`: runs and comparisons as one HTML file that needs no network and no script."""

import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from glora_llm import __version__
from glora_llm.atomic import write_text
from glora_llm.errors import UserError
from glora_llm.report.page_blocks import Part
from glora_llm.report.page_compare import COMPARISON, compare_part
from glora_llm.report.page_run import run_part
from glora_llm.report.page_runs import runs_part
from glora_llm.report.page_svg import drawn_for_pages
from glora_llm.report.run_record import RunRecord, read_run

GENERATOR = "glora-llm report"
TEMPLATES = Path(__file__).parent / "templates"
LOOKED_AT = 2000  # bytes of a file that is there already


def write_report(paths: Sequence[Path], out: Path) -> None:
    """Write the report of run folders, and of folders that `glora-llm compare` wrote, as one HTML file.

    Args:
        paths: the folders; several runs are compared with each other first.
        out: the file to write; an earlier report is replaced.

    Raises:
        UserError: when a folder is neither, a file in it is damaged, or `out` cannot be written.
    """
    require_writable(out)
    for path in paths:
        _require_known(path)
    folders = list(dict.fromkeys(path.resolve() for path in paths))
    titles = dict(zip(folders, _titles(folders), strict=True))
    runs = {titles[path]: read_run(given) for path, given in _each_once(paths) if not _is_comparison(path)}
    compared = [given for path, given in _each_once(paths) if _is_comparison(path)]
    with drawn_for_pages(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the reader's browser has others
        parts = [compare_part(folder, f"comparison-{place}", out) for place, folder in enumerate(compared, 1)]
        parts += [runs_part(runs)] if len(runs) > 1 else []
        parts += [run_part(run, title, f"run-{place}") for place, (title, run) in enumerate(runs.items(), 1)]
    try:
        write_text(out, page(parts, _title(parts, runs)))
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}. Give another file by --out.") from error


def page(parts: Sequence[Part], title: str) -> str:
    """Return the HTML of a report."""
    loader = FileSystemLoader(TEMPLATES)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    css = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    environment.globals |= {"generator": f"{GENERATOR} {__version__}", "made": made}
    text = environment.get_template("report.html.j2").render(parts=parts, title=title, css=_as_is(css))
    whole = "\n".join(line for line in text.splitlines() if line.strip()) + "\n"
    return whole.encode("utf-8", "replace").decode()  # JSON and names of files may hold what is no character


def require_writable(out: Path) -> None:
    """Check that a report may be written there: a new name, or an earlier report.

    Raises:
        UserError: otherwise.
    """
    if out.is_dir():
        raise UserError(f"{out} is a folder, and the report is a file: give --out {out / 'report.html'}.")
    if not out.parent.is_dir():
        raise UserError(f"There is no folder {out.parent} to write {out.name} in. Make it, or give another --out.")
    if out.exists() and not out.is_file():
        raise UserError(f"{out} is no plain file: give another one by --out.")
    if out.exists() and GENERATOR.encode() not in out.open("rb").read(LOOKED_AT):
        raise UserError(f"{out} is there already, and is no report: it is not replaced. Give another file by --out.")


def _require_known(path: Path) -> None:
    """Check that a folder is a run's or a comparison's.

    Raises:
        UserError: naming what it lacks, and the runs below it where there are some.
    """
    if (path / "recipe.yaml").is_file() or (path / COMPARISON).is_file():
        return
    if not path.exists():
        raise UserError(f"There is no folder {path}. Give the output.dir of a run, or a folder of `glora-llm compare`.")
    if path.is_file():
        raise UserError(f"{path} is a file. Give the folder of a run (its output.dir), or of `glora-llm compare`.")
    below = sorted(found.parent for found in path.glob("*/recipe.yaml"))
    hint = f" There are runs in it: {' '.join(map(str, below[:6]))}{' ...' if len(below) > 6 else ''}" if below else ""
    raise UserError(
        f"{path} is no run folder: it has no recipe.yaml; nor is it a comparison's: it has no {COMPARISON}. Give the "
        f"output.dir of a training run.{hint}"
    )


def _is_comparison(path: Path) -> bool:
    return (path / COMPARISON).is_file()


def _each_once(paths: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Return (resolved, as given) of every folder, each once."""
    return list({path.resolve(): path for path in reversed(paths)}.items())[::-1]


def _titles(folders: Sequence[Path]) -> list[str]:
    """Return the folders' names, with as many parents as set them apart."""
    for length in range(1, max(len(path.parts) for path in folders) + 1):
        titles = ["/".join(path.parts[-length:]) for path in folders]
        if len(set(titles)) == len(titles):
            return titles
    return [str(path) for path in folders]


def _title(parts: Sequence[Part], runs: dict[str, RunRecord]) -> str:
    if len(parts) == 1:
        return parts[0].title if not runs else f"Run {parts[0].title}"
    return f"{len(runs)} runs" if len(runs) + 1 == len(parts) else "Report"


def _as_is(css: str) -> str:
    from markupsafe import Markup

    return Markup(css)
