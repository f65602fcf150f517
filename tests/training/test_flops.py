"""The formula against a count of the matrix products that really ran."""

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from glora_llm.data.batch import collate
from glora_llm.data.store import Row
from glora_llm.glora import GLoRAConfig
from glora_llm.training.flops import ModelCost, bf16_peak, measure_cost, peak_flops
from glora_llm.training.objectives import CausalLMObjective
from glora_llm.vlora import VLoRAConfig, make_compounds

HIDDEN, LAYERS, ROWS, WIDTH = 96, 3, 4, 64
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=160, vocab_size=200, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager", use_cache=False,
    )  # fmt: skip
    base = LlamaForCausalLM(config).requires_grad_(False)
    return get_peft_model(base, GLoRAConfig(rank=8)).get_base_model()


def addmm_in_place(_self: object, left: list[int], right: list[int], **_: object) -> int:
    """torch counts addmm, but not the in-place one that GLoRA uses: 2 m n k."""
    return 2 * left[0] * left[1] * right[1]


def counted(model: LlamaForCausalLM, targets_per_row: int) -> int:
    tokens, learnt = np.arange(WIDTH, dtype=np.int32), np.arange(WIDTH) >= WIDTH - targets_per_row
    batch = collate([Row(tokens + n, learnt, [0]) for n in range(ROWS)], pad_id=0)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_in_place}) as counter:
        CausalLMObjective(model)(**batch).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("targets_per_row", [5, 63])
def test_a_step_costs_what_was_counted(llama: LlamaForCausalLM, targets_per_row: int) -> None:
    """Eager attention computes the masked half of its products too, which the formula does not count as work.

    What the formula leaves out (W0 c, norms, softmax) the counter does not count either; the two per cent between
    them are the vectors C and E, which the formula counts as if they were matrices.
    """
    cost = measure_cost(llama, llama.config, torch.float32, CPU)
    tokens, targets = ROWS * WIDTH, ROWS * targets_per_row
    masked_half = tokens * 6 * WIDTH * HIDDEN * LAYERS
    expected = cost.step_flops(tokens, targets, WIDTH)
    first = 2 * tokens * HIDDEN * (HIDDEN + 48 + 48)  # q, k and v of the first layer: nobody wants dx of the embedding
    assert masked_half < 0.2 * expected
    assert counted(llama, targets_per_row) - masked_half + first == pytest.approx(expected, rel=0.03)


def test_what_is_measured_of_a_model(llama: LlamaForCausalLM) -> None:
    cost = measure_cost(llama, llama.config, torch.float32, CPU)
    per_layer = HIDDEN * (HIDDEN + 48 + 48 + HIDDEN) + 3 * HIDDEN * 160  # q, k, v, o; gate, up, down
    assert (cost.frozen, cost.layers, cost.hidden) == (LAYERS * per_layer, LAYERS, HIDDEN)
    assert cost.head == HIDDEN * 200
    assert cost.trained == sum(p.numel() for p in llama.parameters() if p.requires_grad) > 0
    assert 1e8 < cost.peak_flops < 1e15


def test_a_step_by_hand() -> None:
    """Two tokens, one target: 2 x (4 x 100 + 6 x 10 + 6 x 2 x 4 x 3) + 4 x 50."""
    cost = ModelCost(frozen=100, trained=10, head=50, layers=3, hidden=4, peak_flops=1.0)
    assert cost.step_flops(tokens=2, targets=1, width=2) == 2 * (400 + 60 + 144) + 200


@pytest.mark.parametrize("shared", [False, True])
def test_a_whole_model_costs_six_an_element(shared: bool) -> None:
    """Trained linears and a trained head; a VLoRA linear counts as the dense one whose work it does."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=160, vocab_size=200, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager", use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if shared:
        make_compounds(model, list(model.model.layers), VLoRAConfig(layers_per_compound=LAYERS, rank=1))
    cost = measure_cost(model, model.config, torch.float32, CPU)
    per_layer = HIDDEN * (HIDDEN + 48 + 48 + HIDDEN) + 3 * HIDDEN * 160
    norms = (2 * LAYERS + 1) * HIDDEN
    assert (cost.frozen, cost.trained, cost.head_trained) == (0, LAYERS * per_layer + norms, True)
    masked_half = ROWS * WIDTH * 6 * WIDTH * HIDDEN * LAYERS
    expected = cost.step_flops(ROWS * WIDTH, ROWS * (WIDTH - 1), WIDTH)
    assert counted(model, WIDTH - 1) - masked_half == pytest.approx(expected, rel=0.06 if shared else 0.01)


def test_attention_without_a_mask_does_twice_the_work() -> None:
    costs = [ModelCost(100, 10, 50, 3, 4, 1.0, causal=causal).step_flops(2, 1, 2) for causal in (True, False)]
    assert costs[1] - costs[0] == 2 * 6 * 2 * 4 * 3


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA A30", 165),
        ("NVIDIA A40", 150),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A6000", 155),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("Quadro RTX 6000", None),
        ("NVIDIA GeForce RTX 5090", 209),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("AMD Instinct MI300X", 1307),
        ("Tesla V100-SXM2-16GB", None),
        ("NVIDIA H20", None),
    ],
)
def test_the_peak_of_a_gpu_by_its_name(name: str, tera: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bf16_peak(name) == (None if tera is None else tera * 1e12)
    if tera is not None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: name)
        assert peak_flops(torch.bfloat16, torch.device("cuda", 0)) == tera * 1e12
