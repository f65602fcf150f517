"""Tokenizers, and the rest of the model section."""

import json
from pathlib import Path

from tests.bad_input.case import Case, Change, bad, both, file
from tests.bad_input.model_cases import HERE, config, model, remove, written


def automap(name: str, kind: str) -> Change:
    """Return what makes a folder ask for code of its own, which would leave a file behind."""

    def change(folder: Path) -> None:
        (folder / "evil.py").write_text("open('evil.txt', 'w').close()\nclass Evil: ...\n")
        target = folder / name
        values = json.loads(target.read_text())
        target.write_text(
            json.dumps(values | {"auto_map": {kind: ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"})
        )

    return model(change)


TOKENIZERS: dict[str, Case] = {
    "tokenizer: not there": bad(
        "No usable tokenizer in model (Couldn't instantiate the backend", HERE, change=model(remove("tokenizer*"))
    ),
    "tokenizer: cut off": bad(
        "model/tokenizer.json is not valid JSON: Expecting value: line 1 column",
        HERE,
        change=written("tokenizer.json", '{"version": '),
    ),
    "tokenizer: a list": bad(
        "model/tokenizer.json holds a list; expected a JSON object, {...}.",
        HERE,
        change=written("tokenizer.json", "[]"),
    ),
    "tokenizer: an empty mapping": bad(
        "No usable tokenizer in model ('added_tokens'). Expected", HERE, change=written("tokenizer.json", "{}")
    ),
    "tokenizer: binary": bad(
        "model/tokenizer.json cannot be read as text: 'utf-8' codec can't",
        HERE,
        change=written("tokenizer.json", bytes(range(256))),
    ),
    "tokenizer_config: a list": bad(
        "model/tokenizer_config.json holds a list; expected a JSON object,",
        HERE,
        change=written("tokenizer_config.json", "[]"),
    ),
    "tokenizer_config: asks for code": bad(
        "No usable tokenizer in model (it asks for code that comes with the",
        HERE,
        change=automap("tokenizer_config.json", "AutoTokenizer"),
    ),
    "tokenizer_config: asks for code, and no tokenizer.json": bad(
        "No usable tokenizer in model (it asks for code that comes with the",
        HERE,
        change=both(
            automap("tokenizer_config.json", "AutoTokenizer"),
            lambda folder: (folder / "model" / "tokenizer.json").unlink(),
        ),
    ),
    "config.json: asks for code": bad("", HERE, change=automap("config.json", "AutoModelForCausalLM")),
    "a hub model without a network": bad(
        "'nobody/nothing' is no folder here, is not in the hub's cache, and the", "model.name_or_path=nobody/nothing"
    ),
    "a folder that is not there": bad(
        "model.name_or_path './none' does not exist (looked for none) and is no", "model.name_or_path=./none"
    ),
    "a file that is no model": bad(
        "model.name_or_path rows.jsonl is a file but no .gguf: give the folder", "model.name_or_path=rows.jsonl"
    ),
    "an empty name": bad("'' has no config.json in .: expected a Hugging Face model folder.", "model.name_or_path=''"),
    "an unknown embedded model": bad(
        "Unknown embedded model 'tiny'; there is: llama2-7b-random,", "model.name_or_path=embedded:tiny"
    ),
    "a revision of a folder": bad(
        "model.revision 'main' belongs to hub ids, and 'model' is local: remove",
        HERE,
        "model.revision=main",
        change=config(),
    ),
    "an adapter's folder": bad(
        "'model' has no config.json in model: expected a Hugging Face model",
        HERE,
        change=both(model(remove("config.json")), file("model/adapter_config.json", "{}")),
    ),
    "a gguf file that is none": bad(
        "x.gguf is no GGUF file: it does not begin with the bytes 'GGUF'. Is",
        "model.name_or_path=x.gguf",
        change=lambda folder: (folder / "x.gguf").write_text("x"),
    ),
    "flash attention on a CPU": bad(
        "model.attention is flash_attention_2, which needs a GPU; this is the", "model.attention=flash_attention_2"
    ),
    "Liger kernels on a CPU": bad(
        "model.kernels is liger, but the model is on the cpu and its kernels", "model.kernels=liger"
    ),
    "quantization misspelt": bad(
        "model.quantization: got '4bit' (text), expected 'none', 'nf4', 'fp4'", "model.quantization=4bit"
    ),
    "float16 on a CPU": bad("model.dtype is float16, and this cpu does not compute in it. Use", "model.dtype=float16"),
    "an unknown dtype": bad(
        "model.dtype: got 'bf16' (text), expected 'auto', 'float32', 'bfloat16'", "model.dtype=bf16"
    ),
    "a new model of an unknown type": bad(
        "model.config.model_type 'lama' is no family of models of the installed",
        "model.name_or_path=null",
        "adapter.method=full",
        "model.config={model_type: lama}",
    ),
    "a new model of negative size": bad(
        "Class validation error for validator 'validate_architecture':",
        "model.name_or_path=null",
        "adapter.method=full",
        "model.tokenizer=model",
        "model.config={model_type: llama, hidden_size: -4}",
        change=config(),
    ),
    "a new model with an unknown key": bad(
        "a llama has no such setting. Did you mean 'hidden_size'?",
        "model.name_or_path=null",
        "adapter.method=full",
        "model.tokenizer=model",
        "model.config={model_type: llama, hiden_size: 64}",
        change=config(),
    ),
    "a new encoder": bad(
        "model.config.model_type 'bert' is an encoder, whose tokens see those",
        "model.name_or_path=null",
        "adapter.method=full",
        "model.tokenizer=model",
        "model.config={model_type: bert}",
        change=config(),
    ),
}
