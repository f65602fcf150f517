"""Model folders: config.json, weights, index, tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bad_input.case import Case, Change, bad, copy_model

HERE = "model.name_or_path=model"
WEIGHTS = "model.safetensors"


def remove(*patterns: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for path in [path for pattern in patterns for path in folder.glob(pattern)]:
            path.unlink()

    return change


def config(**values: Any) -> Change:
    """Return what copies a model and changes keys of its config.json."""

    def change(folder: Path) -> None:
        target = copy_model(folder) / "config.json"
        target.write_text(json.dumps(json.loads(target.read_text()) | values))

    return change


def model(change: Callable[[Path], object]) -> Change:
    """Return what copies a model and changes its folder."""
    return lambda folder: change(copy_model(folder))


def written(name: str, content: bytes | str) -> Change:
    data = content.encode() if isinstance(content, str) else content
    return model(lambda folder: (folder / name).write_bytes(data))


CONFIGS: dict[str, Case] = {
    f"config.json: {name}": bad(says, HERE, change=change)
    for name, (says, change) in {
        "not there": (
            "'model' has no config.json in model: expected a Hugging Face model",
            model(lambda folder: (folder / "config.json").unlink()),
        ),
        "empty": ("model/config.json is not valid JSON: Expecting value: line 1 column 1", written("config.json", "")),
        "cut off": (
            "model/config.json is not valid JSON: Unterminated string starting at:",
            written("config.json", '{"model_type": "lla'),
        ),
        "binary": (
            "model/config.json cannot be read as text: 'utf-8' codec can't decode",
            written("config.json", bytes(range(256))),
        ),
        "a list": ("model/config.json holds a list; expected a JSON object, {...}.", written("config.json", "[]")),
        "a number": (
            "model/config.json holds a int; expected a JSON object, {...}. Download",
            written("config.json", "5"),
        ),
        "nested 10,000 deep": (
            "model/config.json is not valid JSON: its brackets nest too deep.",
            written("config.json", "[" * 10_000 + "]" * 10_000),
        ),
        "a key twice": (
            "model/config.json is not valid JSON: the key 'model_type' stands there",
            written("config.json", '{"model_type": "llama", "model_type": "bert"}'),
        ),
        "no model_type": (
            "'model' has model_type 'None', which is no causal language model of",
            config(model_type=None),
        ),
        "model_type a list": (
            "model_type is \"['llama']\"; expected a text. Download or copy the model",
            config(model_type=["llama"]),
        ),
        "model_type unknown": (
            "'model' has model_type 'lama', which is no causal language model of",
            config(model_type="lama"),
        ),
        "model_type of an encoder": (
            "'model' has model_type 'bert', whose tokens see those behind them: it",
            config(model_type="bert"),
        ),
        "architectures of another task": (
            "'model' is a LlamaForSequenceClassification, expected one of the",
            config(architectures=["LlamaForSequenceClassification"]),
        ),
        "architectures a text": (
            "architectures is 'LlamaForCausalLM'; expected a list. Download or copy",
            config(architectures="LlamaForCausalLM"),
        ),
        "hidden_size negative": (
            "hidden_size is '-64'; expected a whole number from 1 to 100000000.",
            config(hidden_size=-64),
        ),
        "hidden_size text": (
            "hidden_size is '64'; expected a whole number from 1 to 100000000.",
            config(hidden_size="64"),
        ),
        "hidden_size 0": ("hidden_size is '0'; expected a whole number from 1 to 100000000.", config(hidden_size=0)),
        "hidden_size null": (
            "model/config.json does not fit its family: Validation error for field",
            config(hidden_size=None),
        ),
        "hidden_size another": (
            "model.embed_tokens.weight has shape (260, 64); config.json asks for",
            config(hidden_size=128),
        ),
        "hidden_size 10^12": (
            "hidden_size is '1000000000000'; expected a whole number from 1 to",
            config(hidden_size=10**12),
        ),
        "heads that do not divide": (
            "7 attention heads are no multiple of 2 key-value heads. Download or",
            config(num_attention_heads=7, head_dim=None),
        ),
        "heads 0": (
            "num_attention_heads is '0'; expected a whole number from 1 to",
            config(num_attention_heads=0, head_dim=None),
        ),
        "key heads that do not divide": (
            "4 attention heads are no multiple of 3 key-value heads. Download or",
            config(num_key_value_heads=3),
        ),
        "layers 0": (
            "num_hidden_layers is '0'; expected a whole number from 1 to 100000000.",
            config(num_hidden_layers=0),
        ),
        "layers fewer than stored": (
            "the files hold 9 tensors that config.json has no place for, the first:",
            config(num_hidden_layers=1),
        ),
        "layers more than stored": (
            "model.layers.2.self_attn.q_proj.weight is missing; config.json asks",
            config(num_hidden_layers=3),
        ),
        "layers text": (
            "num_hidden_layers is 'two'; expected a whole number from 1 to",
            config(num_hidden_layers="two"),
        ),
        "vocabulary below the tokenizer's": (
            "model.embed_tokens.weight has shape (260, 64); config.json asks for",
            config(vocab_size=16),
        ),
        "vocabulary negative": (
            "vocab_size is '-1'; expected a whole number from 1 to 100000000.",
            config(vocab_size=-1),
        ),
        "activation unknown": (
            "hidden_act 'foo' is unknown. Download or copy the model again.",
            config(hidden_act="foo"),
        ),
        "activation a number": (
            "model/config.json does not fit its family: Validation error for field",
            config(hidden_act=5),
        ),
        "quantization_config a text": (
            "quantization_config is 'nf4'; expected an object. Download or copy the",
            config(quantization_config="nf4"),
        ),
        "quantization_config a list": (
            "quantization_config is \"['nf4']\"; expected an object. Download or copy",
            config(quantization_config=["nf4"]),
        ),
        "quantization_config of GPTQ": (
            "The weights of 'model' are already quantised (gptq). Give the",
            config(quantization_config={"quant_method": "gptq"}),
        ),
        "rope_parameters a text": (
            "model/config.json does not fit its family: Validation error for field",
            config(rope_parameters="yarn"),
        ),
        "intermediate_size negative": (
            "intermediate_size is '-4'; expected a whole number from 1 to",
            config(intermediate_size=-4),
        ),
        "rms_norm_eps text": (
            "model/config.json does not fit its family: Validation error for field",
            config(rms_norm_eps="small"),
        ),
        "max_position_embeddings negative": (
            "max_position_embeddings is '-1'; expected a whole number from 1 to",
            config(max_position_embeddings=-1),
        ),
    }.items()
}
