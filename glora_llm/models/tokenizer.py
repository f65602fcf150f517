"""The tokenizer of a model folder: always a fast one with character offsets, which the loss masks are made from."""

from pathlib import Path
from typing import TYPE_CHECKING

from glora_llm.errors import UserError
from glora_llm.files.json_file import read_object
from glora_llm.models.config_file import AGAIN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "Two  spaces,\nthe year 1984 and a caf\u00e9."


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Return the fast tokenizer of `folder`. Nothing is added to its vocabulary, no pad token either.

    Raises:
        UserError: no tokenizer in the folder, a damaged one, or one without offsets.
    """
    if not (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file():
        # not AutoTokenizer: of this file alone transformers 5.23 makes one that orders merges by id instead of by
        # score, adds no <s>, and (without config.json) no leading space: other ids than the model was trained on
        from glora_llm.models.sentencepiece_bpe import load_sentencepiece

        tokenizer = load_sentencepiece(folder)
    else:
        tokenizer = _load_auto(folder)
    _check_offsets(tokenizer, folder)
    return tokenizer


def pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the id that fills up rows: pad, else eos, else 0. Masks go by length, so any id will do."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return candidate
    return 0


def _load_auto(folder: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    for file in folder.glob("tokenizer*.json"):
        read_object(file, AGAIN)  # the Rust reader would raise a bare Exception
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # nothing is asked
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())
        if "trust_remote_code" in why:
            why = "it asks for code that comes with the model, and such code is not run"
        raise UserError(
            f"No usable tokenizer in {folder} ({why}). Expected tokenizer.json, or LLaMA's tokenizer.model: "
            "copy the tokenizer files of the base model there."
        ) from error


def _check_offsets(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Refuse a tokenizer whose offsets do not reach over a probe text.

    Raises:
        UserError: slow (Python) tokenizer, or offsets with holes.
    """
    advice = "Save it with tokenizer.json (a Rust tokenizer of the `tokenizers` library) and try again."
    if not tokenizer.is_fast:
        raise UserError(f"The tokenizer in {folder} ({type(tokenizer).__name__}) has no character offsets. {advice}")
    spans = tokenizer(PROBE, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    covered = {place for begin, end in spans for place in range(begin, end)}
    lost = [place for place in range(len(PROBE)) if place not in covered and not PROBE[place].isspace()]
    if lost:
        raise UserError(f"The tokenizer in {folder} loses '{PROBE[lost[0]]}' in its character offsets. {advice}")
