"""Writes a Hugging Face model folder shard by shard: one shard in memory at a time, all or nothing."""

import json
import shutil
from pathlib import Path
from types import TracebackType

import torch
from safetensors.torch import save_file
from torch import Tensor

from glora_llm.errors import UserError


class FolderWriter:
    """Collects tensors into shards; the folder appears under its name when all is written.

    Args:
        out: the folder to make.
        dtype: of the written floating-point weights.
        max_shard_gb: largest file, GB.
        expected_bytes: what will be written, for the check of free space.

    Raises:
        UserError: when `out` exists, or the disk has too little space.
    """

    def __init__(self, out: Path, dtype: torch.dtype, max_shard_gb: float, expected_bytes: int):
        if out.exists():
            raise UserError(f"{out} exists already; name a new folder, or delete it.")
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < 1.05 * expected_bytes:
            raise UserError(
                f"{out.parent} has {free / 1e9:.1f} GB free; the model needs {expected_bytes / 1e9:.1f} GB."
            )
        self.out, self.dtype, self.limit = out, dtype, int(max_shard_gb * 1e9)
        self.folder = out.with_name(f".writing-{out.name}")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self._shard: dict[str, Tensor] = {}
        self._bytes, self._total = 0, 0
        self._files: list[Path] = []
        self._place: dict[str, int] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor."""
        tensor = (tensor.to(self.dtype) if tensor.is_floating_point() else tensor).cpu()
        size = tensor.numel() * tensor.element_size()
        if self._shard and self._bytes + size > self.limit:
            self._flush()
        self._shard[name] = tensor.contiguous()
        self._place[name] = len(self._files)
        self._bytes += size
        self._total += size

    def _flush(self) -> None:
        file = self.folder / f"part-{len(self._files)}.safetensors"
        save_file(self._shard, file, metadata={"format": "pt"})
        self._files.append(file)
        self._shard, self._bytes = {}, 0

    def __enter__(self) -> "FolderWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        self._flush()
        count = len(self._files)
        names = [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
        if count == 1:
            names = ["model.safetensors"]
        for file, name in zip(self._files, names, strict=True):
            file.rename(self.folder / name)
        if count > 1:
            index = {
                "metadata": {"total_size": self._total},
                "weight_map": {t: names[n] for t, n in self._place.items()},
            }
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        self.folder.rename(self.out)
