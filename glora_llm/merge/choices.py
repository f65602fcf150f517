"""What `glora-llm merge` is asked for."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MergeChoices:
    """The options of a merge.

    Attributes:
        dtype: of the written weights; None: the recipe's merge.dtype.
        to: `model`, or `lora` for a plain LoRA adapter.
        quantize: `nf4` writes 4 bits, `nf4_lossless` only where no code changes; None: the recipe's merge.quantize.
        step: a kept checkpoint; None: the end of the run.
        genome: of a supernet; None: RUN/genome.json.
        compared: False: the result is not compared with the unmerged model, and the report says so.
    """

    dtype: str | None = None
    to: str = "model"
    quantize: str | None = None
    step: int | None = None
    genome: Path | None = None
    compared: bool = True

    @property
    def is_usual(self) -> bool:
        """True for the model that the run's own merge would write."""
        return self.genome is None and self.to == "model" and self.step is None
