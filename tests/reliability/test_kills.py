"""SIGKILL at every named place: the same command again ends with the bytes of the run that nobody killed.

The named places are in glora_llm/failpoints.py; each of them is here once at least, and must be passed. A few run with
all other tests, `make test-reliability` runs all of them.
"""

import ast
import json
import re
import shutil
import signal
from pathlib import Path

import pytest

from glora_llm import failpoints
from glora_llm.errors import UserError
from glora_llm.failpoints import POINTS
from tests.reliability.conftest import Note
from tests.reliability.runs import Server, contents, leftovers, logged

ROOT = Path(__file__).parents[2]
TINY = [
    "training.steps=6", "training.warmup=0", "training.global_batch=8", "data.max_rows=64", "data.validation=8",
    "data.max_test_rows=8", "evaluation.every=2", "output.save_every=2", "output.keep=1",
]  # fmt: skip
ADAPTER = ["train", "--recipe", "tiny_cpu", *TINY]
SEARCH = [
    "train",
    "--recipe",
    "tiny_cpu_search",
    *TINY,
    "search.passes=3",
    "search.budget=6k",
    "merge.after_training=false",
]
WHOLE = [
    "train", "--recipe", "dense_lm_tiny", "training.steps=4", "training.warmup=0", "output.save_every=2",
    "output.keep=1", "data.max_rows=40", "data.max_test_rows=4", "evaluation.max_rows=4", "merge.after_training=false",
]  # fmt: skip
SAME = "the same command ends with the same bytes"

# Where a run of an adapter is killed: name and passage. Four folders are written: checkpoints of steps 2, 4 and 6, and
# the final adapter.
FOLDERS = ("before_make", "after_make", "before_sync", "between_syncs", "after_sync", "before_rename", "after_rename",
           "before_clean")  # fmt: skip
KILLED_ADAPTER = [
    *(f"folder.{name}:{count}" for name in FOLDERS for count in (1, 2, 4)),
    *(f"folder.between_syncs:{count}" for count in (8, 12, 24)),
    *(f"file.{name}:{count}" for name in ("before_write", "before_sync", "before_rename", "after_rename")
      for count in (1, 2, 3, 4)),
    *(f"checkpoint.{name}:{count}" for name in ("before_gather", "before_tensors", "after_tensors", "after_adapter",
      "after_trainer", "after_manifest", "after_write", "after_rotation") for count in (1, 2, 3)),
    *(f"rotation.{name}:{count}" for name in ("before_delete", "in_delete", "after_delete") for count in (1, 2)),
    *(f"step.{name}:{count}" for name in ("before", "after_optimizer", "before_optimizer") for count in (1, 4, 6)),
    *(f"step.{name}:{count}" for name in ("before_forward", "before_backward") for count in (1, 4, 11)),
    *(f"step.between_micro_batches:{count}" for count in (1, 3, 6)),
    *(f"{name}:{count}" for name in ("metrics.before_write", "metrics.after_write", "tensorboard.before_write")
      for count in (1, 4)),
    *(f"evaluation.{name}:{count}" for name in ("before_batch", "after") for count in (1, 3, 4)),
    *("result.before", "result.after_weights", "result.after", "result.after_summary"),
]  # fmt: skip
KILLED_CACHE = [f"cache.{name}:{count}" for name in ("before_make", "before_rename") for count in (1, 2)]
KILLED_WHOLE = [
    "model.after_weights", "result.before", "result.after", "folder.before_sync:3", "folder.between_syncs:12",
    "folder.before_rename:3", "folder.after_rename:3", "checkpoint.after_tensors:1", "checkpoint.before_gather:2",
    "step.between_micro_batches:1",
]  # fmt: skip
KILLED_SEARCH = [
    "search.before_scores:1", "search.before_scores:2", "search.before_journal:1", "search.before_journal:5",
    "search.after_journal:1", "search.after_journal:5", "search.before_archive", "search.after_genome",
    "search.after_archive", "evaluation.before_batch:9",
]  # fmt: skip
KILLED_MERGE = [
    "merge.before", "merge.before_shard", "merge.after_shards", "folder.before_sync", "folder.after_sync",
    "folder.before_rename", "folder.after_rename", "folder.before_clean", "merge.before_verify", "merge.before_publish",
    "merge.after_publish",
]  # fmt: skip
KILLED_REPLACING = ["folder.before_set_aside", "folder.after_set_aside", "folder.before_rename"]
QUICK = {
    "folder.before_rename:2", "checkpoint.after_tensors:2", "rotation.in_delete:1", "step.between_micro_batches:3",
    "evaluation.before_batch:3", "result.after_weights", "model.after_weights", "search.after_journal:5",
    "merge.before_verify", "merge.after_publish", "folder.after_set_aside",
}  # fmt: skip


