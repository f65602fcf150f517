"""Memory that is computed: live bytes by hand, stored bytes against bitsandbytes, peaks of models within bounds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from glora_llm import recipe as recipes
from glora_llm.models.load import load_base
from glora_llm.models.random_llama import LLAMA2_7B, LLAMA2_70B, LLAMA3_8B, LlamaShape, llama_config
from glora_llm.models.resolve import ResolvedModel
from glora_llm.plan.live_storages import LiveStorages
from glora_llm.plan.memory import Sharding, at_rest, compute_memory, model_sizes, step_bytes
from glora_llm.plan.quantized_shape import QuantizedShape
from glora_llm.plan.step_memory import StepShape, measured_peak, step_peak
from glora_llm.plan.subjects import subject_here
from glora_llm.schema import AdapterSection, ModelSection

BF16 = torch.bfloat16
SHAPES = {
    "small": LlamaShape(8, 256, 704, 4, 2, 1024, 8192, "float32", 0.02),
    "LLaMA-2-7B": LLAMA2_7B,
    "Llama-3-8B": LLAMA3_8B,
    "LLaMA-2-70B": LLAMA2_70B,
}
TEACHER = "training.distill.teacher=embedded:tiny-llama"
LORA = AdapterSection(method="lora", rank=16, alpha=32.0)


@pytest.fixture
def folder_of(tmp_path: Path) -> Any:
    def write(name: str) -> Path:
        llama_config(SHAPES[name]).save_pretrained(tmp_path / name)
        return tmp_path / name

    return write


def shape(
    folder: Path, adapter: AdapterSection, rows: int = 4, tokens: int = 1024, checkpointing: bool = True
) -> StepShape:
    section = ModelSection(
        name_or_path="none", quantization="nf4", dtype="bfloat16", gradient_checkpointing=checkpointing
    )
    return StepShape(section, folder, adapter, rows, tokens, BF16)


def test_live_bytes_are_those_of_storages_that_somebody_holds() -> None:
    """By hand: 1000 floats, beside them 1000 more, of which a view costs nothing; then the first go."""
    with FakeTensorMode():
        known = torch.empty(10_000)
        with LiveStorages([known]) as live:
            first = torch.empty(1000)
            second = first + 1
            view = second.view(10, 100)
            assert live.peak == 8000
            del first
            third = torch.empty(500)
            assert live.peak == 8000, "6000 bytes are alive, less than before"
            known.add_(1)
            fourth = torch.empty(1000)
    assert live.peak == 4 * (1000 + 500 + 1000)
    assert len(view) and len(third) and len(fourth)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_stored_bytes_are_those_of_bitsandbytes(quantization: str, double: bool) -> None:
    """A real weight with a number of blocks that 256 does not divide."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt, Params4bit

    dense = nn.Linear(192, 320, bias=False, dtype=BF16)
    sizes = QuantizedShape(dense, quantization, BF16, double)
    if quantization == "int8":
        layer = Linear8bitLt(192, 320, bias=False, has_fp16_weights=False)
        layer.weight = Int8Params(dense.weight.data, requires_grad=False, has_fp16_weights=False).to("cpu")
        weight: Any = layer.weight
        state = weight.SCB.nbytes
    else:
        weight = Params4bit(
            dense.weight.data, requires_grad=False, quant_type="nf4", quant_storage=BF16, compress_statistics=double
        ).to("cpu")
        state = weight.quant_state.absmax.nbytes + weight.quant_state.code.nbytes
        if double:
            second = weight.quant_state.state2
            state += second.absmax.nbytes + second.code.nbytes + weight.quant_state.offset.nbytes
    assert sizes.stored * BF16.itemsize == weight.nbytes
    assert sizes.state_bytes == state


def test_weights_at_rest_are_those_of_a_loaded_model(tiny: ResolvedModel) -> None:
    recipe = recipes.load("tiny_cpu", ["model.quantization=nf4", "model.dtype=bfloat16"])
    model = load_base(recipe.model, tiny.folder, torch.device("cpu"))
    loaded = sum(parameter.nbytes for parameter in model.parameters())
    sizes = model_sizes(recipe, tiny.folder, BF16)
    assert sum(sizes.frozen) * BF16.itemsize == loaded
    assert sizes.state_bytes > 0


@pytest.mark.parametrize(
    ("stage", "adapter", "gradients", "optimizer", "buffers"),
    [
        ("zero0", 1e6, 2e6, 8e6, 1e6),
        ("zero1", 1e6, 2e6, 3e6, 1e8),
        ("zero2", 1e6, 1e6, 3e6, 1e8),
        ("zero3", 0.25e6, 1e6, 3e6, 5e7 + 1e9),
        ("zero2_offload", 1e6, 1e6, 0, 1e8),
    ],
)
def test_what_each_stage_divides_by_four(
    stage: str, adapter: float, gradients: float, optimizer: float, buffers: float
) -> None:
    """A million trained elements: masters and moments are 12 bytes each, 8 where there are no masters (ZeRO 0).

    Gradients are summed in float32 from stage 2 on, else in the weights' own two bytes.
    """
    sharding = Sharding.of(stage, 4)
    assert sharding.held([1_000_000]) == adapter
    assert sharding.gradient_bytes(1_000_000, width=2) == gradients
    assert sharding.optimizer_bytes(1_000_000, "adamw") == optimizer
    assert sharding.buffers(10**12, 1_000_000) == buffers
    assert sharding.held([999, 10]) == 1009, "small parameters stay whole"


