"""Where the checks run."""

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Context:
    """Where the checks run.

    Args:
        device: the first GPU, or the CPU.
        processes: of launched checks: one for each GPU; two on a CPU.
        out: an empty folder.
    """

    device: torch.device
    processes: int
    out: Path

    @property
    def is_rehearsal(self) -> bool:
        """True on a CPU: tiny models, and no bound on speed."""
        return self.device.type == "cpu"

    def synchronize(self) -> None:
        """Wait until the device has done all that it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def model(self) -> str:
        """The model of checks that train: a real one on a GPU, a tiny one on a CPU."""
        return "embedded:tiny-llama" if self.is_rehearsal else "embedded:smollm2-135m-instruct"

    @property
    def dtype(self) -> torch.dtype:
        """In which models compute: bfloat16 on a GPU that has it, else float32."""
        native = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
