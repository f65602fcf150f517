"""Memory that each GPU of a launch needs, by part: computed from shapes, never measured.

Weights, gradients and optimizer states follow from numbers of elements, the ZeRO stage and the number of processes;
what a step needs beside them is found by `step_memory`. Not counted: CUDA's context and libraries, and what the
allocator loses to fragmentation; `RESERVE` is what to leave free for them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from glora_llm.adapters.inject import inject
from glora_llm.models.load import meta_model
from glora_llm.plan.step_memory import StepShape, quantized_shapes, step_peak, without_start
from glora_llm.plan.teacher import teacher_bytes
from glora_llm.schema import ModelSection, Recipe
from glora_llm.training.deepspeed_config import offloads, read_deepspeed_config, zero_stage
from glora_llm.vlora import allocated, to_dense

GB = 1e9
RESERVE = 1e9  # bytes; a guess
FLOAT32 = 4  # bytes of an element
# bytes of both moments of a trained element on the GPU; paged ones may leave it for the CPU
MOMENTS = {"adamw": 8.0, "adamw_8bit": 2 * (1 + 4 / 256), "paged_adamw": 0.0, "paged_adamw_8bit": 0.0}
MOMENTS["muon"] = 8.0  # at most: matrices of the layers have one moment, 4 bytes, and one of them is whole at a time
TRACED_METHODS = ("glora", "lora", "rslora", "full")
# and those whose step without values holds what a real one does (tests/plan/test_traced_methods.py), though of
# most no whole run was measured: `glora-llm plan` computes them, and no launch is refused by it
FOLLOWED_METHODS: tuple[str, ...] = (*TRACED_METHODS, "dora", "adalora", "beft", "boft", "c3a", "deft", "delora")
FOLLOWED_METHODS += ("gralora", "hira", "hra", "ia3", "lily", "ln_tuning", "lora_dropout", "lors", "miss", "oft", "osf")
FOLLOWED_METHODS += ("peanut", "psoft", "pvera", "randlora", "repadapter", "road", "ssf", "supertuning", "vera")
FOLLOWED_METHODS += ("houlsby", "pfeiffer", "adaptformer", "parallel_adapter", "compacter")


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    Args:
        base: frozen weights, those of a teacher too.
        adapter: trained weights as the model computes with them.
        gradients: of the trained weights, kept over the micro batches of a step.
        optimizer: float32 masters and moments.
        buffers: in which DeepSpeed reduces gradients, and gathers the parameters that ZeRO 3 divides.
        step: most that forward and backward of one micro batch need beside all of that.
        loading: most that is held while the weights are loaded.
    """

    base: int
    adapter: int
    gradients: int
    optimizer: int
    buffers: int
    step: int
    loading: int

    @property
    def training(self) -> int:
        """The most that is held while it trains."""
        return sum(getattr(self, item.name) for item in fields(self) if item.name != "loading")

    @property
    def peak(self) -> int:
        """The most that is ever held."""
        return max(self.training, self.loading)

    def parts(self) -> str:
        """Return the parts of `training` in words, GB each."""
        names = [item.name for item in fields(self) if item.name != "loading"]
        return ", ".join(f"{name} {getattr(self, name) / GB:.2f}" for name in names)


