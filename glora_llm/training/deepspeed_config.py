"""DeepSpeed's configuration file: read, checked and completed from the recipe, once a launch."""

import json
import re
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from glora_llm.errors import UserError, nearest
from glora_llm.files.json_file import read_object
from glora_llm.files.links import dangling
from glora_llm.schema import TrainingSection

if TYPE_CHECKING:
    import torch

OLDEST = (0, 19, 8)  # older versions cast float32 buffers to the model's dtype: wrong rotary angles in bfloat16
SECTIONS = ("zero_optimization", "bf16", "fp16", "data_types")
# What else may stand at the top of a file. DeepSpeed says nothing of a name that it does not know, and ignores it.
OTHER_KEYS = (
    *("activation_checkpointing", "aio", "allgather_size", "checkpoint", "comms_logger", "communication_data_type"),
    *("compile", "csv_monitor", "comet", "dataloader_drop_last", "disable_allgather", "disable_python_gc"),
    *("dump_state", "flops_profiler", "gradient_allreduce_op", "gradient_clipping", "gradient_predivide_factor"),
    *("log_level", "memory_breakdown", "prescale_gradients", "steps_per_print", "tensorboard", "timers"),
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "wall_clock_breakdown"),
    *("wandb", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
)
RECIPE_OWNS = {"optimizer": "training.optimizer, lr, betas, eps", "scheduler": "training.schedule and training.warmup"}


@dataclass(frozen=True)
class DeepSpeedConfig:
    """A DeepSpeed configuration for one launch, without any "auto" that the recipe decides.

    Args:
        name: as the recipe gives it: one of ds_configs/, or a file.
        values: what `deepspeed.initialize` takes.
        stage: of ZeRO.
        offloads: the optimizer's states are kept on the CPU.
    """

    name: str
    values: dict[str, Any]
    stage: int
    offloads: bool

    @property
    def accumulation(self) -> int:
        """Micro batches of one process in an optimizer step."""
        return int(self.values["gradient_accumulation_steps"])


def deepspeed_config_files() -> dict[str, Path]:
    """Return name -> file of the shipped DeepSpeed configurations."""
    folders = [Path(__file__).parents[2] / "ds_configs", Path(str(resources.files("glora_llm"))) / "ds_configs"]
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.json"))}


def resolve_deepspeed_config(
    settings: TrainingSection, dtype: "torch.dtype", world_size: int | None
) -> DeepSpeedConfig:
    """Read a DeepSpeed configuration and fill its "auto" values from the recipe.

    Args:
        dtype: what the frozen weights are computed in.
        world_size: processes of the launch; None: nothing is trained, and the accumulation stays as the file says.

    Raises:
        UserError: when DeepSpeed is too old, the file is not there or holds what DeepSpeed does not take, the batch
            does not divide, or the file fixes a number that the recipe owns to another value.
    """
    import torch

    _require_version()
    values = read_deepspeed_config(settings.deepspeed)
    owned = {
        "train_batch_size": settings.global_batch,
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_clipping": settings.max_grad_norm,
    }
    if world_size is not None:
        owned["gradient_accumulation_steps"] = accumulation(settings, world_size)
    for key, value in owned.items():
        if values.get(key, "auto") not in ("auto", value):
            raise UserError(
                f"DeepSpeed configuration '{settings.deepspeed}' sets {key} to {values[key]}, the recipe to {value}. "
                'Write "auto" there: the recipe owns this number.'
            )
        values[key] = value
    stage = zero_stage(values)
    # Stage 0 keeps float32 adapters beside a bfloat16 base; the other stages keep float32 masters of bfloat16 ones.
    for key, wanted in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        section = dict(values.get(key, {}))
        if section.get("enabled", "auto") == "auto":
            section["enabled"] = stage > 0 and dtype == wanted
        values[key] = section
    if values["bf16"]["enabled"] and dtype != torch.bfloat16:
        raise UserError(
            f"DeepSpeed configuration '{settings.deepspeed}' sets bf16.enabled to true, and the recipe computes in "
            f'{str(dtype).removeprefix("torch.")}. Write "auto" there, or set model.dtype=bfloat16.'
        )
    if values["bf16"]["enabled"]:
        values["bf16"].setdefault("check_grad_overflow", True)
    if settings.optimizer != "adamw":  # DeepSpeed would refuse what it does not know by name
        values.setdefault("zero_allow_untested_optimizer", True)
    resolved = DeepSpeedConfig(settings.deepspeed, values, stage, offloads(values))
    _check_accumulation_dtype(resolved)
    return resolved


def zero_stage(values: dict[str, Any]) -> int:
    """Return the ZeRO stage of a DeepSpeed configuration."""
    return int(values.get("zero_optimization", {}).get("stage", 0))


def offloads(values: dict[str, Any]) -> bool:
    """Tell whether a DeepSpeed configuration keeps the optimizer's states on the CPU."""
    device = (values.get("zero_optimization", {}).get("offload_optimizer") or {}).get("device", "none")
    return device not in ("none", None)