def cases(names: list[str]) -> list[object]:
    """Return the cases of a test: those of QUICK run always, the others with `-m reliability` or without -m."""
    return [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.reliability]) for name in names]


def killed(server: Server, command: list[str], case: str, **environment: str) -> None:
    """Run a command until the failpoint kills it: a place that is not passed fails."""
    code, said = server.run(*command, failpoint=case, **environment)
    assert code == -signal.SIGKILL, f"{case} was not passed: exit code {code}\n{said}"


def killed_once(server: Server, command: list[str], case: str, **environment: str) -> str:
    """Kill a command at a failpoint, run it again to its end, and return what it printed then."""
    killed(server, command, case, **environment)
    code, said = server.run(*command, **environment)
    assert code == 0, said
    return said


def seen(said: str) -> str:
    """Return in a few words how a run went on."""
    resumed = re.search(r"resumed after step (\d+)", said)
    begun = "had ended already" if "had ended already" in said else "began anew"
    return f"killed; {f'went on from step {resumed[1]}' if resumed else begun}; same bytes"


def uninterrupted(server: Server, command: list[str], run: Path) -> Path:
    """Return the folder of a run that nobody kills."""
    code, said = server.run(*command, f"output.dir={run}")
    assert code == 0, said
    return run


@pytest.fixture(scope="module")
def adapter(server: Server, folder: Path) -> Path:
    return uninterrupted(server, ADAPTER, folder / "adapter")


@pytest.fixture(scope="module")
def merged(server: Server, folder: Path, adapter: Path) -> Path:
    run = shutil.copytree(adapter, folder / "merged")
    return uninterrupted(server, [*ADAPTER, "merge.after_training=true"], run)


@pytest.mark.parametrize("case", cases(KILLED_ADAPTER))
def test_a_run(case: str, server: Server, adapter: Path, tmp_path: Path, note: Note) -> None:
    command = [*ADAPTER, f"output.dir={tmp_path / 'run'}"]
    said = killed_once(server, command, case)
    assert contents(tmp_path / "run" / "adapter") == contents(adapter / "adapter")
    assert logged(tmp_path / "run") == logged(adapter), "each step once, with the same numbers"
    assert leftovers(tmp_path / "run") == [] and "Traceback" not in said
    note(f"adapter, {case}", SAME, seen(said))


@pytest.mark.parametrize("case", cases(KILLED_CACHE))
def test_the_cache(case: str, server: Server, adapter: Path, tmp_path: Path, note: Note) -> None:
    """Killed while an embedded model or prepared data are made in an empty cache."""
    command, cache = [*ADAPTER, f"output.dir={tmp_path / 'run'}"], str(tmp_path / "cache")
    said = killed_once(server, command, case, GLORA_CACHE=cache)
    assert (
        contents(tmp_path / "run" / "adapter")["adapter_model.safetensors"]
        == (adapter / "adapter" / "adapter_model.safetensors").read_bytes()
    )
    note(f"cache, {case}", SAME, seen(said))


@pytest.fixture(scope="module")
def whole(server: Server, folder: Path) -> Path:
    return uninterrupted(server, WHOLE, folder / "whole")


@pytest.mark.parametrize("case", cases(KILLED_WHOLE))
def test_a_model_that_is_trained_as_a_whole(case: str, server: Server, whole: Path, tmp_path: Path, note: Note) -> None:
    command = [*WHOLE, f"output.dir={tmp_path / 'run'}"]
    said = killed_once(server, command, case)
    assert contents(tmp_path / "run" / "model") == contents(whole / "model")
    assert logged(tmp_path / "run") == logged(whole) and leftovers(tmp_path / "run") == []
    note(f"whole model, {case}", SAME, seen(said))


@pytest.fixture(scope="module")
def searched(server: Server, folder: Path) -> Path:
    return uninterrupted(server, SEARCH, folder / "searched")


