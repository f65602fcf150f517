"""LLaMA folders with seeded random weights and a byte tokenizer, written shard by shard in bounded memory."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, PreTrainedTokenizerFast

SPECIALS = ["<pad>", "<s>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a LLaMA. `std` is that of the weights; norms are 1."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    positions: int
    dtype: str
    std: float


# std 0.1 rather than 0.02: at width 64 the logits would otherwise be so flat that tests could not tell them apart
TINY = LlamaShape(2, 64, 128, 4, 2, 256 + len(SPECIALS), 512, "float32", 0.1)
SMALL = replace(TINY, layers=8)
# The published sizes, with an untied head: LLaMA-2 (arXiv 2307.09288), Llama 3 (arXiv 2407.21783).
LLAMA2_7B = LlamaShape(32, 4096, 11008, 32, 32, 32000, 4096, "bfloat16", 0.02)
LLAMA2_70B = replace(LLAMA2_7B, layers=80, hidden=8192, intermediate=28672, heads=64, kv_heads=8)
LLAMA3_8B = replace(LLAMA2_7B, intermediate=14336, kv_heads=8, vocabulary=128256, positions=8192)


def write_random_llama(folder: Path, shape: LlamaShape, seed: int, shard_bytes: int = 2 * 10**9) -> None:
    """Write config, weights, tokenizer and generation config of a random LLaMA.

    Each tensor has a generator of its own, seeded by `seed` and its place, so the weights do not depend on
    `shard_bytes`. At most one shard, or one tensor where that is larger, is in memory.

    Args:
        folder: an existing empty folder.
        shard_bytes: size of a weight file, in bytes.
    """
    from transformers import GenerationConfig

    config = llama_config(shape)
    config.save_pretrained(folder)
    _write_weights(folder, config, shape, seed, shard_bytes)
    tokenizer = byte_tokenizer(shape.positions)
    tokenizer.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=[tokenizer.eos_token_id], pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(folder)


def byte_tokenizer(max_tokens: int) -> "PreTrainedTokenizerFast":
    """Return a fast tokenizer with one token a byte and four special ones; it adds `<s>` as LLaMA's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = SPECIALS + sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", SPECIALS.index("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=max_tokens,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def llama_config(shape: LlamaShape) -> "LlamaConfig":
    """Return the configuration of a shape, as transformers takes it."""
    from transformers import LlamaConfig

    return LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.positions,
        initializer_range=shape.std,
        dtype=shape.dtype,
        tie_word_embeddings=False,
        pad_token_id=SPECIALS.index("<pad>"),
        bos_token_id=SPECIALS.index("<s>"),
        eos_token_id=SPECIALS.index("<|im_end|>"),
        architectures=["LlamaForCausalLM"],
    )


def _write_weights(folder: Path, config: "LlamaConfig", shape: LlamaShape, seed: int, shard_bytes: int) -> None:
    """Write model.safetensors, or shards and their index where one file would be larger than `shard_bytes`."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in LlamaForCausalLM(config).state_dict().items()}
    dtype = getattr(torch, shape.dtype)
    place = {name: i for i, name in enumerate(shapes)}
    shards = list(_shards(shapes, dtype.itemsize, shard_bytes))
    index: dict[str, str] = {}
    for number, members in enumerate(shards, start=1):
        several = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = several if len(shards) > 1 else "model.safetensors"
        tensors = {name: _weight(shapes[name], dtype, shape.std, seed * 1_000_003 + place[name]) for name in members}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(members, file)
    if len(shards) > 1:
        total = sum(torch.Size(size).numel() for size in shapes.values()) * dtype.itemsize
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def _shards(shapes: dict[str, tuple[int, ...]], itemsize: int, shard_bytes: int) -> Iterator[list[str]]:
    """Yield the tensor names of each file, in order; a file holds one tensor at least."""
    members: list[str] = []
    filled = 0
    for name, size in shapes.items():
        count = itemsize
        for length in size:
            count *= length
        if members and filled + count > shard_bytes:
            yield members
            members, filled = [], 0
        members.append(name)
        filled += count
    yield members


def _weight(size: tuple[int, ...], dtype: "torch.dtype", std: float, seed: int) -> "torch.Tensor":
    """Return ones for a norm (the only vectors of a LLaMA), else N(0, std^2)."""
    import torch

    if len(size) == 1:
        return torch.ones(size, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(size, dtype=dtype).normal_(0.0, std, generator=generator)
