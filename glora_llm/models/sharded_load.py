"""Loading under ZeRO 3: every weight is divided over the processes as it is read, so none ever holds the whole model.

Left to itself, DeepSpeed moves a loaded model whole to the device of every process and divides it afterwards. Here
transformers loads the model as always (it renames, fuses, quantises and reports), one tensor after the other, and each
parameter is divided in the moment in which a module gets it. A process holds its shard, the tensor that is being read,
and, of a 4-bit weight, the scales of its blocks, which are never divided.

Every process reads every tensor. Dividing is a collective, so the processes of a machine read the same tensor at the
same time: it comes from the disk once and from the system's cache of files for the others, and each has the scales of
4-bit blocks without a protocol for sending them. Tensors are read into memory of their own rather than mapped, because
the pages of a mapped file count as the process's memory until it is closed.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from glora_llm.models.families import model_class
from glora_llm.models.fingerprint import weight_files
from glora_llm.vlora.partitioned import is_partitioned


class Shards:
    """Divides parameters over the processes of this launch, one at a time, in the form of DeepSpeed's ZeRO 3.

    A divided parameter is an empty tensor of its own dtype whose `ds_tensor` is this process's part. The process group
    must exist.

    Args:
        config: what `deepspeed.initialize` will get.
    """

    def __init__(self, config: Mapping[str, Any]):
        import deepspeed

        self.is_main_process = torch.distributed.get_rank() == 0
        # zero.Init divides whole modules; each parameter that it has divided can have others divided as it was itself.
        first = nn.ParameterList([nn.Parameter(torch.zeros(1, dtype=torch.float32, device="cpu"))])
        deepspeed.zero.Init(module=first, config_dict_or_path=dict(config))
        self._divide: Callable[..., None] = first[0].convert_to_zero_parameters

    def divide(self, parameter: nn.Parameter) -> None:
        """Divide one parameter; the values are the main process's. All processes must call it in the same order."""
        if not is_partitioned(parameter):
            self._divide(param_list=[parameter])


def load_divided(folder: Path, config: Any, shards: Shards, settings: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return what transformers' `from_pretrained` does for `folder`, divided, and its report of missing tensors.

    Args:
        config: of the model, as loaded from `folder`.
        settings: further arguments, among them the `device_map`.
    """
    # Where a file holds both of two tied tensors, transformers compares their values, so these are divided at the end.
    text = config.get_text_config()
    tied_rows = text.vocab_size if text.tie_word_embeddings else None
    stored = stored_tensors(folder)
    with _divided_as_registered(shards, tied_rows), _one_at_a_time():
        model, report = model_class(config).from_pretrained(
            None, config=config, state_dict=stored, output_loading_info=True, **settings
        )
    for parameter in model.parameters():
        shards.divide(parameter)
    model.name_or_path = model.config.name_or_path = str(folder)
    return model, report


def stored_tensors(folder: Path) -> dict[str, Any]:
    """Return name -> tensor of a model folder, each read when it is indexed by `[...]`, into memory of its own."""
    from safetensors import safe_open

    files = [safe_open(file, framework="pt", backend="pread") for file in weight_files(folder)]
    return {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118 - it is no dict


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Make modules whose parameters have shapes and no values (meta), while buffers are computed as always."""

    def drop(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.data.to("meta"), requires_grad=parameter.requires_grad)

    with _hooked(drop):
        yield


@torch.no_grad()
def fill(
    model: nn.Module, values: Mapping[str, Any], dtype: torch.dtype, device: torch.device, shards: Shards | None
) -> None:
    """Give a model its values, parameter by parameter, and divide each at once.

    Args:
        model: some or all of whose parameters may be without values.
        values: name -> tensor, or what becomes one by `[...]`; a parameter that is not there gets the main process's.
        dtype: of the parameters.
        device: of parameters and buffers.
        shards: None leaves every parameter whole.
    """
    for name, parameter in model.named_parameters():
        if name in values:
            whole = values[name][...].to(device, dtype)
        else:
            whole = torch.empty(parameter.shape, dtype=dtype, device=device)
        if parameter.is_meta:  # swapped, because several modules may hold it
            torch.utils.swap_tensors(parameter, nn.Parameter(whole, requires_grad=parameter.requires_grad))
        else:
            parameter.data = whole
        if shards is not None:
            shards.divide(parameter)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


@contextlib.contextmanager
def _divided_as_registered(shards: Shards, tied_rows: int | None) -> Iterator[None]:
    def divide(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta and parameter.shape[:1] != (tied_rows,):
            shards.divide(parameter)

    with _hooked(divide):
        yield


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Let transformers read a tensor only when the one before has its place, and reserve no memory for all of them."""
    from transformers import modeling_utils

    with (
        mock.patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"),
        mock.patch.object(modeling_utils, "caching_allocator_warmup", lambda *_: None),
    ):
        yield


@contextlib.contextmanager
def _hooked(hook: Callable[..., Any]) -> Iterator[None]:
    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()
