"""Small tokenizers of three families, trained here on a few sentences, small images, and ways to write rows."""

import io
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from glora_llm.data.images import PreparedImages, prepare_images
from glora_llm.data.sample import Sample
from glora_llm.schema import DataSection

os.environ["HF_HUB_OFFLINE"] = "1"

SENTENCES = [
    "Question: what is my card balance?\nLabel: card arrival",
    "Question: who took my money?\nLabel: lost card",
    "Below is an instruction that describes a task. ### Instruction: add 2 and 3 ### Response: 5",
    "User: hello there\nAssistant: hello, how are you?",
    "The quick brown fox jumps over the lazy dog. A long text has many words.",
] * 4

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Settings = Callable[..., DataSection]
Prepare = Callable[..., PreparedImages]
CLASSES = ["cat", "dog", "owl"]


def byte_level(specials: list[str], trim_offsets: bool = True) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def bpe_tokenizer(trim_offsets: bool) -> Any:
    """GPT-2 style: no BOS of its own, padding and end are one token."""
    from transformers import PreTrainedTokenizerFast

    backend = byte_level(["<eos>", "<bos>"], trim_offsets)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="session", params=[True, False], ids=["trimmed", "untrimmed"])
def bpe(request: pytest.FixtureRequest) -> Any:
    return bpe_tokenizer(request.param)


@pytest.fixture(scope="session")
def plain() -> Any:
    return bpe_tokenizer(trim_offsets=True)


@pytest.fixture(scope="session")
def chatml() -> Any:
    """ChatML: turns end with <|im_end|>, which is not the end token."""
    from transformers import PreTrainedTokenizerFast

    backend = byte_level(["<eos>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        pad_token="<eos>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHATML,
    )


@pytest.fixture(scope="session")
def llama() -> Any:
    """LLaMA's sentencepiece class: spaces as part of the next word, byte fallback, <s> that is not added by itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaTokenizer

    raw = Tokenizer(models.BPE(byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    raw.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=500, special_tokens=specials, show_progress=False)
    )
    model = json.loads(raw.to_str())["model"]
    return LlamaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])


@pytest.fixture(scope="session")
def adds_bos() -> Any:
    """LLaMA 3 style: the tokenizer itself puts <bos> in front."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    backend = byte_level(["<eos>", "<bos>"])
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")


@pytest.fixture
def settings() -> Settings:
    """Return a function that makes a data section from a few keys."""

    def make(**keys: Any) -> DataSection:
        return DataSection(**{"format": "text", "source": "unused.jsonl", "max_tokens": 512, **keys})

    return make


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def learnt(sample: Sample, tokenizer: Any) -> str:
    """Return exactly the target tokens as text."""
    return str(tokenizer.decode(sample.tokens[sample.targets].tolist(), clean_up_tokenization_spaces=False))


def picture(number: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    random = np.random.default_rng(number)
    return Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encoded(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def image_rows(count: int = 30, first: int = 0) -> list[dict[str, Any]]:
    """Row n holds picture n, of class n modulo 3."""
    return [{"img": {"bytes": encoded(picture(first + n)), "path": None}, "label": n % 3} for n in range(count)]


def write_parquet(path: Path, content: list[dict[str, Any]], features: Any = None) -> str:
    import datasets

    path.parent.mkdir(exist_ok=True, parents=True)
    datasets.Dataset.from_list(content, features=features).to_parquet(str(path))
    return str(path)


def hub_features() -> Any:
    import datasets

    return datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})


def write_folder(folder: Path, count: int = 30, first: int = 0) -> str:
    for n in range(count):
        place = folder / CLASSES[n % 3]
        place.mkdir(exist_ok=True, parents=True)
        picture(first + n).save(place / f"{n:03d}.png")
    return str(folder)


@pytest.fixture
def prepared(tmp_path: Path) -> Prepare:
    def make(source: str | list[str], cache: str = "cache", seed: int = 0, **keys: Any) -> PreparedImages:
        settings = DataSection(**{"format": "images", "source": source, **keys})
        return prepare_images(settings, tmp_path / cache, seed)

    return make
