"""`glora-llm tasks` says of every benchmark what the catalogue says."""

import pytest

from glora_llm.cli import main
from glora_llm.schema.benchmarks import BENCHMARKS


def test_every_benchmark_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks"]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(BENCHMARKS) > 10
    for line, (name, benchmark) in zip(lines, BENCHMARKS.items(), strict=True):
        words = line.split()
        assert words[:3] == [name, benchmark.kind, benchmark.metrics[0]]
        assert benchmark.source in words
        assert str(benchmark.test or "-") in words


@pytest.mark.parametrize("name", BENCHMARKS)
def test_all_of_one(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", name]) == 0
    out = capsys.readouterr().out
    for key, value in BENCHMARKS[name].settings().items():
        assert f"  {key}: {value!r}\n" in out
    assert BENCHMARKS[name].paper in out and BENCHMARKS[name].title in out


def test_an_unknown_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", "sst3"]) == 2
    assert "Did you mean 'sst2'?" in capsys.readouterr().err
