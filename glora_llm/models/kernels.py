"""Liger's fused norms, rotary embedding and SwiGLU on one model, without changing other models of the process."""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from glora_llm.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ROPE = "apply_rotary_pos_emb"


def uses_liger(choice: str, model_type: str, device: "torch.device") -> bool:
    """Say whether `model.kernels` means Liger here, before anything is loaded.

    Args:
        choice: `none`; `auto` (on a GPU, when liger_kernel is installed and knows the family); `liger` (or fail).

    Raises:
        UserError: `liger` where it is impossible.
    """
    if choice == "none":
        return False
    obstacle = _obstacle(model_type, device)
    if obstacle and choice == "liger":
        raise UserError(f"model.kernels is liger, but {obstacle}. Set model.kernels to auto or none.")
    return not obstacle


def apply_liger(model: "PreTrainedModel") -> None:
    """Apply Liger's kernels to `model` in place (see `uses_liger` for when it can be)."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    modeling = import_module(type(model).__module__)
    before = dict(vars(modeling))
    # the head stays ours: the loss calls it on the positions that count, Liger's would replace the whole forward
    _apply_liger_kernel_to_instance(
        model=model,
        rope=True,
        rms_norm=True,
        swiglu=True,
        geglu=True,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
    )
    _contain(modeling, before)


def _obstacle(model_type: str, device: "torch.device") -> str:
    """Return why Liger cannot be used, or an empty string."""
    if device.type != "cuda":
        return f"the model is on the {device.type} and its kernels need a GPU"
    if find_spec("liger_kernel") is None:
        return "liger_kernel is not installed (pip install liger-kernel)"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"it has no kernels for model type '{model_type}'"
    return ""


def _contain(modeling: ModuleType, before: dict[str, Any]) -> None:
    """Undo what Liger changed in transformers' own module beyond the instance.

    It replaces the classes there, so a model built on the CPU later would get GPU kernels. Only the rotary embedding
    works through the module: it stays, and hands tensors that are not on a GPU to the original.
    """
    patched = getattr(modeling, ROPE, None)
    for name, value in before.items():
        if getattr(modeling, name, None) is not value:
            setattr(modeling, name, value)
    original = before.get(ROPE)
    if patched is None or original is None or patched is original or hasattr(original, "by_device"):
        return

    def rotary(q: "torch.Tensor", *args: Any, **kwargs: Any) -> Any:
        return (patched if q.is_cuda else original)(q, *args, **kwargs)

    rotary.by_device = True  # type: ignore[attr-defined]
    setattr(modeling, ROPE, rotary)
