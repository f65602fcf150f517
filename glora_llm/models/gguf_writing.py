"""A Hugging Face folder of a LLaMA or Qwen2 -> a GGUF file, as llama.cpp reads it, one tensor in memory at a time.

llama.cpp turns pairs of neighbouring elements in its rotary embedding of a LLaMA, transformers element i with element
i + half: so the rows of q and k, and their biases, change places. Qwen2 is rotated as in transformers there.
Checked against llama.cpp itself (tests/merge/test_llama_cpp.py).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glora_llm.errors import UserError
from glora_llm.models.config_file import load_config
from glora_llm.models.gguf_vocabulary import add_vocabulary, read_vocabulary
from glora_llm.models.stored import StoredTensors
from glora_llm.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

PAIRED = ("q_proj", "k_proj")


def require_gguf(config: Any, folder: Path) -> None:
    """Check that a model can be written as a GGUF file here.

    Args:
        folder: with its tokenizer.

    Raises:
        UserError: naming what has no form there.
    """
    rope = config.rope_parameters["rope_type"]
    odd = None
    if config.model_type not in ("llama", "qwen2"):
        odd = f"a {config.model_type} model"
    elif config.hidden_act != "silu":
        odd = f"hidden_act {config.hidden_act}"
    elif rope not in ("default", "linear", "llama3"):
        odd = f"rotary embeddings of type {rope}"
    elif getattr(config, "use_sliding_window", False):
        odd = "a sliding window"
    if odd:
        raise UserError(
            f"--for llama.cpp writes LLaMA and Qwen2 with silu and rotary embeddings of type default, linear or "
            f"llama3, and this is {odd}. Write the model by --for transformers, and give that folder to llama.cpp's "
            "own convert_hf_to_gguf.py."
        )
    read_vocabulary(load_tokenizer(folder), config.vocab_size)


def write_gguf(folder: Path, file: Path, name: str) -> None:
    """Write the model of a folder, in the dtype that it is stored in (vectors in float32).

    Args:
        folder: config.json, safetensors, tokenizer.
        file: to make.
        name: of the model, as it stands in the file.

    Raises:
        UserError: as of `require_gguf`.
    """
    from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map

    config = load_config(folder)
    require_gguf(config, folder)
    tokenizer, stored = load_tokenizer(folder), StoredTensors(folder)
    writer = GGUFWriter(file, config.model_type)
    try:
        writer.add_name(name)
        _add_shape(writer, config, stored.get("model.embed_tokens.weight").dtype)
        add_vocabulary(writer, tokenizer, read_vocabulary(tokenizer, config.vocab_size))
        names = get_tensor_name_map(MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
        factors = _rope_factors(config)
        if factors is not None:
            _announce(writer, "rope_freqs.weight", factors)
        for tensor_name in stored.names():
            _announce(writer, _named(names, tensor_name), stored.get(tensor_name))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(_array(factors)[0])
        for tensor_name in stored.names():
            writer.write_tensor_data(_array(in_pairs(tensor_name, stored.get(tensor_name), config))[0])
    finally:
        writer.close()


def in_pairs(name: str, tensor: Tensor, config: Any) -> Tensor:
    """Return a weight (O, I) or bias (O) of q or k of a LLaMA with the rows of each head in llama.cpp's order.

    Row i of the first half of a head becomes row 2 i, row i of the second half row 2 i + 1. Other tensors stay.
    """
    owner = name.rpartition(".")[0].rpartition(".")[2]
    if config.model_type != "llama" or owner not in PAIRED:
        return tensor
    heads = config.num_attention_heads if owner == "q_proj" else config.num_key_value_heads
    halves = tensor.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).reshape(tensor.shape)


def _named(names: Any, name: str) -> str:
    found: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise UserError(f"--for llama.cpp: a GGUF file has no name for {name}.")
    return found


def _array(tensor: Tensor) -> tuple[Any, Any]:
    """Return a tensor as numpy takes it, and its type in the file; numpy has no bfloat16, so those are bytes."""
    from gguf import GGMLQuantizationType

    if tensor.dim() < 2:
        tensor = tensor.float()
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint8).numpy(), GGMLQuantizationType.BF16
    return tensor.numpy(), None


def _announce(writer: "GGUFWriter", name: str, tensor: Tensor) -> None:
    array, kind = _array(tensor)
    writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, raw_dtype=kind)


def _add_shape(writer: "GGUFWriter", config: Any, dtype: torch.dtype) -> None:
    """Write sizes, rotary embedding and dtype."""
    from gguf import LlamaFileType, RopeScalingType

    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = config.rope_parameters
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    kinds = {
        torch.float32: LlamaFileType.ALL_F32,
        torch.float16: LlamaFileType.MOSTLY_F16,
        torch.bfloat16: LlamaFileType.MOSTLY_BF16,
    }
    writer.add_file_type(kinds[dtype])


def _rope_factors(config: Any) -> Tensor | None:
    """Return what each frequency of a Llama 3 embedding is divided by, (head / 2); None for other embeddings."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if config.rope_parameters["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = config.rope_parameters["rope_theta"] ** (-torch.arange(len(scaled)) / len(scaled))
    return (plain / scaled).float()
