"""Servers that load a merged model: the linears of each family to which each server gives a bias, with the source.

A merged model has biases where slot C or E is active, and a server that has no bias there leaves them out without a
word. Plain transformers is asked by building a layer (`models.bias`). The others are described here, by the last part
of the linears' names; each rule was read in the published source, of the version that is named.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glora_llm.errors import UserError, nearest
from glora_llm.merge.choices import LLAMA_CPP, TRANSFORMERS
from glora_llm.plan.mergeable import holds_bias

QKV = frozenset({"q_proj", "k_proj", "v_proj"})
ATTENTION = QKV | {"o_proj"}
MLP = frozenset({"gate_proj", "up_proj", "down_proj"})
OPT = QKV | {"out_proj", "fc1", "fc2"}
FUSED = frozenset({"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"})
PHI = QKV | {"dense", "fc1", "fc2"}
STARCODER2 = ATTENTION | {"c_fc", "c_proj"}
NONE: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Family:
    """The rule by which a server loads one family.

    Attributes:
        biases: last name parts of the linears whose bias it adds; None: it runs the modules of transformers, and adds
            every bias that they have.
        file: where that is written, in the server's repository.
    """

    biases: frozenset[str] | None
    file: str


@dataclass(frozen=True)
class Target:
    """A server.

    Attributes:
        repository: on GitHub; empty for transformers, which is run and not read.
        version: that was read.
        unknown: the file by which a bias that the server's model has not is passed over; empty: none was read.
        families: model_type -> how it is loaded; None: every family of transformers.
    """

    repository: str
    version: str
    unknown: str
    families: dict[str, Family] | None


_VLLM = "vllm/model_executor/models/"
_VLLM_BACKEND = Family(None, f"{_VLLM}transformers/utils.py")
_SGLANG = "python/sglang/srt/models/"
_SGLANG_BACKEND = Family(None, f"{_SGLANG}transformers.py")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank: vLLM 0.33.0, vllm/config/lora.py
TARGETS = {
    TRANSFORMERS: Target("", "", "", None),
    "vllm": Target(
        "vllm-project/vllm",
        "0.33.0",
        f"{_VLLM}utils.py",
        {
            "llama": Family(ATTENTION | MLP, f"{_VLLM}llama.py"),
            "mistral": Family(NONE, f"{_VLLM}mistral.py"),
            "phi3": Family(NONE, f"{_VLLM}phi3.py"),
            "granite": Family(ATTENTION | MLP, f"{_VLLM}granite.py"),
            "qwen2": Family(QKV, f"{_VLLM}qwen2.py"),
            "qwen3": Family(QKV, f"{_VLLM}qwen3.py"),
            "gemma": Family(NONE, f"{_VLLM}gemma.py"),
            "gemma2": Family(ATTENTION, f"{_VLLM}gemma2.py"),
            "gemma3_text": Family(ATTENTION, f"{_VLLM}gemma3.py"),
            "cohere": Family(NONE, f"{_VLLM}commandr.py"),
            "cohere2": Family(NONE, f"{_VLLM}commandr.py"),
            "stablelm": Family(QKV, f"{_VLLM}stablelm.py"),
            "glm4": Family(QKV, f"{_VLLM}glm4.py"),
            "opt": Family(OPT, f"{_VLLM}opt.py"),
            "falcon": Family(FUSED, f"{_VLLM}falcon.py"),
            "bloom": Family(FUSED, f"{_VLLM}bloom.py"),
            **dict.fromkeys(["glm", "gpt_neox", "olmo2", "phi", "smollm3", "starcoder2"], _VLLM_BACKEND),
        },
    ),
    "sglang": Target(
        "sgl-project/sglang",
        "0.5.23",
        "python/sglang/srt/model_loader/auto_loader.py",
        {
            "llama": Family(ATTENTION, f"{_SGLANG}llama.py"),
            "mistral": Family(ATTENTION, f"{_SGLANG}mistral.py"),
            "phi3": Family(NONE, f"{_SGLANG}llama.py"),
            "granite": Family(NONE, f"{_SGLANG}granite.py"),
            "qwen2": Family(QKV, f"{_SGLANG}qwen2.py"),
            "qwen3": Family(ATTENTION, f"{_SGLANG}qwen3.py"),
            "gemma": Family(NONE, f"{_SGLANG}gemma.py"),
            "gemma2": Family(ATTENTION, f"{_SGLANG}gemma2.py"),
            "gemma3_text": Family(ATTENTION, f"{_SGLANG}gemma3_causal.py"),
            "cohere": Family(NONE, f"{_SGLANG}commandr.py"),
            "cohere2": Family(NONE, f"{_SGLANG}commandr.py"),
            "olmo2": Family(ATTENTION, f"{_SGLANG}olmo2.py"),
            "stablelm": Family(QKV, f"{_SGLANG}stablelm.py"),
            "glm4": Family(QKV, f"{_SGLANG}glm4.py"),
            "opt": Family(OPT, f"{_SGLANG}opt.py"),
            "phi": Family(PHI, f"{_SGLANG}phi.py"),
            "starcoder2": Family(STARCODER2, f"{_SGLANG}starcoder2.py"),
            **dict.fromkeys(["glm", "smollm3"], _SGLANG_BACKEND),
        },
    ),
    LLAMA_CPP: Target(
        "ggml-org/llama.cpp",
        "069be0ae22f391c64e26e8da4c7da0143ede8cf3",
        "",
        {
            "llama": Family(ATTENTION | MLP, "src/models/llama.cpp"),
            "qwen2": Family(QKV, "src/models/qwen2.cpp"),
        },
    ),
}


def family_of(target: str, model_type: str) -> Family | None:
    """Return how a target loads a family; None for transformers, whose layers are built and looked at.

    Raises:
        UserError: for an unknown target, or a family for which no rule of it was read.
    """
    if target not in TARGETS:
        raise UserError(f"--for {target}: there is {', '.join(TARGETS)}.{nearest(target, TARGETS)}")
    families = TARGETS[target].families
    if families is None:
        return None
    if model_type not in families:
        raise UserError(
            f"--for {target} has no rule for a {model_type} model; it has: {', '.join(sorted(families))}."
            f"{_instead(target)} Nothing was written."
        )
    return families[model_type]


def _instead(target: str) -> str:
    if target == LLAMA_CPP:
        return " Write the model by --for transformers, and give that folder to llama.cpp's own convert_hf_to_gguf.py."
    return f" --for transformers writes the model; whether {target} gives it its biases was not read."


def is_served(target: str, config: Any, suffix: str) -> bool:
    """Tell whether a bias on the linears whose names end in `suffix` reaches the answers of a target.

    The model is written as plain transformers loads it, so transformers has to have the bias too.

    Raises:
        UserError: as of `family_of`.
    """
    family = family_of(target, config.model_type)
    if family is not None and family.biases is not None and suffix not in family.biases:
        return False
    return holds_bias(config, suffix)


def source(target: str, model_type: str) -> str:
    """Return where a rule was read, in words."""
    family = family_of(target, model_type)
    if family is None:
        return "found by building one of its layers"
    where = TARGETS[target]
    return f"read in {where.repository} {where.version[:12]}, {family.file}"


def lora_servers(folder: Path) -> list[str]:
    """Return a line for each server: whether it takes a LoRA adapter of PEFT, and why not.

    Sources: vLLM 0.33.0 vllm/lora/peft_helper.py; SGLang 0.5.23 python/sglang/srt/lora/mem_pool.py and lora.py (what is
    not lora_A is taken as lora_B, a bias too; one rank for all layers; q, k and v as one matrix); llama.cpp
    convert_lora_to_gguf.py at 0b03adaa632b and src/llama-adapter.h (no biases; one alpha for all layers).

    Args:
        folder: an adapter folder.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    ranks = {config["r"], *config["rank_pattern"].values()}
    bias = "the biases of slots C, D and E" if config["lora_bias"] else ""
    saved = f"modules saved in full ({', '.join(config['modules_to_save'])})" if config["modules_to_save"] else ""
    several = f"several ranks ({', '.join(map(str, sorted(ranks)))})" if len(ranks) > 1 else ""
    adapted = {name.rpartition(".")[2] for name in config["target_modules"]}
    parts = (
        "q, k or v alone (it needs q_proj and v_proj)" if adapted & QKV and not adapted >= {"q_proj", "v_proj"} else ""
    )
    vllm_rank = next((rank for rank in VLLM_RANKS if rank >= max(ranks)), VLLM_RANKS[-1])
    refused = {"vllm": [bias, saved], "sglang": [bias, saved, several, parts], LLAMA_CPP: [bias, saved, several]}
    how = {
        "vllm": f"vllm serve BASE --enable-lora --max-lora-rank {vllm_rank} --lora-modules NAME={folder}",
        "sglang": f"--lora-paths NAME={folder}",
        LLAMA_CPP: f"convert_lora_to_gguf.py {folder}",
    }
    lines = ["PEFT takes it"]
    for target, reasons in refused.items():
        why = [reason for reason in reasons if reason]
        lines.append(f"{target} does not take {', '.join(why)}" if why else f"{target} takes it: {how[target]}")
    if bias:
        lines.append("without biases: --to lora --without C,E (what that costs is measured; --both writes both)")
    return lines
