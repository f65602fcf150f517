"""The section `data`: the samples."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from glora_llm.errors import UserError
from glora_llm.schema.benchmarks import benchmark_of
from glora_llm.schema.images import ImagesSection
from glora_llm.schema.section import PositiveInt, Section, Share, key


class DataSection(Section):
    """The samples, and their way to tokens, or to images of one size."""

    benchmark: str | None = key(
        None, "a public data set (docs/tasks.md): fills the keys of this section that the recipe leaves out"
    )
    format: str = key(
        ..., "alpaca, prompt_completion, chat, text, classification, multiple_choice or images (docs/data_formats.md)"
    )
    source: str | list[str] = key(
        ..., "file(s) (json, jsonl, csv, parquet, txt), a folder of them, a hub id, or `embedded:NAME`"
    )
    subset: str | None = key(None, "configuration name of a hub data set")
    revisions: dict[str, str] | None = key(
        None,
        "hub data set -> commit, branch or tag; none: the newest, which base.json notes for the run to go on with",
    )
    split: str = key("train", "split of a hub data set or folder that is trained on")
    validation: Share | PositiveInt | str | None = key(
        None, "share or number of training rows held out, or a split name, or a file", "share or rows"
    )
    test: Share | PositiveInt | str | dict[str, str] | None = key(
        None,
        "the same for the rows scored before and after training, never used to choose; or several test sets, name -> "
        "split, file, folder or hub id: each is scored by itself",
        "share or rows",
    )
    shots: PositiveInt | None = key(
        None, "few-shot: train on so many records of each class, drawn by shots_seed; none: on all", "records"
    )
    shots_seed: Annotated[int, Field(ge=0)] | None = key(None, "of the draw of shots; none: training.seed")
    max_rows: PositiveInt | None = key(None, "use at most this many training rows (seeded choice)", "rows")
    max_test_rows: PositiveInt | None = key(None, "use at most this many test rows (seeded choice)", "rows")
    columns: dict[str, str] | None = key(None, "role of the format -> name of the column, where they differ")
    labels: list[str] | None = key(
        None, "classification: the label words, by class number; multiple_choice: the names that answers have"
    )
    options: list[str] | None = key(
        None, "multiple_choice: the columns of the options, one each; none: the column `options` lists them"
    )
    prompt: str | None = key(
        None, "classification, multiple_choice and prompt_completion: template such as 'Review: {text}\\nMood:'"
    )
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

    @field_validator("test", mode="after")
    @classmethod
    def _names_of_tests(cls, test: Any) -> Any:
        if isinstance(test, dict) and not test:
            raise ValueError("an empty mapping: give name: SOURCE for each test set, or null for none")
        odd = [name for name in test if not re.fullmatch(r"\w[\w.-]*", name)] if isinstance(test, dict) else []
        if odd:
            raise ValueError(f"'{odd[0]}' names a test set, and should be letters, digits, _, . or - alone")
        return test

    @model_validator(mode="after")
    def _shots_of_classes(self) -> "DataSection":
        if self.shots is None:
            if self.shots_seed is not None:
                raise ValueError("shots_seed is of the draw of shots: set data.shots=N, or data.shots_seed=null")
            return self
        if self.format not in ("classification", "images"):
            raise ValueError(
                f"shots are records of each class, and format '{self.format}' has no classes (classification and "
                "images have): data.shots=null takes it away; max_rows takes a number of records"
            )
        if self.max_rows is not None:
            raise ValueError("shots and max_rows both say how many records are trained on: set one of them to null")
        return self

    @model_validator(mode="after")
    def _text_or_images(self) -> "DataSection":
        if self.format == "images":
            return self
        if self.images is not None:
            raise ValueError(f"images belongs to format images, not to '{self.format}': data.images=null takes it away")
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens is {self.max_tokens}; text needs 2 or more: the longest sequence in tokens")
        return self
