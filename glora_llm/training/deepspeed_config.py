"""Read, check and complete a DeepSpeed configuration."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from glora_llm.errors import UserError, nearest
from glora_llm.schema import TrainingSection


def deepspeed_config_files() -> dict[str, Path]:
    """Return name -> file of the shipped DeepSpeed configurations."""
    folders = [Path(__file__).parents[2] / "ds_configs", Path(str(resources.files("glora_llm"))) / "ds_configs"]
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.json"))}


def read_deepspeed_config(name: str) -> dict[str, Any]:
    """Return a DeepSpeed configuration by name or path.

    Raises:
        UserError: when there is none, or it is not JSON.
    """
    known = deepspeed_config_files()
    path = Path(name) if name.endswith(".json") else known.get(name)
    if path is None or not path.is_file():
        raise UserError(
            f"No DeepSpeed configuration '{name}'; there is: {', '.join(known)}, or a .json file.{nearest(name, known)}"
        )
    try:
        config: Any = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no JSON object; expected keys such as zero_optimization.")
    return dict(config)


def resolve_deepspeed_config(settings: TrainingSection, dtype: torch.dtype, world: int) -> dict[str, Any]:
    """Fill the configuration's "auto" values from the recipe.

    Raises:
        UserError: when the batch does not divide, or the file fixes a number that the recipe owns to another value.
    """
    config = read_deepspeed_config(settings.deepspeed)
    stage = zero_stage(config)
    owned = {
        "train_batch_size": settings.global_batch,
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": accumulation(settings, world),
        "gradient_clipping": settings.max_grad_norm,
    }
    for key, value in owned.items():
        if config.get(key, "auto") not in ("auto", value):
            raise UserError(
                f"DeepSpeed configuration '{settings.deepspeed}' sets {key} to {config[key]}, the recipe to {value}. "
                'Write "auto" there: the recipe owns this number.'
            )
        config[key] = value
    # Stage 0 keeps float32 adapters beside a bfloat16 base; the other stages keep float32 masters of bfloat16 ones.
    half = stage > 0
    for key, wanted in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        section = dict(config.get(key, {}))
        if section.get("enabled", "auto") == "auto":
            section["enabled"] = half and dtype == wanted
        config[key] = section
    if config["bf16"]["enabled"]:
        config["bf16"].setdefault("check_grad_overflow", True)
    return config


def zero_stage(config: dict[str, Any]) -> int:
    """Return the ZeRO stage of a DeepSpeed configuration."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def offloads(config: dict[str, Any]) -> bool:
    """Tell whether a DeepSpeed configuration keeps the optimizer's states on the CPU."""
    device = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    return device not in ("none", None)


def accumulation(settings: TrainingSection, world: int) -> int:
    """Return the gradient accumulation that follows: global_batch / (micro_batch x ranks).

    Raises:
        UserError: when it is not a whole number; the message names batches that fit.
    """
    unit = settings.micro_batch * world
    if settings.global_batch % unit:
        low = settings.global_batch // unit * unit
        fits = " or ".join(str(n) for n in (low, low + unit) if n)
        raise UserError(
            f"training.global_batch {settings.global_batch} = micro_batch {settings.micro_batch} x accumulation x "
            f"{world} ranks has no whole accumulation. Use global_batch {fits}, or another micro_batch."
        )
    return settings.global_batch // unit