@pytest.mark.parametrize("case", cases(KILLED_SEARCH))
def test_a_search(case: str, server: Server, searched: Path, tmp_path: Path, note: Note) -> None:
    command = [*SEARCH, f"output.dir={tmp_path / 'run'}"]
    said = killed_once(server, command, case)
    for name in ("genome.json", "adapter/adapter_model.safetensors", "search/archive.json"):
        assert (tmp_path / "run" / name).read_bytes() == (searched / name).read_bytes(), name
    assert leftovers(tmp_path / "run") == []
    note(f"search, {case}", "the same genome, archive and adapter", seen(said))


@pytest.mark.parametrize("case", cases(KILLED_MERGE))
def test_a_merge(case: str, server: Server, adapter: Path, merged: Path, tmp_path: Path, note: Note) -> None:
    run = shutil.copytree(adapter, tmp_path / "run")
    command = [*ADAPTER, "merge.after_training=true", f"output.dir={run}"]
    said = killed_once(server, command, case)
    assert contents(run / "merged").keys() == contents(merged / "merged").keys()
    for name in ("model.safetensors", "config.json"):
        assert (run / "merged" / name).read_bytes() == (merged / "merged" / name).read_bytes(), name
    assert scores_of_merged(run) == scores_of_merged(merged) != {}
    assert leftovers(run) == []
    note(f"merge, {case}", SAME, seen(said))


def scores_of_merged(run: Path) -> dict[str, float]:
    """Return the test scores of the merged model in summary.json."""
    found: dict[str, float] = json.loads((run / "summary.json").read_text(encoding="utf-8")).get("test_merged", {})
    return found


@pytest.mark.reliability
def test_a_merge_that_is_to_be_quantised_again(server: Server, tmp_path: Path, note: Note) -> None:
    """Killed when the dense model is there, and its nf4 twin is not: the twin is made by the same command."""
    quantised = [*ADAPTER, "merge.after_training=true", "model.quantization=nf4", "merge.quantize=nf4"]
    command = [*quantised, "merge.min_nf4_top1_agreement=0", f"output.dir={tmp_path / 'run'}"]
    killed(server, command, "merge.after_publish")
    config = tmp_path / "run" / "merged" / "config.json"
    assert "quantization_config" not in json.loads(config.read_text(encoding="utf-8"))
    code, said = server.run(*command)
    assert code == 0, said
    assert "quantization_config" in json.loads(config.read_text(encoding="utf-8"))
    note("merge, nf4 twin", "the same command makes it", "made")


@pytest.mark.parametrize("case", cases(KILLED_REPLACING))
def test_final_weights_that_are_written_anew(
    case: str, server: Server, adapter: Path, tmp_path: Path, note: Note
) -> None:
    """A damaged adapter is written again by the same command, and that is killed too."""
    run = shutil.copytree(adapter, tmp_path / "run")
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    command = [*ADAPTER, f"output.dir={run}"]
    said = killed_once(server, command, case)
    assert contents(run / "adapter") == contents(adapter / "adapter") and leftovers(run) == []
    note(f"damaged adapter, {case}", SAME, seen(said))


def test_every_named_place_is_in_the_code_once_and_killed_at() -> None:
    found: list[str] = []
    for file in (ROOT / "glora_llm").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "reach":
                argument = node.args[0]
                assert isinstance(argument, ast.Constant), f"{file}: a name is written out"
                found.append(str(argument.value))
    assert len(POINTS) >= 30 and sorted(found) == sorted(POINTS)
    matrix = [*KILLED_ADAPTER, *KILLED_CACHE, *KILLED_WHOLE, *KILLED_SEARCH, *KILLED_MERGE, *KILLED_REPLACING]
    assert {case.partition(":")[0] for case in matrix} == set(POINTS)
    assert set(matrix) >= QUICK


@pytest.mark.parametrize("text", ["step.befor", "step.before:0", "step.before:x", "step.before:1:eperm", "a:1:kill:2"])
def test_a_wrong_value_of_the_variable_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, text)
    with pytest.raises(UserError, match="GLORA_FAILPOINT has"):
        failpoints.reach("step.before")


def test_an_error_comes_at_the_passages_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failpoints, "passages", {})
    monkeypatch.setenv(failpoints.VARIABLE, "step.before:2:enospc,step.before:4+:eio")
    outcomes = []
    for _ in range(5):
        try:
            failpoints.reach("step.before")
            outcomes.append(0)
        except OSError as error:
            outcomes.append(error.errno or -1)
    assert outcomes == [0, 28, 0, 5, 5]