def test_eight_bit_moments_are_a_quarter() -> None:
    assert Sharding.of("zero2", 1).optimizer_bytes(256_000, "adamw_8bit") == 256_000 * (4 + 2) + 2 * 4 * 1000


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_peak_is_affine_in_the_layers(folder_of: Any, checkpointing: bool) -> None:
    of = shape(folder_of("small"), AdapterSection(), tokens=256, checkpointing=checkpointing)
    assert step_peak(of) == measured_peak(of, 8) > measured_peak(of, 7)


@pytest.mark.slow
def test_the_peak_of_a_7b_shape_is_that_of_all_its_layers(folder_of: Any) -> None:
    of = shape(folder_of("LLaMA-2-7B"), AdapterSection())
    assert step_peak(of) == measured_peak(of, 32)


def test_checkpointing_and_fewer_rows_need_less(folder_of: Any) -> None:
    folder = folder_of("small")
    full = step_peak(shape(folder, AdapterSection(), checkpointing=False))
    assert step_peak(shape(folder, AdapterSection())) < 0.7 * full
    assert step_peak(shape(folder, AdapterSection(), rows=1, checkpointing=False)) < 0.5 * full


def test_a_llama_3_step_with_every_token_a_target(folder_of: Any) -> None:
    """4 x 1,024 tokens, nf4, checkpointing: 2.5 GB beside the weights, whatever the vocabulary."""
    assert step_peak(shape(folder_of("Llama-3-8B"), AdapterSection())) <= 2.5e9


def test_glora_needs_as_much_as_lora(folder_of: Any) -> None:
    """The default slots of rank 8 against LoRA of rank 16, which has as many parameters."""
    folder = folder_of("LLaMA-2-7B")
    assert step_peak(shape(folder, AdapterSection())) <= 1.03 * step_peak(shape(folder, LORA))


def test_zero_3_divides_a_70b_model_but_for_its_scales(folder_of: Any) -> None:
    """36 GB on one GPU; on eight 4.4 GB each of packed values, embeddings and head, and 1.1 GB of scales."""
    folder, recipe = folder_of("LLaMA-2-70B"), recipes.load("llama2_70b_glora")
    sizes = model_sizes(recipe, folder, BF16)
    assert sizes.state_bytes == pytest.approx(68.45e9 / 64 * (1 + 4 / 256), rel=0.01)
    one, eight = (at_rest(recipe, sizes, world, BF16, step=0) for world in (1, 8))
    assert one.base == pytest.approx(68.45e9 / 2 + sizes.state_bytes + 2 * 32000 * 8192 * 2, rel=0.01)
    assert eight.base - sizes.state_bytes == pytest.approx((one.base - sizes.state_bytes) / 8, rel=0.01)


def test_a_teacher_counts_as_the_model_that_is_loaded(tiny: ResolvedModel) -> None:
    """Every process holds it whole, in its own dtype, or packed as a base in nf4 is."""
    for dtype in ("float32", "bfloat16"):
        recipe = recipes.load("tiny_cpu", [f"training.distill.dtype={dtype}", TEACHER])
        assert recipe.training.distill is not None
        teacher = load_base(recipe.training.distill.as_model(), tiny.folder, torch.device("cpu"))
        loaded = sum(parameter.nbytes for parameter in teacher.parameters())
        assert model_sizes(recipe, tiny.folder, BF16).teacher == loaded
    packed = ["model.quantization=nf4", TEACHER, "training.distill.quantization=nf4"]
    sizes = model_sizes(recipes.load("tiny_cpu", packed), tiny.folder, BF16)
    assert sizes.teacher == sum(sizes.frozen) * BF16.itemsize + sizes.state_bytes
    assert at_rest(recipe, sizes, 4, BF16, step=0).base >= sizes.teacher


def test_half_of_llama_3_8b_trains_on_eight_gpus_of_80_gb(
    folder_of: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What the recipe's header promises: groups without weights, a teacher in nf4 on each GPU, ZeRO 3."""
    monkeypatch.setenv("GLORA_CACHE", str(tmp_path / "cache"))
    names = [f"{key}={folder_of('Llama-3-8B')}" for key in ("model.name_or_path", "training.distill.teacher")]
    recipe = recipes.load("vlora_llama3_8b_from_dense", names)
    folder, _ = subject_here(recipe, 8, "the text is not here")
    sizes = model_sizes(recipe, folder, BF16)
    linears = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    rest = 2 * 128256 * 4096 + 65 * 4096
    assert 0.48 * linears <= sum(sizes.trained) - rest <= 0.5 * linears and sizes.dense == linears + rest
    assert linears / 2 < sizes.teacher < 0.55 * linears + 2 * rest
    memory = at_rest(recipe, sizes, 8, BF16, step_bytes(recipe, folder, BF16))
    assert sizes.teacher < memory.training < 80e9


def test_an_eight_bit_base_takes_the_step_of_a_four_bit_one(folder_of: Any) -> None:
    """Both unpack the same dense matrix; the weights differ."""
    folder = folder_of("small")
    memory = {
        how: compute_memory(recipes.load("llama2_glora", [f"model.quantization={how}"]), folder, 1, BF16)
        for how in ("nf4", "int8", "none")
    }
    assert memory["int8"].step == memory["nf4"].step
    assert memory["nf4"].base < memory["int8"].base < memory["none"].base
