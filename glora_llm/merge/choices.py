"""The options of one `glora-llm merge`."""

from dataclasses import dataclass
from pathlib import Path

from glora_llm.errors import UserError

TRANSFORMERS, LLAMA_CPP = "transformers", "llama.cpp"


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
        target: what will serve the model, a name of `targets.TARGETS`; None: plain transformers, without being asked.
        without: slots that are left out; with a target, of those layers alone in which it would drop them.
        both: of `lora`: write the whole adapter beside the one without those slots.
        max_loss_change: by how much leaving slots out may raise the loss, nats/token; None: merge.max_loss_change.
    """

    dtype: str | None = None
    to: str = "model"
    quantize: str | None = None
    step: int | None = None
    genome: Path | None = None
    compared: bool = True
    target: str | None = None
    without: tuple[str, ...] = ()
    both: bool = False
    max_loss_change: float | None = None

    @property
    def is_usual(self) -> bool:
        """True for the model that the run's own merge would write."""
        usual = self.genome is None and self.to == "model" and self.step is None
        return usual and self.target is None and not self.without

    def check(self, quantize: str, is_full: bool) -> None:
        """Check that the options fit each other.

        Args:
            quantize: of the command line, else of the recipe.
            is_full: the run trained a whole model.

        Raises:
            UserError: naming two that do not.
        """
        if is_full and self.to == "lora":
            raise UserError("--to lora exports GLoRA adapters, and this run trained a whole model. Use --to model.")
        if self.to == "lora" and (self.dtype or quantize != "none"):
            raise UserError("--dtype and --quantize are for --to model; a LoRA is written in float32.")
        if self.to == "lora" and self.target is not None:
            raise UserError(
                f"--for {self.target} writes a whole model, and --to lora an adapter: leave one of them out. An export "
                "says which servers take it."
            )
        if self.target == LLAMA_CPP and quantize != "none":
            raise UserError(
                "--for llama.cpp writes a GGUF file, and nf4 is a format of bitsandbytes: leave --quantize out (or "
                "--quantize none), and quantise the file by llama.cpp's llama-quantize."
            )
        if self.both and not (self.to == "lora" and self.without):
            raise UserError("--both writes two adapters, whole and without slots: give --to lora --without C,E too.")
        if self.max_loss_change is not None and not self.without:
            raise UserError("--max-loss-change bounds what --without costs, and no slots are left out.")
