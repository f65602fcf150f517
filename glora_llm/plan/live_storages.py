"""The storages that are alive while something runs on torch's fake tensors: their most, and what it consists of."""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveStorages(TorchDispatchMode):
    """Adds up the storages that are made while it is active, and remembers the most that were alive together.

    Args:
        known: tensors that were there before; they are not counted.

    Attributes:
        part: field of `StepParts` that what is made now belongs to.
        peak: bytes.
        at_peak: the same by part.
    """

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.live: dict[int, tuple[StorageWeakRef, int, str]] = {}
        self.total = 0  # bytes of `live`, of which some may have gone already
        self.peak = 0
        self.part = "activations"
        self.at_peak: dict[str, int] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        if self.total > self.peak:  # only then does it matter which have gone
            gone = [key for key, (storage, *_) in self.live.items() if storage.expired()]
            self.total -= sum(self.live.pop(key)[1] for key in gone)
            if self.total > self.peak:
                self.peak, self.at_peak = self.total, self._by_part()
        return result

    def _by_part(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for _, size, part in self.live.values():
            found[part] = found.get(part, 0) + size
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        held = self.live.get(key)
        if held is not None and not held[0].expired():
            return
        self.total += storage.nbytes() - (held[1] if held else 0)  # an address may serve again
        self.live[key] = (StorageWeakRef(storage), storage.nbytes(), self.part)
