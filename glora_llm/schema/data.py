"""The section `data`: the samples."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from glora_llm.errors import UserError
from glora_llm.schema.benchmarks import benchmark_of
from glora_llm.schema.images import ImagesSection
from glora_llm.schema.section import PositiveInt, Section, Share, key


class DataSection(Section):
    """The samples, and their way to tokens, or to images of one size."""

    benchmark: str | None = key(
        None, "a public data set (docs/tasks.md): fills the keys of this section that the recipe leaves out"
    )
    format: str = key(..., "alpaca, prompt_completion, chat, text, classification or images (docs/data_formats.md)")
    source: str | list[str] = key(
        ..., "file(s) (json, jsonl, csv, parquet, txt), a folder of them, a hub id, or `embedded:NAME`"
    )
    subset: str | None = key(None, "configuration name of a hub data set")
    split: str = key("train", "split of a hub data set or folder that is trained on")
    validation: Share | PositiveInt | str | None = key(
        None, "share or number of training rows held out, or a split name, or a file", "share or rows"
    )
    test: Share | PositiveInt | str | None = key(
        None, "the same for the rows scored before and after training, never used to choose", "share or rows"
    )
    max_rows: PositiveInt | None = key(None, "use at most this many training rows (seeded choice)", "rows")
    max_test_rows: PositiveInt | None = key(None, "use at most this many test rows (seeded choice)", "rows")
    columns: dict[str, str] | None = key(None, "role of the format -> name of the column, where they differ")
    labels: list[str] | None = key(None, "classification: the label words, by class number")
    prompt: str | None = key(None, "classification and prompt_completion: template such as 'Review: {text}\\nMood:'")
    system: str | None = key(None, "system message put before every conversation")
    chat_template: Literal["auto", "tokenizer", "none"] = key(
        "auto", "auto: the tokenizer's template for format chat, plain text for the others"
    )
    bos: Literal["auto", "always", "never"] = key("auto", "begin with the BOS token; auto: as the family does")
    max_tokens: Annotated[int, Field(ge=0)] = key(0, "longest sequence, 2 or more; 0 for images alone", "tokens")
    overlong: Literal["error", "drop", "truncate", "split"] = key("error", "what happens to longer samples")
    packing: bool = key(False, "several samples in one row, without attention between them")
    bad_rows: Literal["error", "skip"] = key(
        "error", "records that cannot be used: error lists the first ten; skip leaves them out and counts them"
    )
    max_bad_rows: Share = key(0.01, "bad_rows: skip stops when more than this share of a source is bad", "share")
    images: ImagesSection | None = key(None, "format images: size and augmentation; none: all defaults")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        """Add what the benchmark says to the keys that are not given; a key that is given as null stays null."""
        name = given.get("benchmark") if isinstance(given, dict) else None
        if not isinstance(name, str):
            return given
        try:
            return benchmark_of(name).settings() | given
        except UserError as error:
            raise ValueError(f"benchmark: {str(error).removesuffix('.')}") from None

    @model_validator(mode="after")
    def _text_or_images(self) -> "DataSection":
        if self.format == "images":
            return self
        if self.images is not None:
            raise ValueError(f"images belongs to format images, not to '{self.format}': data.images=null takes it away")
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens is {self.max_tokens}; text needs 2 or more: the longest sequence in tokens")
        return self
