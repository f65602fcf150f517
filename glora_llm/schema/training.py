"""The sections `training`, `evaluation` and `search`: optimisation and scores."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from glora_llm.schema.distill import DistillSection
from glora_llm.schema.section import LocalPath, PositiveInt, Section, key

LARGEST_LR = 1000
Batch = Annotated[int, Field(gt=0, le=10_000_000)]
DecayRate = Annotated[float, Field(ge=0, lt=1)]


class TrainingSection(Section):
    """The optimisation. Every number has one owner: DeepSpeed's file says auto for what stands here."""

    deepspeed: LocalPath = key(
        "zero1", "a name in ds_configs/ (zero0 .. zero3, zero2_offload, zero3_offload) or a file"
    )
    global_batch: Batch = key(..., "samples (packed rows, with packing) of one optimizer step", "samples")
    micro_batch: Batch = key(..., "samples of one forward pass on one process", "samples")
    steps: PositiveInt | None = key(None, "optimizer steps (or give epochs)", "steps")
    epochs: Annotated[float, Field(gt=0, le=1_000_000)] | None = key(
        None, "passes over the training data (or give steps)", "epochs"
    )
    lr: Annotated[float, Field(gt=0)] | Literal["auto"] = key(
        ..., "peak learning rate; auto: one number for the model's width, of GLoRA and LoRA's kind", "1/step"
    )
    schedule: Literal["cosine", "linear", "constant"] = key("cosine", "after the warm-up; cosine and linear end at 0")
    warmup: Annotated[float, Field(ge=0)] = key(0.03, "below 1: share of the steps; else: steps", "share or steps")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "muon"] = key(
        "adamw",
        "torch's AdamW (DeepSpeed's CPU Adam with offload), one of bitsandbytes, or muon: torch's Muon for the "
        "matrices of the layers of a whole model, AdamW for the rest",
    )
    muon_momentum: DecayRate = key(0.95, "of Muon, with Nesterov's look-ahead")
    weight_decay: Annotated[float, Field(ge=0)] = key(0.0, "on matrices only, never on vectors, scalars or biases")
    betas: tuple[DecayRate, DecayRate] = Field((0.9, 0.999), description="Adam's decay rates", strict=False)
    eps: Annotated[float, Field(gt=0)] = key(1e-8, "Adam's epsilon")
    max_grad_norm: Annotated[float, Field(ge=0)] = key(1.0, "clip the global gradient norm; 0: do not")
    tf32: bool = key(
        False, "on a GPU, float32 matrix products in TensorFloat-32 (10 bits of mantissa): much faster, less exact"
    )
    deterministic: bool = key(
        False, "the same bits every time on the same machine: deterministic kernels; what has none is refused"
    )
    loraplus_ratio: Annotated[float, Field(gt=0)] = key(
        1.0,
        "LoRA+: of two factors, the one on the side of the outputs (B) learns this much faster",
        "x training.lr",
    )
    distill: DistillSection | None = key(None, "learn from the logits of a teacher too; none: from the tokens alone")
    seed: Annotated[int, Field(ge=0)] = key(0, "of the adapter's start, the sample order and dropout")
    log_every: PositiveInt = key(1, "steps between two lines of metrics", "steps")
    max_bad_steps: PositiveInt = key(5, "stop after so many steps in a row with a non-finite loss or gradient", "steps")

    @property
    def peak_lr(self) -> float:
        """The peak learning rate as a number: a plan puts it in the place of `auto`."""
        assert self.lr != "auto", "a plan replaces lr: auto by a number"
        return self.lr

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> "TrainingSection":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs: training.steps=null takes the recipe's away")
        if self.lr != "auto" and self.lr > LARGEST_LR:
            raise ValueError(f"lr is {self.lr:g}, and above {LARGEST_LR} nothing learns; common are 1e-5 to 1e-2")
        if self.warmup > 1 and self.warmup % 1:
            raise ValueError(f"warmup {self.warmup} is no whole number of steps; a share of the steps is below 1")
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch}: "
                "global_batch = micro_batch x accumulation x processes"
            )
        return self


class GenerateSection(Section):
    """Answers to held-out prompts, generated greedily and scored by their final number."""

    max_new_tokens: PositiveInt = key(256, "longest answer", "tokens")
    batch: PositiveInt = key(8, "prompts that one process answers at once; changes no text in float32", "prompts")
    max_rows: PositiveInt | None = key(None, "answer at most this many rows of each set (seeded choice)", "rows")
    stop: list[str] = key([], "texts that end an answer, beside the end token; they are cut off")
    score: Literal["number", "none"] = key(
        "number", "number: number_match, the final number equals the reference's; none: texts alone, no score"
    )
    samples: Annotated[int, Field(ge=0)] = key(8, "answers of each set that RUN/samples.jsonl keeps", "rows")


class EvaluationSection(Section):
    """Scores on held-out rows."""

    every: PositiveInt | None = key(None, "steps between validations; none: only at the end", "steps")
    batch: PositiveInt = key(8, "samples of one forward pass on one process; changes no score", "samples")
    max_rows: PositiveInt | None = key(None, "validate on at most this many rows during training", "rows")
    metrics: list[str] | None = key(
        None, "further scores of the task (accuracy, f1, pearson ...; docs/tasks.md); none: those of data.benchmark"
    )
    keep_best: bool | str = key(
        False,
        "keep and deploy the checkpoint that validates best, by this score (loss, exact_match ...); true: by the loss",
    )
    patience: PositiveInt | None = key(
        None, "end training after so many validations in a row without a better score", "validations"
    )
    test_before: bool = key(False, "score the test rows with the untrained adapter too")
    test: bool = key(True, "score the test rows after training; false: later, by the same command with true")
    generate: GenerateSection | None = key(
        None, "answer the test prompts after training (before it too with test_before) and in `evaluate`; none: do not"
    )
    row_scores: bool = key(False, "write the scores of every test row too: RUN/test_rows.json")
    forgetting: str | None = key(
        None, "text that is not trained on (a file, `embedded:tinyshakespeare`): its loss without and with the adapter"
    )


class SearchSection(Section):
    """The search for a path for every layer of a supernet, scored on validation rows alone."""

    strategy: Literal["additive", "evolution", "random"] = key(
        "additive",
        "additive: a surrogate model of single slots, then successive halving; evolution: the GLoRA paper's; random",
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
    passes: PositiveInt = key(
        100,
        "additive, random: forward passes over all rows for one limit; importance counts as three",
        "passes",
    )
    population: PositiveInt = key(50, "evolution: random candidates at the start, and candidates of a generation")
    parents: PositiveInt = key(10, "evolution: best candidates that breed")
    generations: PositiveInt = key(20, "evolution: generations after the first population")
    mutation_probability: Annotated[float, Field(gt=0, le=1)] = key(0.2, "evolution: of a slot, in a mutated candidate")
    finetune_steps: Annotated[int, Field(ge=0)] = key(0, "train the genome further, in RUN/finetuned", "steps")
    retrain_steps: Annotated[int, Field(ge=0)] = key(
        0, "train the genome from the start, without inherited weights, in RUN/retrained", "steps"
    )
    retrain_lr: Annotated[float, Field(gt=0)] | None = key(None, "peak rate of that; none: training.lr")
