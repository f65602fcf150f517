"""Every key of a recipe: type, unit, default, meaning. `docs/recipe_reference.md` is generated from this file.

Strict: an unknown key or a value of another type is an error. Nothing here imports torch.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Slot = Literal["A", "B", "C", "D", "E"]
Mode = Literal["lora", "vector", "scalar", "none"]
Share = Annotated[float, Field(gt=0, lt=1)]
PositiveInt = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """Base of all sections: no unknown keys, no coercion by looks, read-only once made."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


def key(default: Any, text: str, unit: str = "", **limits: Any) -> Any:
    """Return a field with its meaning and its unit; `...` as default makes it required."""
    return Field(default, description=text, json_schema_extra={"unit": unit} if unit else None, **limits)


class ModelSection(Section):
    """The base model, which stays frozen."""

    name_or_path: str = key(..., "a folder, a hub id, a .gguf file, or `embedded:NAME` (`glora-llm recipes --models`)")
    revision: str | None = key(None, "hub revision (branch, tag or commit)")
    quantization: Literal["none", "nf4", "fp4", "int8"] = key("none", "how bitsandbytes stores the frozen weights")
    double_quantization: bool = key(True, "nf4 and fp4: quantise the block scales too")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "auto", "what the frozen weights are computed in; auto: bfloat16 on a GPU that has it, else float32"
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = key(
        "auto", "attention backend of transformers; auto: sdpa"
    )
    kernels: Literal["auto", "liger", "none"] = key("auto", "auto: Liger kernels on a GPU where they are installed")
    gradient_checkpointing: bool = key(False, "recompute activations in the backward pass (non-reentrant)")


class SlotSetting(Section):
    """One slot of a path, where the rank or alpha differs from the adapter's."""

    mode: Mode = key(..., "how the slot is parameterised")
    rank: PositiveInt | None = key(None, "rank of mode lora; none: adapter.rank")
    alpha: Annotated[float, Field(gt=0)] | None = key(None, "none: adapter.alpha")


Slots = dict[Slot, Mode | SlotSetting]


class SupernetSection(Section):
    """What `adapter.paths: sample` draws from: at every micro step each layer draws a path of these."""

    modes: dict[Slot, list[Mode]] | None = key(None, "modes allowed, by slot; a slot that is not named may be any")
    ranks: list[PositiveInt] = key([8, 4, 2], "ranks of mode lora; smaller ones share the first columns of the largest")
    draws: Literal["shared", "per_rank"] = key("shared", "whether all ranks draw the same paths")


class AdapterSection(Section):
    """What is trained: GLoRA, one of its presets, or any method of PEFT."""

    method: str = key("glora", "glora, or a PEFT method: lora, rslora, dora, adalora, ia3, ...")
    preset: Literal["lora", "ssf", "repadapter", "bitfit", "ia3_like", "hira"] | None = key(
        None, "a system that GLoRA generalises, as slots (instead of `slots`)"
    )
    targets: str | list[str] = key("all-linear", "all-linear, a list of module names, or one regular expression")
    rank: PositiveInt = key(8, "rank of every slot in mode lora")
    alpha: Annotated[float, Field(gt=0)] = key(16.0, "a slot in mode lora is scaled by alpha / rank")
    rank_stabilized: bool = key(False, "scale by alpha / sqrt(rank) instead (rsLoRA)")
    composition: Literal["product", "hadamard"] = key("product", "A in mode lora: W0 (A_d A_u), or W0 * (A_d A_u)")
    slots: Slots | None = key(None, "mode (or mode, rank, alpha) by slot; default A lora, B lora, C vector, E vector")
    paths: dict[str, Slots] | Literal["sample"] | None = key(
        None,
        "slots of single layers: regular expression on the module name -> slots, the last match wins; or `sample`: "
        "train a supernet, from which a search chooses the slots of each layer",
    )
    supernet: SupernetSection | None = key(None, "what `paths: sample` draws from; none: everything")
    genome: str | None = key(None, "a genome file (a search writes RUN/genome.json): the slots of every layer")
    weights: str | None = key(None, "an adapter folder to begin with, of the same slots (what a genome inherits)")
    dropout: Annotated[float, Field(ge=0, lt=1)] = key(0.0, "dropout of the input of the low-rank factors")
    lr_factors: dict[Slot, Annotated[float, Field(ge=0)]] | None = key(
        None, "factor on training.lr by slot; what is not named keeps its measured default", "x training.lr"
    )
    modules_to_save: list[str] | None = key(None, "modules trained and saved in full beside the adapter")
    peft: dict[str, Any] | None = key(None, "further arguments of the PEFT method's own config class")

    @property
    def is_supernet(self) -> bool:
        """Whether paths are drawn while it trains."""
        return self.paths == "sample"

    @model_validator(mode="after")
    def _one_source_of_slots(self) -> "AdapterSection":
        if self.preset and self.slots:
            raise ValueError("preset and slots exclude each other: adapter.slots=null takes the recipe's slots away")
        chosen = [n for n in ("preset", "slots", "paths", "genome") if getattr(self, n) is not None]
        if len(chosen) > 1 and ("genome" in chosen or self.is_supernet):
            name = "genome" if "genome" in chosen else "paths: sample"
            raise ValueError(f"{name} says all about the slots: adapter.{chosen[0]}=null takes {chosen[0]} away")
        if self.supernet and not self.is_supernet:
            raise ValueError("supernet is what `paths: sample` draws from: set adapter.paths=sample")
        only_glora = ("preset", "slots", "paths", "genome", "lr_factors")
        given = [n for n in only_glora if getattr(self, n) is not None]
        if self.method != "glora" and given:
            raise ValueError(
                f"{given[0]} belongs to method glora, not to '{self.method}': adapter.{given[0]}=null takes it away"
            )
        if self.method == "glora" and self.peft:
            raise ValueError("peft holds arguments of PEFT's own methods; glora has keys of its own")
        return self


