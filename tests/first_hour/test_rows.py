"""Rows of a user's own file, as the command shows and refuses them."""

import json
from pathlib import Path

import pytest

from glora_llm.cli import main
from tests.slow_imports import run_probed


def command(source: Path | str, out: Path, *more: str) -> list[str]:
    return [
        "train", "--recipe", "tiny_cpu", "--dry-run", f"data.source={source}", "data.format=chat", "data.prompt=null",
        "data.chat_template=none", "data.validation=4", "data.test=null", "data.max_rows=null",
        "data.max_test_rows=null", "data.max_tokens=512", f"output.dir={out}", *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (["data.source=nowhere.jsonl"], "error: There is no file nowhere.jsonl. Did you mean 'chats.jsonl'?"),
        (["data.source=chats.xlsx"], "error: There is no file chats.xlsx."),
        (["data.format=chta"], "Did you mean 'chat'?"),
        (["data.columns={messages: mesages}"], "no training row has it; the columns are: messages. Did you mean"),
    ],
)
def test_a_no_comes_before_slow_imports(keys: list[str], told: str, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("".join(turns(f"answer {n}") + "\n" for n in range(20)))
    done, loaded, _ = run_probed(*command("chats.jsonl", tmp_path / "run", *keys), cwd=tmp_path)
    assert done.returncode == 2 and told in done.stderr and loaded <= {"numpy"}


def turns(answer: str | None) -> str:
    return json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]})


def test_odd_rows_are_listed_or_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "chats.jsonl"
    lines = [turns(f"answer {n} \x1b[1m" + "of many words " * 8) for n in range(20)]
    lines[4:4] = [turns(None), '{"messages": [']
    file.write_text("\n".join(lines) + "\n")
    assert main(command(file, tmp_path / "run")) == 2
    said = capsys.readouterr()
    assert "error: 2 of 22 train records cannot be used:" in said.err and "data.bad_rows=skip" in said.err
    assert "chats.jsonl, line 5: The content of a turn should be text" in said.err
    assert "chats.jsonl, line 6: not valid JSON" in said.err and "model  " not in said.out
    assert main(command(file, tmp_path / "run", "data.bad_rows=skip")) == 2
    assert "more than data.max_bad_rows=0.01 of them" in capsys.readouterr().err
    assert main(command(file, tmp_path / "run", "data.bad_rows=skip", "data.max_bad_rows=0.1")) == 0
    out = capsys.readouterr().out
    assert "data       train: 18 rows read; 2 bad ones left out; 16 samples" in out
    assert "left out: 1 x not valid JSON; the first: " in out and "chats.jsonl, line 6: not valid JSON" in out
    samples = [line for line in out.splitlines() if line.startswith("sample ")]
    assert len(samples) == 3 and all("Assistant:« answer" in line and "\\x1b[1m" in line for line in samples)
    assert not (tmp_path / "run").exists()
