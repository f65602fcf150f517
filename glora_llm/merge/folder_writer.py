"""Writes a Hugging Face model folder shard by shard: one shard in memory at a time, all or nothing."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from glora_llm.atomic import require_new, whole_folder
from glora_llm.errors import UserError
from glora_llm.failpoints import reach


@contextlib.contextmanager
def folder_writer(out: Path, dtype: torch.dtype, max_shard_gb: float, expected_bytes: int) -> Iterator["FolderWriter"]:
    """Give a writer of a new model folder, which appears under its name when the block ends.

    Args:
        out: the folder to make.
        dtype: of the written floating-point weights.
        max_shard_gb: largest file, GB.
        expected_bytes: what will be written, for the check of free space.

    Raises:
        UserError: when `out` exists, or the disk has too little space.
    """
    require_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < 1.05 * expected_bytes:
        raise UserError(f"{out.parent} has {free / 1e9:.1f} GB free; the model needs {expected_bytes / 1e9:.1f} GB.")
    with whole_folder(out) as folder:
        writer = FolderWriter(folder, dtype, int(max_shard_gb * 1e9))
        yield writer
        writer.finish()


class FolderWriter:
    """Collects tensors into shards.

    Args:
        folder: an empty folder.
        dtype: of the written floating-point weights.
        limit: largest file, bytes (one tensor where that is larger).
    """

    def __init__(self, folder: Path, dtype: torch.dtype, limit: int):
        self.folder, self.dtype, self.limit = folder, dtype, limit
        self._shard: dict[str, Tensor] = {}
        self._bytes, self._total = 0, 0
        self._files: list[Path] = []
        self._place: dict[str, int] = {}

    def add(self, name: str, tensor: Tensor, keep_dtype: bool = False) -> None:
        """Write one tensor; with `keep_dtype` a floating-point one in its own dtype."""
        tensor = (tensor.to(self.dtype) if tensor.is_floating_point() and not keep_dtype else tensor).cpu()
        size = tensor.numel() * tensor.element_size()
        if self._shard and self._bytes + size > self.limit:
            self._flush()
        self._shard[name] = tensor.contiguous()
        self._place[name] = len(self._files)
        self._bytes += size
        self._total += size

    def _flush(self) -> None:
        reach("merge.before_shard")
        file = self.folder / f"part-{len(self._files)}.safetensors"
        save_file(self._shard, file, metadata={"format": "pt"})
        self._files.append(file)
        self._shard, self._bytes = {}, 0

    def finish(self) -> None:
        """Write the last shard, name the shards as transformers expects them, and write their index."""
        self._flush()
        reach("merge.after_shards")
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
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