class ImagesSection(Section):
    """Format images: their size, their scale, and how they are varied in training (never in evaluation)."""

    size: PositiveInt | None = key(
        None, "side of the square that every image is resized to; none: they are squares of one size already", "pixels"
    )
    mean: list[float] | None = key(None, "of each channel, taken away; none: that of the training images", "0 to 1")
    std: list[Annotated[float, Field(gt=0)]] | None = key(
        None, "of each channel, divided by; none: that of the training images", "0 to 1"
    )
    crop_padding: Annotated[int, Field(ge=0)] = key(0, "pad by so much and cut a random square; 0: do not", "pixels")
    flip: bool = key(False, "mirror half of the images, left to right")
    randaugment: Annotated[int, Field(ge=0, le=10)] = key(0, "RandAugment: operations on each image; 0: none")
    randaugment_magnitude: Annotated[int, Field(ge=1, le=29)] = key(9, "RandAugment: their strength, of 30")
    mixup: Annotated[float, Field(ge=0, le=1)] = key(0.0, "share of images blended with another, labels too", "share")
    cutmix: Annotated[float, Field(ge=0, le=1)] = key(
        0.0, "share of images with a rectangle of another, labels too", "share"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = key(
        0.0, "share of each target that is spread over all classes", "share"
    )

    @model_validator(mode="after")
    def _fits(self) -> "ImagesSection":
        if self.mixup + self.cutmix > 1:
            raise ValueError(
                f"mixup {self.mixup} + cutmix {self.cutmix} is more than 1: an image takes part in one of them at most"
            )
        for name in ("mean", "std"):
            given = getattr(self, name)
            if given is not None and len(given) != 3:
                raise ValueError(f"{name} has {len(given)} numbers; expected 3: red, green and blue")
        return self


class DataSection(Section):
    """Where samples come from and how they become tokens, or images of one size."""

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
    images: ImagesSection | None = key(None, "format images: size and augmentation; none: all defaults")

    @model_validator(mode="after")
    def _text_or_images(self) -> "DataSection":
        if self.format == "images":
            return self
        if self.images is not None:
            raise ValueError(f"images belongs to format images, not to '{self.format}': data.images=null takes it away")
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens is {self.max_tokens}; text needs 2 or more: the longest sequence in tokens")
        return self


class TrainingSection(Section):
    """The optimisation. Every number has one owner: DeepSpeed's file says auto for what stands here."""

    deepspeed: str = key("zero1", "a name in ds_configs/ (zero0 .. zero3, zero2_offload, zero3_offload) or a file")
    global_batch: PositiveInt = key(..., "samples (packed rows, with packing) of one optimizer step", "samples")
    micro_batch: PositiveInt = key(..., "samples of one forward pass on one rank", "samples")
    steps: PositiveInt | None = key(None, "optimizer steps (or give epochs)", "steps")
    epochs: Annotated[float, Field(gt=0)] | None = key(None, "passes over the training data (or give steps)", "epochs")
    lr: Annotated[float, Field(gt=0)] = key(..., "peak learning rate", "1/step")
    schedule: Literal["cosine", "linear", "constant"] = key("cosine", "after the warm-up; cosine and linear end at 0")
    warmup: Annotated[float, Field(ge=0)] = key(0.03, "below 1: share of the steps; else: steps", "share or steps")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = key(
        "adamw", "torch's AdamW (DeepSpeed's CPU Adam with offload), or one of bitsandbytes"
    )
    weight_decay: Annotated[float, Field(ge=0)] = key(0.0, "on matrices only, never on vectors, scalars or biases")
    betas: tuple[float, float] = Field((0.9, 0.999), description="Adam's decay rates", strict=False)
    eps: Annotated[float, Field(gt=0)] = key(1e-8, "Adam's epsilon")
    max_grad_norm: Annotated[float, Field(ge=0)] = key(1.0, "clip the global gradient norm; 0: do not")
    loraplus_ratio: Annotated[float, Field(gt=0)] = key(
        1.0, "LoRA+: the zero-initialised factor learns this much faster", "x training.lr"
    )
    seed: Annotated[int, Field(ge=0)] = key(0, "of the adapter's start, the sample order and dropout")
    log_every: PositiveInt = key(1, "steps between two lines of metrics", "steps")
    max_bad_steps: PositiveInt = key(5, "stop after so many steps in a row with a non-finite loss or gradient", "steps")

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> "TrainingSection":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs: training.steps=null takes the recipe's away")
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch}: "
                "global_batch = micro_batch x accumulation x ranks"
            )
        return self


