"""From settings to token sets: the cache, its damage, its races, and what a run reads."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glora_llm.data import GlobalSampler, TokenSet, collate, prepare
from glora_llm.data.cache import cached, is_complete
from glora_llm.data.prepare import tokenizer_fingerprint
from glora_llm.errors import UserError
from tests.data.conftest import Settings, write_rows

ROOT = Path(__file__).parents[2]


def write_qa(path: Path, n: int = 60) -> str:
    rows = [
        {"text": f"question {i} " + "money " * (i % 9), "label": ("lost_card", "card_arrival")[i % 2]} for i in range(n)
    ]
    return write_rows(path, rows)


@pytest.fixture
def chosen(tmp_path: Path, settings: Settings) -> Any:
    return settings(
        format="classification", source=write_qa(tmp_path / "a.jsonl"), validation=10, test=0.1, max_tokens=128,
        packing=True,
    )  # fmt: skip


def samples(tokens: TokenSet) -> list[tuple[list[int], list[bool]]]:
    found = []
    for i in range(len(tokens)):
        row = tokens.row(i)
        for start, stop in zip(row.starts, [*row.starts[1:], len(row.tokens)], strict=True):
            found.append((row.tokens[start:stop].tolist(), row.targets[start:stop].tolist()))
    return sorted(found)


def learnt(tokens: TokenSet) -> int:
    return sum(sum(targets) for _, targets in samples(tokens))


def test_what_a_run_reads(chosen: Any, llama: Any, tmp_path: Path) -> None:
    data = prepare(chosen, llama, tmp_path / "cache", seed=0)
    assert data.validation is not None and data.test is not None and data.label_sequences is not None
    assert (len(samples(data.train)), len(data.validation), len(data.test)) == (44, 10, 6)
    assert [s.role for s in (data.train, data.validation, data.test)] == ["train", "validation", "test"]
    assert len(data.train) < 44 and data.reports["train"].fill > 0.8
    assert data.train.lengths().sum() == data.reports["train"].tokens
    assert learnt(data.train) == data.reports["train"].target_tokens
    words = {llama.decode(sequence) for sequence in data.label_sequences}
    assert words == {"lost card</s>", "card arrival</s>"}
    for role in (data.train, data.validation, data.test):
        for tokens, targets in samples(role):
            assert tokens[0] == llama.bos_token_id and tokens.count(llama.bos_token_id) == 1
            word = [token for token, is_target in zip(tokens, targets, strict=True) if is_target]
            assert word in data.label_sequences and word[-1] == llama.eos_token_id
    assert len(data.previews) == 3 and all("\\nLabel:«" in p and p.endswith("</s>»") for p in data.previews)
    json.dumps(data.reports["train"].describe())


def test_packing_keeps_every_sample(chosen: Any, plain: Any, tmp_path: Path) -> None:
    packed = prepare(chosen, plain, tmp_path / "cache", seed=0).train
    single = prepare(chosen.model_copy(update={"packing": False}), plain, tmp_path / "cache", seed=0).train
    assert len(single) == len(samples(single)) > len(packed)
    assert samples(packed) == samples(single)
    assert packed.lengths().max() <= 128
    for i in range(len(packed)):
        row = packed.row(i)
        positions = collate([row], 0)["position_ids"][0].numpy()
        assert np.flatnonzero(positions == 0).tolist() == row.starts


def test_rows_out_of_range(chosen: Any, plain: Any, tmp_path: Path) -> None:
    train = prepare(chosen, plain, tmp_path / "cache", seed=0).train
    for i in (-1, len(train)):
        with pytest.raises(IndexError, match="rows 0 to"):
            train.row(i)


def test_the_cache_is_used_again(chosen: Any, plain: Any, tmp_path: Path) -> None:
    first = prepare(chosen, plain, tmp_path / "cache", seed=0)
    times = {f: f.stat().st_mtime_ns for f in first.folder.rglob("*")}
    plain(["a", "b c"], padding=True, truncation=True, max_length=4)  # leaves its mark on the tokenizer's backend
    second = prepare(chosen, plain, tmp_path / "cache", seed=0)
    assert second.folder == first.folder and {f: f.stat().st_mtime_ns for f in second.folder.rglob("*")} == times
    assert (second.reports, second.previews) == (first.reports, first.previews)
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [f".{first.folder.name}.lock", first.folder.name]


def test_whatever_the_tokens_depend_on_makes_another_cache(
    chosen: Any, plain: Any, chatml: Any, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    folders = [
        prepare(chosen, plain, cache, seed=0).folder,
        prepare(chosen, plain, cache, seed=1).folder,
        prepare(chosen, chatml, cache, seed=0).folder,
        prepare(chosen.model_copy(update={"max_tokens": 100}), plain, cache, seed=0).folder,
    ]
    write_qa(tmp_path / "a.jsonl", n=61)
    folders.append(prepare(chosen, plain, cache, seed=0).folder)
    assert len(set(folders)) == 5
    assert tokenizer_fingerprint(plain) != tokenizer_fingerprint(chatml)


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "no manifest", "bad manifest", "empty folder"])
def test_a_damaged_cache_is_made_again(damage: str, chosen: Any, plain: Any, tmp_path: Path) -> None:
    first = prepare(chosen, plain, tmp_path / "cache", seed=0)
    before = samples(first.train)
    tokens, manifest = first.folder / "train" / "tokens.npy", first.folder / "manifest.json"
    content = tokens.read_bytes()
    if damage == "cut":
        tokens.write_bytes(content[:-4])
    elif damage == "flipped":
        tokens.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "bad manifest":
        manifest.write_text("[")
    else:
        doomed = {"missing": [tokens], "no manifest": [manifest]}.get(damage)
        for path in doomed or [p for p in first.folder.rglob("*") if p.is_file()]:
            path.unlink()
    assert not is_complete(first.folder)
    again = prepare(chosen, plain, tmp_path / "cache", seed=0)
    assert samples(again.train) == before and is_complete(again.folder)


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise UserError("bad row")

    with pytest.raises(UserError, match="bad row"):
        cached(tmp_path, "key", build)
    assert [p.name for p in tmp_path.iterdir()] == [".key.lock"]


def test_a_cache_that_cannot_be_written(tmp_path: Path, chosen: Any, plain: Any) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write the cache folder"):
        prepare(chosen, plain, tmp_path / "file" / "cache", seed=0)


def run_twice(code: str, *arguments: str) -> list[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    both = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "ab"
    ]
    results = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    return [out + err for out, err in results]


def test_two_processes_prepare_once(chosen: Any, plain: Any, tmp_path: Path) -> None:
    plain.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "settings.json").write_text(chosen.model_dump_json())
    first, second = run_twice(
        """
        import sys
        from pathlib import Path
        from transformers import PreTrainedTokenizerFast
        from glora_llm.data import prepare
        from glora_llm.schema import DataSection
        here = Path(sys.argv[1])
        settings = DataSection.model_validate_json((here / "settings.json").read_text())
        tokenizer = PreTrainedTokenizerFast.from_pretrained(here / "tokenizer")
        data = prepare(settings, tokenizer, here / "cache", 0)
        stat = (data.folder / "meta.json").stat()
        print(data.folder, stat.st_ino, stat.st_mtime_ns, data.train.lengths().sum())
        """,
        str(tmp_path),
    )
    assert first == second


def test_embedded_data_end_to_end(llama: Any, tmp_path: Path, settings: Settings) -> None:
    """The quickstart's data: real rows, 77 label words, batches of the sampler's order."""
    chosen = settings(
        format="classification", source="embedded:banking77", prompt="Question: {text}\nIntent:", validation=50,
        test="test", max_rows=150, max_test_rows=40, max_tokens=512,
    )  # fmt: skip
    data = prepare(chosen, llama, tmp_path, seed=0)
    assert data.validation is not None and data.test is not None
    assert (len(data.train), len(data.validation), len(data.test)) == (150, 50, 40)
    assert "\\nIntent:«" in data.previews[0]
    sampler = GlobalSampler(len(data.train), 8, seed=0)
    batch = collate([data.train.row(i) for i in sampler.process_rows(0, 0, 2, 2)[1]], pad_id=llama.eos_token_id)
    assert batch["input_ids"].shape[0] == 2 and len(batch["targets"]) > 0


def test_class_names_of_a_parquet_file(plain: Any, tmp_path: Path, settings: Settings) -> None:
    import datasets

    features = datasets.Features(
        {"s": datasets.Value("string"), "y": datasets.ClassLabel(names=["not_equal", "equal"])}
    )
    rows = [{"s": f"text {n}", "y": n % 2} for n in range(8)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "train.parquet"))
    chosen = settings(format="classification", source=str(tmp_path), columns={"text": "s", "label": "y"})
    sequences = prepare(chosen, plain, tmp_path / "cache", seed=0).label_sequences
    assert sorted(plain.decode(s) for s in sequences or []) == [" equal<eos>", " not equal<eos>"]
    renamed = chosen.model_copy(update={"labels": ["no", "yes"]})
    sequences = prepare(renamed, plain, tmp_path / "cache", seed=0).label_sequences
    assert sorted(plain.decode(s) for s in sequences or []) == [" no<eos>", " yes<eos>"]


def test_a_long_text_file_is_split_into_pieces(plain: Any, tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 1000)
    chosen = settings(source=str(tmp_path / "a.txt"), max_tokens=64, overlong="split", validation=1)
    data = prepare(chosen, plain, tmp_path / "cache", seed=0)
    assert data.validation is not None and data.reports["train"].split == 1
    assert data.train.lengths().max() == 64 and learnt(data.train) == data.train.lengths().sum() - len(data.train)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"max_tokens": 4}, "44 of 44 train samples are longer than data.max_tokens=4"),
        ({"source": "./missing.jsonl"}, "There is no file"),
        ({"validation": "validation"}, "no file, and no split either"),
        (
            {"columns": {"label": "labl"}},
            r"the column 'labl' for 'label', and no training row has it.*Did you mean 'label'",
        ),
        ({"labels": ["lost card"]}, "'card_arrival' is not among the labels"),
        ({"format": "chat"}, r"a\.jsonl, line 1: There is no column 'messages'; the columns are: text, label"),
    ],
)
def test_wrong_settings(keys: dict[str, Any], told: str, chosen: Any, plain: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        prepare(chosen.model_copy(update=keys), plain, tmp_path / "cache", seed=0)


def test_importing_is_cheap() -> None:
    code = "import sys, glora_llm.data; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
