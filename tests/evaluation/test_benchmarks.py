"""Scores of lm-eval's tasks: what is written, and what a wrong question gets."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from glora_llm.cli import main
from glora_llm.evaluation.benchmarks import scores
from glora_llm.evaluation.lm_model import parts
from tests.in_process import alone, one_thread

__all__ = ["alone", "one_thread"]
ROOT = Path(__file__).parents[2]
MODEL = "embedded:tiny-llama"
EXAMPLE = ("--task-folder", "examples/lm_eval", "--tasks", "capitals")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example names its file from there."""
    monkeypatch.chdir(ROOT)


def test_the_example_is_scored_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "capitals.json"
    command = ["evaluate", MODEL, *EXAMPLE, "--few-shot", "2", "--limit", "9", "--seed", "7", "--out", str(out)]
    assert main(command) == 0
    values = json.loads(out.read_text())
    found = values["tasks"]["capitals"]
    assert set(found) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    share = found["acc"]
    assert share * 9 == pytest.approx(round(share * 9)) and found["acc_stderr"] == pytest.approx(
        (share * (1 - share) / 8) ** 0.5
    )
    assert values["num_fewshot"] == {"capitals": 2} and values["questions"] == {"capitals": 9}
    assert (values["limit"], values["seed"], values["model"]) == (9, "7,7,7,7", MODEL)
    assert {"lm_eval", "torch", "transformers", "glora_llm"} <= set(values["versions"])
    assert f"{share:.4f}" in capsys.readouterr().out
    again = tmp_path / "again.json"
    assert main([*command[:-1], str(again)]) == 0
    assert json.loads(again.read_text())["tasks"] == values["tasks"]


def test_names_of_scores() -> None:
    """As lm-eval 0.4 names them; what is no number (an alias, a standard error that is not known) is left out."""
    given = {
        "alias": "gsm8k",
        "exact_match,strict-match": 0.5,
        "exact_match_stderr,strict-match": 0.1,
        "acc,none": 1,
        "acc_stderr,none": "N/A",
    }
    assert scores(given) == {"exact_match,strict-match": 0.5, "exact_match,strict-match_stderr": 0.1, "acc": 1.0}


def test_the_options_of_a_question_stay_on_one_process() -> None:
    """Every request is answered once, and processes differ by one question at most."""
    requests = [SimpleNamespace(task_name="t", doc_id=doc) for doc in range(5) for _ in range(3)]
    divided = parts(requests, 2)
    assert sorted(divided[0] + divided[1]) == list(range(15))
    assert [sorted({requests[index].doc_id for index in part}) for part in divided] == [[0, 2, 4], [1, 3]]


Write = Callable[[str], Path]


@pytest.fixture
def folder(tmp_path: Path) -> Write:
    """Return what writes a folder of one YAML task called mine."""

    def write(text: str) -> Path:
        (tmp_path / "tasks").mkdir()
        (tmp_path / "tasks" / "mine.yaml").write_text(f"task: mine\n{text}")
        return tmp_path / "tasks"

    return write


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dataset_path: nobody/has-this\ntest_split: test\noutput_type: multiple_choice\n", "needs the network once"),
        (
            "dataset_path: json\ndataset_kwargs: {data_files: {test: absent.jsonl}}\ntest_split: test\n",
            "its data cannot be read",
        ),
        (
            "dataset_path: json\ndataset_kwargs: {data_files: {test: examples/lm_eval/capitals.jsonl}}\n"
            "test_split: test\ndoc_to_text: a\ndoc_to_target: b\nunsafe_code: true\n",
            "runs code that the model writes",
        ),
        (
            "dataset_path: json\ndataset_kwargs: {data_files: {test: examples/lm_eval/capitals.jsonl}}\n"
            "test_split: test\noutput_type: guessing\n",
            "lm-eval cannot make this task",
        ),
    ],
    ids=["no network", "no file", "runs code", "no such kind"],
)
def test_a_task_that_cannot_be_asked(text: str, says: str, folder: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", MODEL, "--task-folder", str(folder(text)), "--tasks", "mine"]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("error: ") == 1 and "Traceback" not in said


def test_lm_eval_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as Python has it for what cannot be imported
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    assert main(["evaluate", MODEL, *EXAMPLE]) == 2
    assert "not installed" in (said := capsys.readouterr().err) and "pip install 'glora-llm[eval]'" in said


@pytest.mark.slow  # lm-eval reads the names of 15,000 tasks
def test_an_unknown_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", MODEL, "--tasks", "arc_chalenge"]) == 2
    assert "'arc_chalenge' is no task of those that lm-eval ships. Did you mean 'arc_challenge'?" in (
        capsys.readouterr().err
    )