class EvaluationSection(Section):
    """Scores on held-out rows."""

    every: PositiveInt | None = key(None, "steps between validations; none: only at the end", "steps")
    batch: PositiveInt = key(8, "samples of one forward pass on one rank; changes no score", "samples")
    max_rows: PositiveInt | None = key(None, "validate on at most this many rows during training", "rows")
    test_before: bool = key(False, "score the test rows with the untrained adapter too")


class SearchSection(Section):
    """The search for a path for every layer of a supernet, scored on validation rows alone."""

    strategy: Literal["additive", "evolution", "random"] = key(
        "additive", "additive: effects of single slots, fitted and raced; evolution: the GLoRA paper's; random"
    )
    budget: list[str] | str | int | float | None = key(
        None, "limit such as 0.5M, 250k or a number; several (a list, or 1.0M,0.5M) give one genome each", "limit"
    )
    limit: Literal["parameters", "seconds", "megabytes"] = key(
        "parameters", "what budget limits: parameters, or what the slots add to a step, measured for every mode"
    )
    metric: Literal["loss", "exact_match", "label_accuracy"] = key("loss", "score of a candidate on validation rows")
    max_rows: PositiveInt | None = key(None, "score on at most this many validation rows (seeded choice)", "rows")
    seed: Annotated[int, Field(ge=0)] = key(0, "of the search's draws")
    passes: PositiveInt = key(100, "additive, random: forward passes over all rows for one limit", "passes")
    population: PositiveInt = key(50, "evolution: random candidates at the start, and candidates of a generation")
    parents: PositiveInt = key(10, "evolution: best candidates that breed")
    generations: PositiveInt = key(20, "evolution: generations after the first population")
    mutation_probability: Annotated[float, Field(gt=0, le=1)] = key(0.2, "evolution: of a slot, in a mutated candidate")
    finetune_steps: Annotated[int, Field(ge=0)] = key(0, "train the genome further, in RUN/finetuned", "steps")


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
    quantize: Literal["none", "nf4"] = key("none", "re-quantise the merged model, and report what that costs")


class OutputSection(Section):
    """The run folder."""

    dir: str = key(
        ..., "the run folder: recipe.yaml, metrics.jsonl, summary.json, tensorboard/, checkpoints/, adapter/"
    )
    save_every: PositiveInt = key(100, "steps between checkpoints", "steps")
    keep: PositiveInt = key(2, "newest checkpoints that are kept")
    resume: Literal["auto", "never", "must"] = key(
        "auto",
        "auto: go on from the newest complete checkpoint; never: refuse a folder with checkpoints; must: need one",
    )


class Recipe(Section):
    """One run."""

    description: str = key("", "one line for `glora-llm recipes`")
    model: ModelSection
    adapter: AdapterSection = AdapterSection()
    data: DataSection
    training: TrainingSection
    evaluation: EvaluationSection = EvaluationSection()
    search: SearchSection | None = None
    merge: MergeSection = MergeSection()
    output: OutputSection
