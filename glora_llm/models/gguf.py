"""A GGUF file -> a Hugging Face folder (safetensors, fast tokenizer, generation config, chat template), once."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from glora_llm.atomic import cache_root, make_once
from glora_llm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONVERSION = 1  # part of the cache key: raise it when the conversion below writes something else


def converted(file: Path) -> Path:
    """Return the folder that `file` was converted to; the key is the hash of its content, so a copy costs nothing.

    Raises:
        UserError: when it is no GGUF file, or one of an architecture that transformers cannot read.
    """
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(f"{file} is no GGUF file: it does not begin with the bytes 'GGUF'. Is the download whole?")
        stream.seek(0)
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return make_once(
        cache_root() / f"gguf-v{CONVERSION}-{file.stem}-{digest[:16]}", lambda folder: convert(file, folder)
    )


def convert(file: Path, folder: Path) -> None:
    """Write what is in the GGUF `file` to `folder`. Weights are float32: what 4-bit blocks mean fits in no less."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            trust_remote_code=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    except (ImportError, ValueError, KeyError, NotImplementedError) as error:
        raise UserError(f"Cannot read {file}: {error}. Give the model as a folder of safetensors instead.") from error
    _forget_quantization(model)
    model.config.dtype = torch.float32
    model.save_pretrained(folder)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _forget_quantization(model: "PreTrainedModel") -> None:
    """Remove the marks of the GGUF loader: the weights are plain by now, but save_pretrained goes by the marks."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for mark in ("hf_quantizer", "quantization_method"):
        if hasattr(model, mark):
            delattr(model, mark)
    model.is_quantized = False
