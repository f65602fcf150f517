"""Find and read the files of a foreign adapter; no pickle is read."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from glora_llm.adapters.start import ADAPTER_WEIGHTS
from glora_llm.adapters.weights import adapter_fault
from glora_llm.errors import UserError

CONFIG = "adapter_config.json"
READ = (
    "Read are PEFT's LoRA, HiRA, IA3 and GLoRA (a folder with adapter_config.json and adapter_model.safetensors) and "
    "LyCORIS's GLoRA (a .safetensors file, or a folder that holds one)."
)


@dataclass(frozen=True)
class ForeignFiles:
    """The files of a foreign adapter.

    Attributes:
        path: as it was given.
        config: adapter_config.json; None: there is none, as with LyCORIS.
        weights: the safetensors file.
    """

    path: Path
    config: dict[str, Any] | None
    weights: Path

    @property
    def base_name(self) -> str | None:
        """The name of the base in adapter_config.json, or None."""
        name = (self.config or {}).get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    def read(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors of the file, on the CPU, and its metadata.

        Raises:
            UserError: when it is no safetensors file, or is cut off.
        """
        try:
            with safe_open(self.weights, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                return tensors, opened.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.weights} is damaged, or no safetensors file: {error}. Copy it again.") from error


def find_files(path: Path) -> ForeignFiles:
    """Return the files of an adapter; of the weights, only that they are there is looked at.

    Args:
        path: a folder, or a .safetensors file.

    Raises:
        UserError: when it is no adapter that is read here, naming those that are.
    """
    if path.is_file() and path.suffix == ".safetensors":
        if path.name != ADAPTER_WEIGHTS:
            return ForeignFiles(path, None, path)
        path = path.parent
    if not path.is_dir():
        raise UserError(f"{path} is {'no .safetensors file' if path.exists() else 'not there'}. {READ}")
    if (path / CONFIG).is_file():
        weights = path / ADAPTER_WEIGHTS
        if not weights.is_file():
            pickled = (path / "adapter_model.bin").is_file()
            why = (
                " Its adapter_model.bin is a pickle, which is not read: save the adapter by PEFT anew."
                if pickled
                else ""
            )
            raise UserError(f"{path} holds {CONFIG} and no {ADAPTER_WEIGHTS}.{why}")
        problem = adapter_fault(path)
        if problem:
            raise UserError(f"{path} is damaged: {problem}.")
        return ForeignFiles(path, _read_config(path / CONFIG), weights)
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        found = "no safetensors file" if not files else f"{len(files)} safetensors files and no {CONFIG}: name one"
        raise UserError(f"{path} holds {found}. {READ}")
    return ForeignFiles(path, None, files[0])


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON: {error}. Copy the adapter again.") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} holds a {type(config).__name__}; expected an object, as PEFT writes it.")
    return config
