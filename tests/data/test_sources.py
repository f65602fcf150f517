"""Rows from every kind of file, folder and name, and what a wrong one is told."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from glora_llm.data.hub_source import HubSource
from glora_llm.data.readers import read_file
from glora_llm.data.sources import commits_of, locate, locate_held_out, locate_roles, locate_training
from glora_llm.errors import UserError
from tests.data.conftest import Settings, write_rows

ROWS = [{"text": "a, b", "label": "x"}, {"text": "zwei\nLinien ä", "label": "y"}]


def write_csv(path: Path, separator: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["text", "label"], delimiter=separator)
        writer.writeheader()
        writer.writerows(ROWS)


@pytest.mark.parametrize("name", ["a.json", "lines.json", "data.json", "a.jsonl", "a.csv", "a.tsv", "a.parquet"])
def test_every_kind_of_file_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "a.json":
        path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8-sig")
    elif name == "data.json":
        path.write_text(json.dumps({"version": 1, "data": ROWS}))
    elif path.suffix in (".csv", ".tsv"):
        write_csv(path, "," if path.suffix == ".csv" else "\t")
    elif path.suffix == ".parquet":
        import datasets

        datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    else:
        write_rows(path, ROWS)
    assert read_file(path).rows == ROWS


def test_parquet_states_the_names_of_classes(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    datasets.Dataset.from_list([{"text": "a", "label": 1}], features=features).to_parquet(str(tmp_path / "a.parquet"))
    table = read_file(tmp_path / "a.parquet")
    assert (table.rows, table.label_names) == ([{"text": "a", "label": 1}], {"label": ["no", "yes"]})


def test_txt_by_line_and_as_documents(tmp_path: Path) -> None:
    content = "".join(f"line {n} of the text\n" + ("\n" if n % 7 == 0 else "") for n in range(3000))
    path = tmp_path / "a.txt"
    path.write_text(content)
    lines = [row["text"] for row in read_file(path).rows]
    assert lines == [line for line in content.splitlines() if line]
    documents = [row["text"] for row in read_file(path, documents=True).rows]
    assert "".join(documents) == content and len(documents) == 4
    assert all(document.endswith("\n\n") for document in documents[:-1])


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', r"a\.jsonl, line 3: not valid JSON"),
        ("a.jsonl", "[1]\n", "line 1: expected an object"),
        ("a.json", '[{"text": "a"},\n {"text" "b"}]', "line 2, column 10"),
        ("a.json", "[1]", r"a\.json, row 1: expected an object"),
        ("a.json", "3", "expected a list such as .*, got 3"),
        ("a.csv", "text,label\na,b,c\n", "line 2: the header has 2 columns and this row has more"),
        ("a.csv", "text,label\na\n", "line 2: .* fewer"),
        ("a.csv", 'text,label\n"a" b,c\n', "line 2: not valid CSV"),
        ("a.parquet", "nonsense", "not a readable parquet file"),
        ("a.docx", "x", r"ending should be one of \.json"),
        ("nameless", "x", "and is ''"),
    ],
)
def test_broken_files(name: str, content: str, told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=told):
        read_file(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.json", "a.jsonl"])
def test_text_that_is_not_utf8(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b'{"text": "stra\xdfe"}\n')
    with pytest.raises(UserError, match="0xdf"):
        read_file(tmp_path / name)


@pytest.mark.parametrize(("name", "content"), [("a.txt", "\n \n"), ("a.csv", "text\n"), ("a.json", "[]")])
def test_files_without_rows(name: str, content: str, tmp_path: Path, settings: Settings) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="holds no rows"):
        locate_training(settings(source=str(tmp_path / name))).read()


def test_several_files_are_one_data_set(tmp_path: Path, settings: Settings) -> None:
    names = [write_rows(tmp_path / f"{n}.jsonl", [{"text": n}]) for n in "ab"]
    assert locate_training(settings(source=names)).read().rows == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(UserError, match="empty list"):
        locate_training(settings(source=[]))


@pytest.mark.parametrize("held", ["validation", "valid", "dev"])
def test_a_folder_has_splits(held: str, tmp_path: Path, settings: Settings) -> None:
    write_rows(tmp_path / "train.jsonl", [{"text": "a"}])
    write_rows(tmp_path / f"{held}.jsonl", [{"text": "b"}])
    for shard in (0, 1):
        write_rows(tmp_path / f"test-0000{shard}-of-00002.jsonl", [{"text": f"c{shard}"}])
    chosen = settings(source=str(tmp_path))
    assert locate_training(chosen).read().rows == [{"text": "a"}]
    for name in ("validation", "dev"):
        assert locate_held_out(chosen, "validation", name).read().rows == [{"text": "b"}]
    assert locate_held_out(chosen, "test", "test").read().rows == [{"text": "c0"}, {"text": "c1"}]
    with pytest.raises(UserError, match="no file for split 'extra'"):
        locate_held_out(chosen, "test", "extra")
    with pytest.raises(UserError, match="is the one that is trained on"):
        locate_held_out(chosen, "test", "train")
    (tmp_path / "train.csv").write_text("text\na\n")
    with pytest.raises(UserError, match="several files"):
        locate_training(chosen)


def test_a_held_out_file(tmp_path: Path, settings: Settings) -> None:
    chosen = settings(source=write_rows(tmp_path / "a.jsonl", [{"text": "a"}]))
    other = write_rows(tmp_path / "b.jsonl", [{"text": "b"}])
    assert locate_held_out(chosen, "test", other).read().rows == [{"text": "b"}]
    with pytest.raises(UserError, match="is no file, and no split either"):
        locate_held_out(chosen, "test", "test")


def test_relative_paths_are_looked_up_below_glora_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    write_rows(tmp_path / "set" / "train.jsonl", [{"text": "a"}])
    monkeypatch.setenv("GLORA_DATA", str(tmp_path))
    for name in ("set", "set/train.jsonl"):
        assert locate(name, None, "train").read().rows == [{"text": "a"}]
    with pytest.raises(UserError, match=r"There is no file .*Did you mean 'train\.jsonl'") as told:
        locate("set/trian.jsonl", None, "train")
    assert str(tmp_path) in str(told.value)


def test_missing_files_name_the_nearest(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match=r"There is no file .*Did you mean 'train\.jsonl'"):
        locate(str(tmp_path / "trian.jsonl"), None, "train")


def test_the_hub_without_a_network_says_what_to_do(settings: Settings) -> None:
    with pytest.raises(UserError, match=r"'someone/some_set' is no file or folder here.*GLORA_DATA"):
        locate_training(settings(source="someone/some_set")).fingerprint()


def test_what_load_dataset_returns_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder stands in for the hub: the same call of `datasets`, without a network."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "set" / "train.parquet"))
    source = HubSource(str(tmp_path / "set"), None, "train")
    table = source.read()
    assert (table.rows, table.label_names) == (rows, {"label": ["no", "yes"]})
    assert source.fingerprint() == HubSource(str(tmp_path / "set"), None, "train").fingerprint()
    with pytest.raises(UserError, match="split 'tset'"):
        HubSource(str(tmp_path / "set"), None, "tset").fingerprint()


def test_a_data_set_of_the_hub_is_known_by_its_commit(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache of `datasets` as the hub fills it, and no network."""
    import datasets

    cache, commit = tmp_path / "cache", "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    (tmp_path / "some_set").mkdir()
    for split in ("train", "test"):
        datasets.Dataset.from_list([{"text": split}]).to_parquet(str(tmp_path / "some_set" / f"{split}.parquet"))
    made = datasets.load_dataset(str(tmp_path / "some_set"), split="train")
    folder = Path(made.cache_files[0]["filename"]).parent
    assert locate_training(settings(source=str(tmp_path / "some_set"))).fingerprint()
    folder.rename(folder.with_name(commit))
    folder.parents[2].rename(cache / "someone___some_set")
    found = locate_roles(settings(source="someone/some_set", test="test"))
    assert found["test"].read().rows == [{"text": "test"}]
    assert commits_of(found.values()) == {"someone/some_set": commit}
    for revision in (commit, "main"):
        pinned = locate_roles(
            settings(source="someone/some_set", test="test", revisions={"someone/some_set": revision})
        )
        assert [part.revision for one in pinned.values() for part in one.parts] == [revision] * 2  # type: ignore[attr-defined]
        assert commits_of(pinned.values()) == {"someone/some_set": commit}
    other = locate_roles(settings(source="someone/some_set", revisions={"someone/some_set": "f" * 40}))
    with pytest.raises(
        UserError, match="asked for at commit ffffffffffff, and the hub's cache here holds 0123456789ab"
    ):
        commits_of(other.values())