def accumulation(settings: TrainingSection, world_size: int) -> int:
    """Return the gradient accumulation that follows: global_batch / (micro_batch x processes).

    Raises:
        UserError: when it is not a whole number; the message names batches that fit.
    """
    unit = settings.micro_batch * world_size
    if settings.global_batch % unit:
        low = settings.global_batch // unit * unit
        fits = " or ".join(str(n) for n in (low, low + unit) if n)
        raise UserError(
            f"training.global_batch {settings.global_batch} = micro_batch {settings.micro_batch} x accumulation x "
            f"{world_size} processes has no whole accumulation. Use global_batch {fits}, or another micro_batch."
        )
    return settings.global_batch // unit


def _require_version() -> None:
    installed = metadata.version("deepspeed")
    if tuple(int(part) for part in re.findall(r"\d+", installed)[:3]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UserError(
            f"DeepSpeed {installed} is installed, and older ones than {oldest} round float32 buffers to the model's "
            f"dtype, which makes rotary angles wrong. Install it: pip install 'deepspeed>={oldest}'"
        )


def find_deepspeed_config(name: str) -> Path:
    """Return the file of a DeepSpeed configuration by name or path.

    Raises:
        UserError: when there is none; the message lists the shipped ones.
    """
    known = deepspeed_config_files()
    path = Path(name) if name.endswith(".json") else known.get(name)
    if path is not None and (link := dangling(path)):
        raise UserError(f"There is no DeepSpeed configuration {name}.{link}")
    if path is None or not path.is_file():
        raise UserError(
            f"No DeepSpeed configuration '{name}'; there is: {', '.join(known)}, or a .json file.{nearest(name, known)}"
        )
    return path


def read_deepspeed_config(name: str) -> dict[str, Any]:
    """Return a DeepSpeed configuration by name or path, checked as far as that needs no recipe.

    Raises:
        UserError: when there is none, or it holds what DeepSpeed does not take.
    """
    path = find_deepspeed_config(name)
    values = read_object(path, "Expected are keys such as zero_optimization.")
    allowed = (*SECTIONS, *OTHER_KEYS)
    for key in values:
        if key in RECIPE_OWNS:
            raise UserError(f"{path}: the recipe owns the {key} ({RECIPE_OWNS[key]}). Remove this section.")
        if key not in allowed:
            raise UserError(
                f"{path}: '{key}' is no section that is known here, and DeepSpeed ignores names that it does not know."
                f"{nearest(key, allowed)} Known: {', '.join(allowed)}"
            )
    _check_sections(path, values)
    return dict(values)


def _check_sections(path: Path, values: dict[str, Any]) -> None:
    """Check the sections that decide how training runs by DeepSpeed's own models of them."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    for name in SECTIONS:
        section = values.get(name, {})
        if not isinstance(section, dict):
            raise UserError(f"{path}: {name} is {json.dumps(section)}, and must be an object: {{...}}.")
        if section.get("enabled", "auto") not in ("auto", True, False):
            raise UserError(f'{path}: {name}.enabled is {json.dumps(section["enabled"])}; use true, false or "auto".')
        if name in models:
            _validate(models[name], section, f"{path}: {name}")
    stage = values.get("zero_optimization", {}).get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage is {json.dumps(stage)}; there are 0, 1, 2 and 3.")
    if values.get("bf16", {}).get("enabled") is True and values.get("fp16", {}).get("enabled") is True:
        raise UserError(f"{path}: bf16 and fp16 are both enabled. Enable one of them.")
    if (values.get("zero_optimization", {}).get("offload_optimizer") or {}).get("device") == "nvme":
        raise UserError(f"{path}: optimizer states on nvme cannot be saved here. Offload them to the cpu.")
    if values.get("data_types", {}).get("grad_accum_dtype") not in (None, "fp32", "bf16", "fp16"):
        raise UserError(f"{path}: data_types.grad_accum_dtype must be fp32, bf16 or fp16.")


def _validate(model: type[BaseModel], section: dict[str, Any], place: str) -> None:
    try:
        model(**section)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        unknown = first["type"] == "extra_forbidden"
        hint = nearest(key, model.model_fields) if unknown else ""
        said = "there is no such key" if unknown else f"{first['msg']}, got {json.dumps(first['input'], default=str)}"
        raise UserError(f"{place}.{key}: {said}.{hint}") from None


def _check_accumulation_dtype(config: DeepSpeedConfig) -> None:
    """Check that float32 accumulation is asked for only where DeepSpeed's optimizer of this stage can be saved."""
    wanted = config.values.get("data_types", {}).get("grad_accum_dtype")
    if wanted == "fp32" and config.values["bf16"]["enabled"] and config.stage < 2:
        raise UserError(
            f"DeepSpeed configuration '{config.name}' accumulates gradients in float32 (data_types.grad_accum_dtype) "
            f"under ZeRO {config.stage} in bfloat16, which DeepSpeed does by another optimizer, whose states cannot "
            "be saved here. Use zero2, or take grad_accum_dtype away."
        )
