"""Load what a run trained, or the model that it was merged into, for scoring in a single process."""

from pathlib import Path
from typing import Any

import torch

from glora_llm.errors import UserError
from glora_llm.launch.device import choose_device
from glora_llm.models.families import auto_class
from glora_llm.plan.plan import Plan

NOT_ENDED = "holds no model: the run has not ended. Train on, or name a checkpoint by --step."


def load_adapted(plan: Plan, adapter: Path) -> Any:
    """Return the base as it was trained on, with the adapter of that folder; or the model that was trained as a whole.

    Raises:
        UserError: when the folder holds nothing that was trained.
    """
    from peft import PeftModel

    import glora_llm.glora  # noqa: F401 - registers the tuner
    from glora_llm.models.load import load_base

    if plan.recipe.adapter.is_full:
        if not (adapter / "config.json").is_file():
            raise UserError(f"{adapter} {NOT_ENDED}")
        return load_base(plan.recipe.model, adapter, choose_device(), zero3=False)
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(f"{adapter} holds no adapter: the run has not ended. Train on, or name a checkpoint by --step.")
    base = load_base(plan.recipe.model, plan.base.folder, choose_device(), zero3=False)
    return PeftModel.from_pretrained(base, str(adapter)).get_base_model().eval()


def load_merged(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """Return a merged model, loaded by plain transformers (in float32 on a CPU).

    Raises:
        UserError: when the folder holds no model.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds no merged model (no config.json): write one by `glora-llm merge RUN --out {folder}`."
        )
    chosen: Any = dtype or ("auto" if choose_device().type == "cuda" else torch.float32)
    kind = auto_class(AutoConfig.from_pretrained(folder, local_files_only=True).model_type)
    return kind.from_pretrained(folder, dtype=chosen, local_files_only=True).to(choose_device()).eval()
