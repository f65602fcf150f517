"""A fast tokenizer in the terms of a GGUF file: its algorithm, tokens, merges or scores, and special tokens."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glora_llm.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
THE_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's name of the first split of a byte-level tokenizer (src/llama-vocab.cpp) -> the expression
SPLITS = {
    "llama-bpe": CONTRACTIONS + r"\p{N}{1,3}" + THE_REST,
    "qwen2": CONTRACTIONS + r"\p{N}" + THE_REST,
}
NO_MERGE = "\u0100 \u0100"  # llama.cpp wants a list of merges; two zero bytes joined are no token, and come apart again
LOWEST = -1e6  # score of a piece that no merge makes


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary.

    Attributes:
        model: `gpt2` (byte-level BPE) or `llama` (sentencepiece BPE).
        split: name of the first split of a gpt2 model; `default` of a llama model.
        tokens: by id, all ids of the model.
        kinds: a `gguf.TokenType` for each token.
        merges: of gpt2, in order.
        scores: of llama, by id: the highest is merged first.
        adds_space: of llama: a text begins with a space.
    """

    model: str
    split: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    scores: list[float]
    adds_space: bool


def read_vocabulary(tokenizer: "PreTrainedTokenizerBase", size: int) -> Vocabulary:
    """Return the vocabulary of a tokenizer, with as many tokens as the model has rows.

    Raises:
        UserError: for an algorithm that is not known here.
    """
    content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise _unknown(f"a {model['type']} model")
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    is_byte_level = not model["byte_fallback"]
    split = _byte_level_split(content, bool(merges)) if is_byte_level else "default"
    names, kinds = _tokens(tokenizer, size, is_byte_level)
    if is_byte_level:
        joined = [" ".join(merge) for merge in merges] or [NO_MERGE]
        return Vocabulary("gpt2", split, names, kinds, joined, [], False)
    made: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        made.setdefault("".join(merge), -float(rank))
    scores = [made.get(name, LOWEST) for name in names]
    return Vocabulary("llama", split, names, kinds, [], scores, _adds_space(content))


def add_vocabulary(writer: "GGUFWriter", tokenizer: "PreTrainedTokenizerBase", vocabulary: Vocabulary) -> None:
    """Write a vocabulary, the special tokens and the chat template into the head of a GGUF file."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.adds_space)
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _tokens(tokenizer: "PreTrainedTokenizerBase", size: int, is_byte_level: bool) -> tuple[list[str], list[int]]:
    """Return the text and kind of every id; ids that the tokenizer has not are unused."""
    from gguf import TokenType

    by_id = {number: name for name, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    names, kinds = [], []
    for number in range(size):
        name = by_id.get(number)
        kind = TokenType.NORMAL
        if name is None:
            name, kind = f"[PAD{number}]", TokenType.UNUSED
        elif number in added:
            kind = TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED
        elif not is_byte_level and name.startswith("<0x") and len(name) == len("<0xFF>"):
            kind = TokenType.BYTE
        if not is_byte_level and number == tokenizer.unk_token_id:
            kind = TokenType.UNKNOWN
        names.append(name)
        kinds.append(int(kind))
    return names, kinds


def _byte_level_split(content: dict[str, Any], has_merges: bool) -> str:
    """Return llama.cpp's name of how a byte-level tokenizer splits a text before it merges.

    Raises:
        UserError: when it has no name here.
    """
    first = content["pre_tokenizer"] or {}
    parts = first["pretokenizers"] if first.get("type") == "Sequence" else [first]
    kinds = [part.get("type") for part in parts]
    last = parts[-1]
    if kinds[-1] != "ByteLevel" or last["add_prefix_space"]:
        raise _unknown(f"a pre-tokenizer of {', '.join(map(str, kinds))}")
    if len(parts) == 1 and (last["use_regex"] or not has_merges):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and last["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not last["use_regex"]:
        expression = parts[0]["pattern"].get("Regex")
        for name, known in SPLITS.items():
            if expression == known:
                return name
    raise _unknown(f"a pre-tokenizer of {', '.join(map(str, kinds))} with an expression of its own")


def _adds_space(content: dict[str, Any]) -> bool:
    """Tell whether a sentencepiece tokenizer puts a space before a text."""
    text = json.dumps({"normalizer": content["normalizer"], "pre_tokenizer": content["pre_tokenizer"]})
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _unknown(what: str) -> UserError:
    return UserError(
        f"--for llama.cpp: this tokenizer has {what}, which has no name here for a GGUF file. Write the model by --for "
        "transformers, and give that folder to llama.cpp's own convert_hf_to_gguf.py."
    )
