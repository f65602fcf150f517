"""Let torch compute the same bits every time, and refuse what has no way to."""

import os

import torch

from glora_llm.errors import UserError
from glora_llm.schema import Recipe

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # cuBLAS sums in a fixed order only with one of these (NVIDIA's documentation)
WORKSPACES = (":4096:8", ":16:8")


def compute_deterministically() -> None:
    """Choose deterministic kernels for this process; call it before anything is computed.

    Raises:
        UserError: when the environment asks cuBLAS for another workspace.
    """
    given = os.environ.setdefault(WORKSPACE, WORKSPACES[0])
    if given not in WORKSPACES:
        raise UserError(
            f"training.deterministic is set, and the environment variable {WORKSPACE} is '{given}'; expected "
            f"{' or '.join(WORKSPACES)}. Unset it."
        )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def check_deterministic(recipe: Recipe, device: torch.device) -> None:
    """Check that a recipe uses nothing that has no deterministic way on this device.

    Raises:
        UserError: naming the setting, why, and what to use.
    """
    model, training = recipe.model, recipe.training
    obstacle = ""
    if training.optimizer.endswith("8bit"):
        obstacle = (
            f"training.optimizer {training.optimizer} quantises its moments anew when a run goes on, with scales that "
            "may differ by float32 rounding. Use adamw"
        )
    elif model.compile:
        obstacle = "model.compile chooses kernels by timing them. Set model.compile=false"
    elif device.type == "cuda" and model.attention != "eager":
        obstacle = (
            f"model.attention {model.attention} adds the gradients of keys and values in varying order on a GPU. Set "
            "model.attention=eager"
        )
    elif device.type == "cuda" and model.kernels != "none":
        obstacle = f"of the kernels that model.kernels {model.kernels} means, no order is known. Set model.kernels=none"
    elif device.type == "cuda" and model.quantization == "int8":
        obstacle = "of bitsandbytes' int8 products, no order is known. Set model.quantization=nf4 or none"
    if obstacle:
        raise UserError(f"training.deterministic is set, and {obstacle}; or set training.deterministic=false.")
