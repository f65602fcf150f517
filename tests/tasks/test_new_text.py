"""The tokenizer and the folder that a new language model begins with."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from glora_llm import recipe as recipes
from glora_llm.data.prepare import training_texts
from glora_llm.models.tokenizer import load_tokenizer
from glora_llm.models.train_tokenizer import train_tokenizer
from glora_llm.schema import Recipe
from glora_llm.tasks.new_text import new_text_model
from glora_llm.tasks.text import TextTask, text_task

LINES = [f"the customer {number} asked where card {number * 7} was\n" for number in range(300)]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("GLORA_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "train.txt").write_text("".join(LINES))
    (folder / "validation.txt").write_text("zebras quiz\n" * 50)
    return folder


def new(files: Path, *more: str) -> Recipe:
    held_out = [f"data.validation={files / 'validation.txt'}", "data.test=null"]
    return recipes.load(
        "vlora_lm_tiny", [f"data.source={files / 'train.txt'}", *held_out, "model.tokenizer=train:320", *more]
    )


def test_the_tokenizer_sees_the_training_text_alone(files: Path) -> None:
    _, texts = training_texts(new(files).data, 0)
    assert "".join(texts()) == "".join(LINES)
    tokenizer = load_tokenizer(new_text_model(new(files)).folder)
    assert not any("z" in piece.lower() for piece in tokenizer.get_vocab() if not piece.startswith("<"))


def test_it_is_trained_once_for_each_text_and_size(files: Path, cache: Path) -> None:
    def made() -> int:
        return len([path for path in cache.glob("tokenizer-*") if path.is_dir()])

    new_text_model(new(files))
    before = made()
    for more in ([], ["data.max_tokens=64"], ["training.lr=0.5"], ["training.seed=3"], ["vlora=null"]):
        new_text_model(new(files, *more))
    assert made() == before, "nothing of that changes the text"
    new_text_model(new(files, "model.tokenizer=train:330"))
    new_text_model(new(files, "data.max_rows=1"))
    assert made() == before + 2
    with (files / "train.txt").open("a") as file:
        file.write("one line more\n")
    try:
        new_text_model(new(files))
    finally:
        (files / "train.txt").write_text("".join(LINES))
    assert made() == before + 3


def test_what_was_drawn_by_the_seed_changes_the_text(files: Path) -> None:
    rows = files / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row number {n}"}) + "\n" for n in range(200)))
    drawn = [f"data.source={rows}", "data.validation=20"]
    identities = {training_texts(new(files, *drawn).data, seed)[0] for seed in (0, 1)}
    assert len(identities) == 2
    texts = list(training_texts(new(files, *drawn).data, 0)[1]())
    assert len(texts) == 180


def test_the_configuration_follows_the_tokenizer(files: Path) -> None:
    base = new_text_model(new(files))
    config = AutoConfig.from_pretrained(base.folder)
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (320, 1, 2)
    larger = AutoConfig.from_pretrained(new_text_model(new(files, "model.config.vocab_size=384")).folder)
    assert larger.vocab_size == 384
    assert (base.folder / "vlora.json").is_file() and base.name == "a new llama"
    others = [
        new_text_model(new(files, *more)).fingerprint
        for more in (["training.seed=1"], ["vlora.rank=2"], ["vlora=null"])
    ]
    assert len({base.fingerprint, *others}) == 4


def test_a_folder_and_a_sentencepiece_file_do_too(files: Path, tmp_path: Path, monkeypatch: Any) -> None:
    train_tokenizer(LINES, 300, tmp_path)
    monkeypatch.setenv("GLORA_DATA", str(tmp_path.parent))
    for place in (str(tmp_path), str(tmp_path / "tokenizer.model"), f"{tmp_path.name}{os.sep}tokenizer.model"):
        base = new_text_model(new(files, f"model.tokenizer={place}"))
        assert len(load_tokenizer(base.folder)) == 300


def test_running_text_fills_its_rows(files: Path) -> None:
    """Every training row but the last is exactly max_tokens long; perplexity is that of every held-out token."""
    _, task = text_task(new(files, "data.max_tokens=32"), weights=True)
    assert isinstance(task, TextTask)
    lengths = task.train.lengths()
    assert len(lengths) > 20 and set(lengths[:-1].tolist()) == {32}
    batch = task.training_batch(list(range(8)), 0, 0)
    assert batch["input_ids"].shape == (8, 32)
    assert len(batch["targets"]) == sum(task.targets(task.train, row) for row in range(8))
    assert task.reports["train"].fill > 0.97 and not task.has_answers
    held_out = task.validation
    assert held_out is not None
    assert sum(task.targets(held_out, row) for row in range(len(held_out))) == task.reports["validation"].longest - 1