@dataclass(frozen=True)
class Sharding:
    """The division of a model over `world_size` processes by a DeepSpeed configuration, in numbers of elements."""

    stage: int
    world_size: int
    zero: dict[str, Any]
    optimizer_on_cpu: bool
    gradients_in_float32: bool

    @classmethod
    def of(cls, name: str, world_size: int) -> "Sharding":
        """Read a DeepSpeed configuration by name or path."""
        config = read_deepspeed_config(name)
        summed_in = config.get("data_types", {}).get("grad_accum_dtype")
        return cls(
            zero_stage(config), world_size, config.get("zero_optimization", {}), offloads(config), summed_in == "fp32"
        )

    def held(self, sizes: Iterable[int]) -> int:
        """Return how much of these parameters stands on one GPU at rest: small ones whole, also under ZeRO 3."""
        if self.stage < 3:
            return sum(sizes)
        small = int(self.zero.get("stage3_param_persistence_threshold", 1e5))
        on_cpu = self.zero.get("offload_param", {}).get("device", "none") not in ("none", None)
        return sum(size if size <= small else 0 if on_cpu else self.share(size) for size in sizes)

    def share(self, size: int) -> int:
        """Return the part of one process."""
        return -(-size // self.world_size)

    def gradient_bytes(self, trained: int, width: int) -> int:
        """Return the bytes of gradients that one GPU keeps.

        Args:
            width: bytes of an element of a trained weight.
        """
        kept = self.share(trained) if self.stage >= 2 else trained
        return kept * (FLOAT32 if self.gradients_in_float32 else width)

    def optimizer_bytes(self, trained: int, name: str) -> int:
        """Return the bytes of masters and moments on one GPU; stage 0 has no masters beside the weights."""
        if self.optimizer_on_cpu:
            return 0
        if self.stage == 0:
            return round(MOMENTS[name] * trained)
        return round((FLOAT32 + MOMENTS[name]) * self.share(trained))

    def buffers(self, whole: int, trained: int) -> int:
        """Return the size of DeepSpeed's buffers: gradients on their way, and gathered parameters.

        Args:
            whole: all parameters of the model.
        """
        if self.stage == 0:
            return trained if self.world_size > 1 else 0  # gradients, flattened for one all_reduce
        bucket = int(self.zero.get("reduce_bucket_size", 5e8))
        if self.stage < 3:
            return bucket * (2 if self.zero.get("overlap_comm") else 1)
        return bucket + min(whole, int(self.zero.get("stage3_max_live_parameters", 1e9)))


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of elements of a model with its adapter, parameter by parameter.

    Args:
        frozen: of the frozen parameters as they are stored; packed values count as elements of the dtype.
        trained: of the trained ones.
        state_bytes: scales and codes of quantised weights, which are never divided.
        largest: of the largest weight before it is quantised.
        packed: of the packed values of quantised weights, which are among `frozen`.
        dense: of the model that it is merged into.
        vocabulary: tokens, or 0.
        teacher: bytes of the weights of a teacher, which every process holds whole.
    """

    frozen: list[int]
    trained: list[int]
    state_bytes: int
    largest: int
    packed: int = 0
    dense: int = 0
    vocabulary: int = 0
    teacher: int = 0


def compute_memory(recipe: Recipe, folder: Path, world_size: int, dtype: torch.dtype) -> Memory:
    """Return what one GPU of a launch needs.

    Args:
        folder: of the base model; its config.json alone is read.
        world_size: processes of the launch, with a GPU each.
        dtype: in which the model computes.
    """
    return at_rest(recipe, model_sizes(recipe, folder, dtype), world_size, dtype, step_bytes(recipe, folder, dtype))


def at_rest(recipe: Recipe, sizes: ModelSizes, world_size: int, dtype: torch.dtype, step: int) -> Memory:
    """Return the memory of one of `world_size` GPUs, of which a step needs `step` bytes beside all that stays."""
    sharding = Sharding.of(recipe.training.deepspeed, world_size)
    trained, width = sum(sizes.trained), adapter_dtype(recipe, dtype).itemsize
    base = sharding.held(sizes.frozen) * dtype.itemsize + sizes.state_bytes + sizes.teacher
    return Memory(
        base=base,
        adapter=sharding.held(sizes.trained) * width,
        gradients=sharding.gradient_bytes(trained, width),
        optimizer=sharding.optimizer_bytes(trained, recipe.training.optimizer),
        buffers=sharding.buffers(sum(sizes.frozen) + trained, trained) * width,
        step=step,
        loading=base + sizes.largest * dtype.itemsize,
    )


def model_sizes(recipe: Recipe, folder: Path, dtype: torch.dtype) -> ModelSizes:
    """Build the model on the meta device, inject the adapter and count."""
    section = in_dtype(dtype, recipe)
    model = meta_model(section, folder)
    largest = max(parameter.numel() for parameter in model.parameters())
    vocabulary = getattr(model.config.get_text_config(decoder=True), "vocab_size", 0)
    dense = sum(parameter.numel() for parameter in model.parameters())
    if allocated(model).dense:  # layers share weights, and a merge writes each
        dense = sum(parameter.numel() for parameter in to_dense(meta_model(section, folder)).parameters())
    quantized = {
        id(model.get_submodule(name).weight): shape for name, shape in quantized_shapes(model, section).items()
    }
    adapted = inject(model, without_start(recipe.adapter), seed=0, steps=1)
    frozen = [parameter for parameter in adapted.parameters() if not parameter.requires_grad]
    return ModelSizes(
        [quantized[id(item)].stored if id(item) in quantized else item.numel() for item in frozen],
        [parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad],
        sum(shape.state_bytes for shape in quantized.values()),
        largest,
        sum(shape.stored for shape in quantized.values()),
        dense,
        vocabulary,
        teacher_bytes(recipe, dtype),
    )


def step_bytes(recipe: Recipe, folder: Path, dtype: torch.dtype) -> int:
    """Return the most that a micro batch of full rows needs beside weights and gradients; every token is a target."""
    rows, tokens = recipe.training.micro_batch, recipe.data.max_tokens
    shape = StepShape(in_dtype(dtype, recipe), folder, recipe.adapter, rows, tokens, adapter_dtype(recipe, dtype))
    return step_peak(shape)


def not_computable(recipe: Recipe) -> str | None:
    """Return why the memory of a recipe cannot be computed; None: it can."""
    if recipe.data.format == "images":
        return "not computed for image classifiers"
    if recipe.head:
        return "not computed for heads"
    if recipe.adapter.method not in TRACED_METHODS:
        return f"not computed for adapter.method {recipe.adapter.method}"
    return None


def in_dtype(dtype: torch.dtype, recipe: Recipe) -> ModelSection:
    """Return the model section with the dtype that `auto` comes to."""
    return recipe.model.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})


def adapter_dtype(recipe: Recipe, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of trained weights in the model: ZeRO 0 keeps no float32 masters beside them."""
    return torch.float32 if zero_stage(read_deepspeed_config(recipe.training.deepspeed)) == 0 else dtype
