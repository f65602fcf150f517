"""`--for llama.cpp`: the GGUF file of a merged model says what the merged model says, in llama.cpp itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from glora_llm.cli import main
from glora_llm.errors import UserError
from glora_llm.models.embedded import embedded_folder
from glora_llm.models.gguf_vocabulary import read_vocabulary
from glora_llm.models.gguf_writing import require_gguf, write_gguf
from glora_llm.models.random_llama import byte_tokenizer
from glora_llm.models.tokenizer import load_tokenizer
from glora_llm.models.train_tokenizer import train_tokenizer
from tests.merge.conftest import ALL_MODES, Train
from tests.merge.llama_cpp import generate_by_llama_cpp, generate_by_transformers
from tests.merge.test_families import SIZES

PROMPTS = ["What is 1984 + 7?", "Once upon a time, there was", "a", "Two  spaces,\n\u65e5\u672c and a caf\u00e9"]
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("slots", "biased"), [(ALL_MODES, True), ({"A": "lora", "B": "lora"}, False)], ids=["with biases", "without"]
)
def test_a_merged_llama_says_the_same(slots: dict[str, str], biased: bool, train: Train, tmp_path: Path) -> None:
    run = ["merge", str(train(slots=slots).folder.path), "--dtype", "float32", "--no-compare"]
    assert main([*run, "--out", str(tmp_path / "plain"), "--for", "transformers"]) == 0
    assert main([*run, "--out", str(tmp_path / "gguf"), "--for", "llama.cpp"]) == 0
    assert {file.name for file in (tmp_path / "gguf").iterdir()} == {"merge_report.json", "model.gguf"}
    names = {tensor.name for tensor in GGUFReader(tmp_path / "gguf" / "model.gguf").tensors}
    for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        assert (f"blk.1.{part}.bias" in names) is biased
    require_same_text(tmp_path / "plain", tmp_path / "gguf" / "model.gguf")


def require_same_text(folder: Path, file: Path, tokens: int = 16) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = generate_by_transformers(model, AutoTokenizer.from_pretrained(folder), PROMPTS, tokens)
    assert len(set(expected)) > 1 and any(len(text) > 3 for text in expected)
    assert generate_by_llama_cpp(file, PROMPTS, tokens) == expected


def small_llama(**keys: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, **keys))


MODELS = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "tied": lambda: small_llama(tie_word_embeddings=True),
    "llama 3": lambda: small_llama(rope_parameters=LLAMA3 | {"original_max_position_embeddings": 32}),
    "wide heads": lambda: small_llama(head_dim=32),
}


@pytest.mark.parametrize("kind", MODELS)
def test_other_models_say_the_same(kind: str, tmp_path: Path) -> None:
    """Random biases and norms too, and the rotary embedding of Llama 3 stretched over the prompt."""
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        model.lm_head.weight[3] = 0  # the end of the text is seldom said
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer(512).save_pretrained(tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", kind)
    require_same_text(tmp_path / "model", tmp_path / "model.gguf")


def test_a_sentencepiece_vocabulary_says_the_same(tmp_path: Path) -> None:
    texts = [f"The number {n} is a good number, said the {n}th of them once upon a time." for n in range(300)]
    folder = tmp_path / "model"
    folder.mkdir()
    train_tokenizer(texts, 320, folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": 320}, bos_token_id=1, eos_token_id=2))
    with torch.no_grad():
        model.lm_head.weight[:259] = 0  # no bytes: of a run that is no UTF-8 the two print different marks
    model.save_pretrained(folder)
    write_gguf(folder, tmp_path / "model.gguf", "sentencepiece")
    require_same_text(folder, tmp_path / "model.gguf")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_are_those_of_the_merged_model(dtype: str, train: Train, tmp_path: Path) -> None:
    run = train(slots=ALL_MODES).folder.path
    out = tmp_path / "out"
    assert main(["merge", str(run), "--out", str(out), "--dtype", dtype, "--for", "llama.cpp", "--no-compare"]) == 0
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(out / "model.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == {"float16": "F16", "bfloat16": "BF16"}[dtype]
    assert kinds["blk.0.attn_q.bias"] == kinds["blk.0.attn_norm.weight"] == "F32"
    assert len(generate_by_llama_cpp(out / "model.gguf", PROMPTS[:1], 8)[0]) > 0
    assert json.loads((out / "merge_report.json").read_text())["gguf"]["file"] == "model.gguf"


@pytest.mark.slow
def test_smollm2_says_the_same(tmp_path: Path) -> None:
    """A real model with its own tokenizer."""
    folder = embedded_folder("smollm2-135m-instruct")
    write_gguf(folder, tmp_path / "model.gguf", "SmolLM2")
    require_same_text(folder, tmp_path / "model.gguf", tokens=8)


def test_what_has_no_form_is_refused(tmp_path: Path) -> None:
    folder = embedded_folder("tiny-llama")
    config = small_llama().config
    require_gguf(config, folder)
    for key, value in (("hidden_act", "gelu"), ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4})):
        odd = LlamaConfig(**config.to_dict() | {"hidden_act": "silu"})
        setattr(odd, key, value)
        with pytest.raises(UserError, match=r"and this is (hidden_act gelu|rotary embeddings of type yarn)\. Write"):
            require_gguf(odd, folder)
    tokenizer = load_tokenizer(folder)
    backend = tokenizer.backend_tokenizer
    from tokenizers import pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()])
    with pytest.raises(UserError, match="a pre-tokenizer of Whitespace, ByteLevel"):
        read_vocabulary(tokenizer, 260)