def test_embedded_banking77() -> None:
    train, test = (locate("embedded:banking77", None, split).read() for split in ("train", "test"))
    assert (len(train.rows), len(test.rows)) == (10_003, 3_080)
    assert train.rows[0] == {"text": "I am still waiting on my card?", "label": "card_arrival"}
    names = train.label_names["label"]
    assert len(set(names)) == 77 and {row["label"] for row in [*train.rows, *test.rows]} == set(names)


@pytest.mark.parametrize(
    ("name", "split", "told"),
    [("embedded:bank", "train", "Did you mean 'banking77'"), ("embedded:banking77", "tests", "Did you mean 'test'")],
)
def test_wrong_embedded_names(name: str, split: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        locate(name, None, split)


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    prints: list[Any] = []
    for content in ("a", "b", "a"):
        write_rows(path, [{"text": content}])
        prints.append(locate(str(path), None, "train").fingerprint())
    assert prints[0] == prints[2] != prints[1]


def test_the_embedded_text_is_three_parts_of_one() -> None:
    splits = ("train", "validation", "test")
    parts = [locate("embedded:tinyshakespeare", None, split, documents=True).read() for split in splits]
    texts = ["".join(row["text"] for row in table.rows) for table in parts]
    assert texts[0].startswith("First Citizen:\nBefore we proceed any further") and not parts[0].label_names
    assert all(text.endswith("\n\n") for text in texts)
    assert len(texts[0]) > 250_000 and 10_000 < len(texts[1]) < 20_000 and 10_000 < len(texts[2]) < 20_000
    assert len({text[:200] for text in texts}) == 3
    with pytest.raises(UserError, match="has no split 'dev'; there is: train, validation, test"):
        locate("embedded:tinyshakespeare", None, "dev")
