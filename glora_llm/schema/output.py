"""The sections `merge` and `output`: the results of a run."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from glora_llm.schema.section import LocalPath, PositiveInt, Section, key


class MergeSection(Section):
    """The merge after training, and its bounds."""

    after_training: bool = key(False, "merge as soon as training ends")
    dtype: Literal["float32", "bfloat16", "float16"] = key("bfloat16", "dtype of the written weights")
    max_shard_gb: Annotated[float, Field(gt=0)] = key(5.0, "largest file of the merged model", "GB")
    min_top1_agreement: Annotated[float, Field(ge=0, le=1)] = key(
        0.97, "fail below this share of equal most likely tokens, merged against unmerged"
    )
    max_loss_change: Annotated[float, Field(gt=0)] = key(
        0.02, "fail above this change of the loss, merged against unmerged", "nats/token"
    )
    min_nf4_top1_agreement: Annotated[float, Field(ge=0, le=1)] = key(
        0.8, "fail below this share for the model that quantize makes, against unmerged; the dense one stays"
    )
    quantize: Literal["none", "nf4", "nf4_lossless"] = key(
        "none",
        "nf4: write the merged model in 4 bits, with the base's own codes where the slots allow that, else quantised "
        "again, and report what it costs; nf4_lossless: refuse all that changes a code",
    )


class OutputSection(Section):
    """The run folder."""

    dir: LocalPath = key(
        ...,
        "the run folder: recipe.yaml, metrics.jsonl, summary.json, tensorboard/, checkpoints/, adapter/ or model/",
    )
    save_every: PositiveInt = key(100, "steps between checkpoints", "steps")
    keep: PositiveInt = key(2, "newest checkpoints that are kept")
    max_hours: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = key(
        None, "after so long this launch ends as if told to: a checkpoint, exit code 75; null: never", "hours"
    )
    stop_after: PositiveInt | None = key(
        None,
        "end this launch after this step, with a checkpoint and exit code 75; the schedule stays that of all steps",
        "steps",
    )
    trackers: list[Literal["wandb", "trackio"]] = key(
        [], "experiment trackers beside TensorBoard, each a package to install: wandb, trackio"
    )
    keep_sample: bool = key(
        True, "keep sample.json, up to 16 samples of the data (256 tokens each), by which a merge is compared"
    )
    resume: Literal["auto", "never", "must"] = key(
        "auto",
        "auto: go on from the newest complete checkpoint; never: refuse a folder with checkpoints; must: need one",
    )

    @field_validator("dir", mode="after")
    @classmethod
    def _is_a_name(cls, folder: str) -> str:
        if not folder.strip() or "\0" in folder:
            raise ValueError(f"{folder!r} names no folder: give the run one of its own, such as runs/mine")
        return folder
