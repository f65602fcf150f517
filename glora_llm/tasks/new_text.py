"""A new language model from model.config: its tokenizer, and the folder it begins with."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

from glora_llm.atomic import cache_root, make_once
from glora_llm.data.prepare import tokenizer_fingerprint, training_texts
from glora_llm.data.sources import find_path
from glora_llm.errors import UserError
from glora_llm.models.folder import new_config, new_folder, require_family
from glora_llm.models.resolve import ResolvedModel
from glora_llm.models.tokenizer import load_tokenizer
from glora_llm.schema import Recipe

TRAIN = "train:"
CODE = "1"  # raised whenever models/train_tokenizer.py would write another tokenizer of the same text


def new_text_model(recipe: Recipe) -> ResolvedModel:
    """Return the folder of a new causal language model: config.json and tokenizer, no weights.

    config.json takes the ids of the special tokens, and the size of the vocabulary where the recipe gives none, from
    the tokenizer.

    Raises:
        UserError: a configuration that does not fit, no tokenizer, or one that is larger than config.vocab_size.
    """
    section = recipe.model
    require_family(section, "text")
    folder = _tokenizer_folder(recipe)
    tokenizer = load_tokenizer(folder)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    given: dict[str, Any] = {"vocab_size": len(tokenizer), **ids}
    config = new_config(section, "text", given)
    room = config.get_text_config(decoder=True).vocab_size
    if len(tokenizer) > room:
        raise UserError(
            f"model.tokenizer {section.tokenizer} has {len(tokenizer)} pieces, and model.config.vocab_size is {room}: "
            f"ids from {room} on would have no embedding. Set vocab_size to {len(tokenizer)} or more, or leave it out."
        )
    place, key = new_folder(
        config, recipe.vlora, recipe.training.seed, tokenizer_fingerprint(tokenizer), tokenizer.save_pretrained
    )
    return ResolvedModel(place, f"a new {config.model_type}", None, key)


def _tokenizer_folder(recipe: Recipe) -> Path:
    wanted = recipe.model.tokenizer
    if wanted is None:
        raise UserError("model.config needs model.tokenizer: a folder, a sentencepiece tokenizer.model, or train:N.")
    if wanted.startswith(TRAIN):
        return _trained(wanted, recipe)
    path = find_path(wanted)
    if path is None:
        raise UserError(f"model.tokenizer: there is no folder or file '{wanted}'; or give train:N, such as train:8000.")
    if path.is_dir():
        return path
    if path.suffix != ".model":
        raise UserError(f"model.tokenizer: {path} is no sentencepiece .model file: give the folder that it is in.")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return make_once(cache_root() / f"tokenizer-{digest[:24]}", lambda folder: _copy(path, folder))


def _copy(path: Path, folder: Path) -> None:
    shutil.copy(path, folder / "tokenizer.model")


def _trained(wanted: str, recipe: Recipe) -> Path:
    """Return the tokenizer of the training text alone, trained once for each text and size."""
    number = wanted.removeprefix(TRAIN)
    if not number.isdecimal() or int(number) < 1:
        raise UserError(f"model.tokenizer '{wanted}' gives no size; expected train:N, such as train:8000.")
    from glora_llm.models.train_tokenizer import train_tokenizer

    identity, texts = training_texts(recipe.data, recipe.training.seed)
    key = hashlib.sha256(f"{CODE}\0{number}\0{identity}".encode()).hexdigest()
    return make_once(
        cache_root() / f"tokenizer-{key[:24]}", lambda folder: train_tokenizer(texts(), int(number), folder)
    )
