import io
import json
from pathlib import Path

import pytest
import sentencepiece

from glora_llm.errors import UserError
from glora_llm.models.resolve import ResolvedModel
from glora_llm.models.tokenizer import load_tokenizer, pad_id

TEXTS = ["Hello  world", "a\n\n  indented line", "caf\u00e9 \u65e5\u672c \U0001f642", "x" * 50, " leading", "tail  "]


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model with LLaMA's settings, trained on this file."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(__file__).read_text(encoding="utf-8").splitlines()),
        model_writer=model,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def test_byte_tokenizer(tiny: ResolvedModel) -> None:
    tokenizer = load_tokenizer(tiny.folder)
    ids = tokenizer("Hi\u00e9").input_ids
    assert len(tokenizer) == 260 and tokenizer.is_fast
    assert len(ids) == 1 + 4 and ids[0] == tokenizer.bos_token_id  # like LLaMA it begins with one BOS
    assert tokenizer.decode(ids[1:]) == "Hi\u00e9"
    assert (pad_id(tokenizer), tokenizer.eos_token_id) == (0, 3)


def test_chat_template_has_one_bos_and_ends_turns(tiny: ResolvedModel) -> None:
    tokenizer = load_tokenizer(tiny.folder)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    ids = tokenizer.apply_chat_template(talk, tokenize=True, return_dict=True)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1 and ids.count(tokenizer.eos_token_id) == 2
    assert tokenizer.decode(ids) == "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"


def test_pad_falls_back_to_eos_and_adds_no_token(tiny_copy: Path) -> None:
    file = tiny_copy / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["pad_token"]
    file.write_text(json.dumps(config))
    tokenizer = load_tokenizer(tiny_copy)
    assert tokenizer.pad_token is None and len(tokenizer) == 260
    assert pad_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert pad_id(tokenizer) == 0


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_alone_gives_its_ids(text: str, llama_like: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(llama_like / "tokenizer.model"))
    tokenizer = load_tokenizer(llama_like)
    rows = tokenizer(text, return_offsets_mapping=True)
    assert rows.input_ids == [reference.bos_id(), *reference.encode(text)]
    assert tokenizer.decode(rows.input_ids, skip_special_tokens=True) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", None)
    assert pad_id(tokenizer) == tokenizer.eos_token_id and len(tokenizer) == 420
    assert max(end for _, end in rows.offset_mapping) == len(text)


def test_sentencepiece_with_settings_survives_saving(llama_like: Path, tmp_path: Path) -> None:
    source, saved = tmp_path / "source", tmp_path / "saved"
    source.mkdir()
    (source / "tokenizer.model").write_bytes((llama_like / "tokenizer.model").read_bytes())
    settings = {"add_bos_token": False, "add_eos_token": True, "chat_template": "{{ bos_token }}"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(source)
    ids = tokenizer("Hello  world").input_ids
    assert ids[0] != tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    tokenizer.save_pretrained(saved)
    again = load_tokenizer(saved)
    assert again("Hello  world").input_ids == ids and again.chat_template == "{{ bos_token }}"


def test_sentencepiece_of_another_kind(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(__file__).read_text(encoding="utf-8").splitlines()),
        model_writer=model,
        vocab_size=200,
        model_type="unigram",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(UserError, match=r"no byte-pair model of LLaMA's kind.*tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [None, b"{", b"\x00\x01"])
def test_no_usable_tokenizer(content: bytes | None, tiny_copy: Path) -> None:
    for file in tiny_copy.glob("tokenizer*"):
        file.unlink()
    if content == b"{":
        (tiny_copy / "tokenizer.json").write_bytes(content)
    elif content:
        (tiny_copy / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=r"No usable tokenizer|is not valid JSON|is no sentencepiece model"):
        load_tokenizer(tiny_copy)
