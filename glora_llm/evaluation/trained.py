"""Load what a run trained, or the model that it was merged into, for a single process.

A model whose weights would take more than 0.8 of a GPU's free memory is not loaded whole: its layers are read one by
one as they are called (`evaluation.streamed`), or, where that cannot be done, it computes on the CPU.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

import glora_llm.adapters.own  # noqa: F401 - registers its methods
from glora_llm.adapters.methods import KEEP_BASE_VALUES
from glora_llm.adapters.prompt_arguments import PROMPT_METHODS
from glora_llm.adapters.prompts import accept_prompt, install_prompt
from glora_llm.adapters.start import ADAPTER_WEIGHTS, saved_config
from glora_llm.adapters.tuner import ModuleTuner
from glora_llm.errors import UserError
from glora_llm.evaluation.streamed import WeightStream, hollow_model
from glora_llm.glora.dense_model import dense_linear
from glora_llm.glora.frozen_weight import dense_weight
from glora_llm.glora.model import GLoRAModel
from glora_llm.launch.device import choose_device
from glora_llm.models.config_file import load_config
from glora_llm.models.families import auto_class
from glora_llm.models.fingerprint import fingerprint, stored_bytes
from glora_llm.models.folder import WEIGHTS, read_sharing, write_trained_config
from glora_llm.models.load import compute_dtype, linear_names, load_base, meta_model
from glora_llm.models.matrices import is_transposed
from glora_llm.models.quantised import quantised_linear
from glora_llm.models.stored import copy_tensors
from glora_llm.plan.plan import Plan
from glora_llm.schema import ModelSection

NOT_ENDED = "the run has not ended. Train on, or name a checkpoint by --step."
MOST_OF_FREE = 0.8  # of a GPU's free memory, for weights; the rest is for what is computed
BYTES_QUANTISED = {"int8": 1.0, "nf4": 0.57, "fp4": 0.57}  # a weight, the scales of its block included


def load_adapted(
    plan: Plan, adapter: Path, dtype: torch.dtype | None = None, gradients: bool = False, dense: bool = False
) -> Any:
    """Return the base as it was trained on, with the adapter of that folder; or the model that was trained as a whole.

    Args:
        dtype: what the base computes in; None: what the recipe says.
        gradients: they will be asked for, so the weights must be there in a backward pass too.
        dense: unpack quantised weights, so that int8 layers do not round what they are given.

    Raises:
        UserError: when the folder holds nothing that was trained.
    """
    folder, section = _trained_base(plan, adapter), _in_dtype(plan.recipe.model, dtype)
    where = choose_device()
    if not fits(weight_bytes(section, folder, where), where):
        streamed = None if gradients else stream_adapted(plan, adapter, where, dtype)
        if streamed is not None:
            return streamed
        where = torch.device("cpu")
    base = load_base(section, folder, where)
    if dense and section.quantization != "none":
        _unpack(base, compute_dtype(section, where))
    if plan.recipe.adapter.is_full:
        return base
    return _with_adapter(base, adapter, base.device)


def _with_adapter(model: Any, adapter: Path, device: torch.device) -> Any:
    """Return a base model with the adapter of a folder in it, without PEFT's wrapper.

    Raises:
        UserError: when weights of a method of our own are not those of its configuration: PEFT would leave them out.
    """
    from peft import PeftModel, get_peft_model_state_dict

    method = (saved_config(adapter) or {}).get("peft_type", "").lower()
    with accept_prompt(model, method) if method in PROMPT_METHODS else contextlib.nullcontext():
        adapted = PeftModel.from_pretrained(model, str(adapter), torch_device=str(device))
    if method in PROMPT_METHODS:
        install_prompt(adapted)
    tuner = adapted.base_model
    own = f".{tuner.prefix}" if isinstance(tuner, GLoRAModel | ModuleTuner) else None
    if own is not None:
        expected = {name for name in get_peft_model_state_dict(adapted, save_embedding_layers=False) if own in name}
        with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as opened:
            stored = {name for name in opened.keys() if own in name}  # noqa: SIM118
        odd = sorted(expected ^ stored)
        if odd:
            said = "lacks" if odd[0] in expected else "has, and its configuration has not,"
            raise UserError(f"{adapter} is damaged: it {said} {odd[0]}. Put a copy of the adapter back.")
    return adapted.get_base_model().eval()


@contextlib.contextmanager
def whole_model(plan: Plan, model: Path, checkpoint: Path | None) -> Iterator[Path]:
    """Give the folder of a model that was trained as a whole: the run's own, or one of a checkpoint, removed again.

    Args:
        model: RUN/model.
        checkpoint: a whole checkpoint of the run; None: the end of the run.

    Raises:
        UserError: when the run has not ended, or its model is damaged.
    """
    if checkpoint is None:
        if not (model / "config.json").is_file():
            raise UserError(f"{model} holds no model: {NOT_ENDED}")
        fingerprint(model)  # reads the table of the weights: a file that was cut off is refused
        yield model
        return
    place = Path(tempfile.mkdtemp(prefix=".merge-", dir=model.parent))
    try:
        config = load_config(plan.base.folder)
        write_trained_config(place, config, read_sharing(plan.base.folder), torch.float32)
        copy_tensors(checkpoint / "state.safetensors", place / WEIGHTS, "master/")
        plan.task.save_preprocessing(place)
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def stream_adapted(
    plan: Plan,
    adapter: Path,
    where: torch.device,
    dtype: torch.dtype | None = None,
    title: str = "",
    dense: bool = False,
) -> Any | None:
    """Return the model of `load_adapted` with its weights read layer by layer; None where that cannot be done.

    Args:
        title: of a progress bar over the layers of a forward pass; empty: no bar.
        dense: as of `load_adapted`.

    Raises:
        UserError: when the folder holds nothing that was trained.
    """
    folder, section = _trained_base(plan, adapter), plan.recipe.model
    if plan.recipe.adapter.method in KEEP_BASE_VALUES:
        return None
    dtype = dtype or compute_dtype(section, where)
    hollow = hollow_model(folder, dtype, where)
    if hollow is None:
        return None
    if section.quantization != "none" and any(is_transposed(linear) for linear in hollow.linears):
        return None  # the files hold the transpose of what is quantised
    model = hollow.model
    if not plan.recipe.adapter.is_full:
        model = _with_adapter(model, adapter, where)
    quantise = partial(_unpacked_linear if dense else quantised_linear, section=section, dtype=dtype, device=where)
    WeightStream(hollow, None if section.quantization == "none" else quantise, title)
    return model


def _unpacked_linear(weight: Tensor, section: ModelSection, dtype: torch.dtype, device: torch.device) -> nn.Linear:
    """Return a dense linear that holds the values of `quantised_linear` of the same weight (O, I)."""
    return dense_linear(dense_weight(quantised_linear(weight, section, dtype, device), dtype), None, dtype)


def _unpack(base: Any, dtype: torch.dtype) -> None:
    """Replace the quantised linears of a loaded model by dense ones that hold the same values."""
    for name in linear_names(base):
        layer = base.get_submodule(name)
        base.set_submodule(name, dense_linear(dense_weight(layer, dtype), layer.bias, dtype))


def load_merged(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """Return a merged model, loaded by plain transformers (in float32 on a CPU).

    Raises:
        UserError: when the folder holds no model.
    """
    config, where = _merged_config(folder), choose_device()
    if not fits(stored_bytes(folder), where):
        streamed = stream_merged(folder, where)
        if streamed is not None:
            return streamed
        where = torch.device("cpu")
    chosen: Any = dtype or ("auto" if where.type == "cuda" else torch.float32)
    return (
        auto_class(config)
        .from_pretrained(folder, dtype=chosen, local_files_only=True, use_safetensors=True, trust_remote_code=False)
        .to(where)
        .eval()
    )


def stream_merged(folder: Path, where: torch.device, title: str = "") -> Any | None:
    """Return the model of `load_merged` with its weights read layer by layer; None where that cannot be done.

    Args:
        title: of a progress bar over the layers of a forward pass; empty: no bar.

    Raises:
        UserError: when the folder holds no model.
    """
    config = _merged_config(folder)
    hollow = hollow_model(folder, config.dtype if where.type == "cuda" else torch.float32, where)
    if hollow is None:
        return None
    WeightStream(hollow, title=title)
    return hollow.model


def fits(size: int, where: torch.device) -> bool:
    """Tell whether weights of `size` bytes leave room for computing on a GPU; what a CPU has is not asked."""
    return where.type != "cuda" or size <= MOST_OF_FREE * torch.cuda.mem_get_info(where)[0]


def weight_bytes(section: ModelSection, folder: Path, where: torch.device) -> int:
    """Return the bytes of a base's weights once they are loaded as the section says, estimated from their shapes."""
    model, each = meta_model(section, folder), compute_dtype(section, where).itemsize
    numbers = sum(parameter.numel() for parameter in model.parameters())
    if section.quantization == "none":
        return numbers * each
    quantised = sum(model.get_submodule(name).weight.numel() for name in linear_names(model))
    return int((numbers - quantised) * each + quantised * BYTES_QUANTISED[section.quantization])


def _trained_base(plan: Plan, adapter: Path) -> Path:
    """Return the folder of the weights that are loaded: of the base, or of the model that was trained as a whole."""
    if plan.recipe.adapter.is_full:
        if not (adapter / "config.json").is_file():
            raise UserError(f"{adapter} holds no model: {NOT_ENDED}")
        return adapter
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(f"{adapter} holds no adapter: {NOT_ENDED}")
    return plan.base.folder


def _in_dtype(section: ModelSection, dtype: torch.dtype | None) -> ModelSection:
    return section if dtype is None else section.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})


def _merged_config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds no merged model (no config.json): write one by `glora-llm merge RUN --out {folder}`."
        )
    return load_config(folder)
