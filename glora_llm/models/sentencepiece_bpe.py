"""LLaMA's sentencepiece file alone (`tokenizer.model`) -> the fast tokenizer that gives the same ids."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glora_llm.errors import UserError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

PROBES = ("Two  spaces,\n  the year 1984 and a caf\u00e9: \u65e5\u672c, \U0001f642.", "a", "under_score  ")
CARRIED = ("chat_template", "model_max_length", "pad_token", "clean_up_tokenization_spaces")


def load_sentencepiece(folder: Path) -> "PreTrainedTokenizerBase":
    """Return a fast tokenizer of `folder`/tokenizer.model, checked against sentencepiece on probe texts.

    BOS is added and EOS is not, as LLaMA does, unless tokenizer_config.json says otherwise.

    Raises:
        UserError: when sentencepiece is not installed, or the file is no BPE model of LLaMA's kind.
    """
    from transformers import PreTrainedTokenizerFast

    pieces = _read(folder / "tokenizer.model")
    file = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    backend = _backend(pieces)
    _check(backend, pieces, folder)
    _add_specials(backend, pieces, config.get("add_bos_token", True), config.get("add_eos_token", False))
    names = {name: _piece(pieces, name) for name in ("unk", "bos", "eos")}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{f"{name}_token": piece for name, piece in names.items() if piece is not None},
        **{key: config[key] for key in CARRIED if config.get(key) is not None},
    )


def _read(file: Path) -> "SentencePieceProcessor":
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise UserError(f"{file} needs sentencepiece to be read: pip install sentencepiece") from error
    try:
        return SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{file} is no sentencepiece model: {error}. Download or copy it again.") from error


def _piece(pieces: "SentencePieceProcessor", name: str) -> str | None:
    """Return the piece of `unk`, `bos` or `eos`, or None where the model has none."""
    number = getattr(pieces, f"{name}_id")()
    return pieces.id_to_piece(number) if number >= 0 else None


def _backend(pieces: "SentencePieceProcessor") -> "Tokenizer":
    """Return the tokenizer without special tokens: BPE whose merges are ordered by the score of what they make."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    count = pieces.get_piece_size()
    vocabulary = {pieces.id_to_piece(i): i for i in range(count)}
    ordinary = [i for i in range(count) if not (pieces.is_byte(i) or pieces.is_control(i) or pieces.is_unknown(i))]
    ranked = sorted(ordinary, key=lambda i: (-pieces.get_score(i), i))
    merges = [pair for i in ranked for pair in _splits(pieces.id_to_piece(i), vocabulary)]
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=_piece(pieces, "unk"), fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def _splits(piece: str, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Return all pairs of pieces that make `piece`, shortest left part last as the reference converter has it."""
    pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
    known = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
    return sorted(known, key=lambda pair: (len(pair[0]), len(pair[1])), reverse=True)


def _check(backend: "Tokenizer", pieces: "SentencePieceProcessor", folder: Path) -> None:
    """Refuse a model whose ids come out differently (a unigram model, or one with a normaliser of its own)."""
    for text in PROBES:
        if backend.encode(text).ids != pieces.encode(text):
            raise UserError(
                f"{folder / 'tokenizer.model'} is no byte-pair model of LLaMA's kind, so its ids cannot be kept. "
                "Add the tokenizer.json of the same model beside it."
            )


def _add_specials(backend: "Tokenizer", pieces: "SentencePieceProcessor", bos: bool, eos: bool) -> None:
    """Mark the control pieces as special, and put BOS before and EOS after a text where asked."""
    from tokenizers import AddedToken, processors

    control = [i for i in range(pieces.get_piece_size()) if pieces.is_control(i) or pieces.is_unknown(i)]
    backend.add_special_tokens([AddedToken(pieces.id_to_piece(i), normalized=False) for i in control])
    before = [piece for piece in (_piece(pieces, "bos"),) if bos and piece is not None]
    after = [piece for piece in (_piece(pieces, "eos"),) if eos and piece is not None]
    if before or after:
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *(f"{piece}:1" for piece in before), "$B:1", *(f"{p}:1" for p in after)],
            special_tokens=[(piece, pieces.piece_to_id(piece)) for piece in [*before, *after]],
        )
