"""One process under every ZeRO stage: a resumed run is the whole one, and no micro batch waits for the device."""

import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from glora_llm.errors import UserError
from glora_llm.launch import ranks
from glora_llm.launch.quiet import quiet_libraries
from glora_llm.schema import TrainingSection
from glora_llm.training.deepspeed_config import resolve_deepspeed_config
from glora_llm.training.engine import Engine, StepResult
from glora_llm.training.optim import Trainable
from tests.in_process import alone, one_thread  # noqa: F401 - fixtures

STAGES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
LR = 1e-2
# Reads of the device by the host: what each operator is for is `.item()`, `nonzero`, a comparison, a boolean index.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2")


class Tokens(nn.Module):
    """A tiny LLaMA of random weights; all of it learns to say the next of its own tokens."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=32, intermediate_size=48, vocab_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, use_cache=False,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config).to(dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits = self.model(input_ids=input_ids).logits[:, :-1].float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten(), reduction="sum")

    def targets(self, batch: dict[str, Tensor]) -> int:
        return batch["input_ids"][:, 1:].numel()


@pytest.fixture(scope="module", autouse=True)
def joined(alone: None) -> Iterator[ranks.Processes]:  # noqa: F811 - the fixture
    quiet_libraries()
    yield ranks.start()


@pytest.fixture
def here(device: torch.device, joined: ranks.Processes) -> torch.device:
    """The device, where DeepSpeed computes on it in this process."""
    if joined.device.type != device.type:
        pytest.skip(f"DeepSpeed computes on {get_accelerator().device_name()} in this process")
    return device


def made(stage: str, device: torch.device, module: nn.Module | None = None, **keys: Any) -> Engine:
    settings = TrainingSection(
        **{"global_batch": 8, "micro_batch": 2, "steps": 5, "lr": LR, "deepspeed": stage, "max_grad_norm": 1.0, **keys}
    )
    module = module or Tokens()
    dtype = next(module.parameters()).dtype
    items = [Trainable(name, parameter) for name, parameter in module.named_parameters()]
    return Engine(module, items, settings, resolve_deepspeed_config(settings, dtype, 1), device)


def trained(engine: Engine, first: int, last: int) -> list[StepResult]:
    results = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        batches = [{"input_ids": torch.randint(0, 64, (2, 12), generator=generator)} for _ in range(4)]
        results.append(engine.train_step(batches, LR))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", STAGES)
def test_three_steps_a_checkpoint_and_two_more_are_five(
    stage: str, dtype: torch.dtype, here: torch.device, tmp_path: Path
) -> None:
    if stage == "zero0" and dtype == torch.bfloat16:
        pytest.skip("ZeRO 0 keeps no float32 masters: what it trains is float32")
    whole = made(stage, here, Tokens(dtype))
    expected = trained(whole, 0, 3)
    save_file({name: value.contiguous() for name, value in whole.state()}, tmp_path / "state.safetensors")
    expected += trained(whole, 3, 5)
    whole.close()
    assert all(not result.skipped and result.targets == 88 for result in expected)
    assert expected[4].loss < expected[0].loss

    saved, module = load_file(tmp_path / "state.safetensors"), Tokens(dtype)
    assert len(saved) == 3 * len(list(module.parameters()))
    for name, parameter in module.named_parameters():
        assert saved[f"exp_avg/{name}"].shape == parameter.shape and saved[f"exp_avg_sq/{name}"].any()
        parameter.data.copy_(saved[f"master/{name}"])
    resumed = made(stage, here, module)
    resumed.restore(saved, 3, {})
    again = dict(resumed.state())
    assert all(torch.equal(again[name], value) for name, value in saved.items())
    got = trained(resumed, 3, 5)
    resumed.close()
    for mine, theirs in zip(got, expected[3:], strict=True):
        exact = here.type == "cpu"
        assert mine.loss == (theirs.loss if exact else pytest.approx(theirs.loss, rel=1e-5))
        assert mine.grad_norm == (theirs.grad_norm if exact else pytest.approx(theirs.grad_norm, rel=1e-4))


class Reads(TorchDispatchMode):
    """Counts the operators by which a host waits for a value of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.overloadpacket.__name__ in READS
        if function is torch.ops.aten.index.Tensor:
            self.count += any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])
        return function(*args, **(kwargs or {}))


class Weighted(nn.Module):
    """A linear whose summed output is the loss: no reads of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs).square().sum()

    def targets(self, batch: dict[str, Tensor]) -> int:
        return len(batch["inputs"])


@pytest.mark.parametrize(
    ("stage", "once_a_step"),
    [
        ("zero0", 3),
        ("zero1", 5),
        ("zero2", 5),
        ("zero3", 4),
    ],  # norm, overflow, and AdamW's counters, which are on the CPU
)
def test_a_micro_batch_reads_nothing(stage: str, once_a_step: int, joined: ranks.Processes) -> None:
    engine = made(stage, joined.device, Weighted())
    batches = [{"inputs": torch.ones(2, 8)} for _ in range(4)]
    engine.train_step(batches, LR)
    at: list[int] = []
    with Reads() as reads:
        engine.train_step(batches, LR, lambda _: at.append(reads.count))
        total = reads.count
    engine.close()
    assert at == [0, 0, 0, 0], "a read before the last micro batch"
    assert total == once_a_step


def test_the_loss_is_not_copied_to_the_host_before_the_step_is_over(
    joined: ranks.Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU `.cpu()` is no operator that could be counted: here it would fail in the first micro batch."""
    engine = made("zero0", joined.device, Weighted())
    ran: list[int] = []
    monkeypatch.setattr(engine, "device", torch.device("meta"))
    monkeypatch.setattr(engine, "_summed", lambda value: torch.full((), value, dtype=torch.float64, device="meta"))
    monkeypatch.setattr(engine, "ds", Launched(engine.ds, ran))
    with pytest.raises((RuntimeError, NotImplementedError)):
        engine.train_step([{"inputs": torch.ones(2, 8)} for _ in range(3)], LR)
    assert ran == [0, 1, 2]


class Launched:
    """A DeepSpeed engine whose passes only note that they ran, and whose losses have no value."""

    skipped_steps = 0

    def __init__(self, _engine: Any, ran: list[int]) -> None:
        self.ran = ran

    def __call__(self, **_: Tensor) -> Tensor:
        return torch.zeros((), device="meta")

    def train(self) -> None:
        pass

    def backward(self, _loss: Tensor, scale_wrt_gas: bool) -> None:
        assert not scale_wrt_gas
        self.ran.append(len(self.ran))

    def step(self) -> None:
        pass


def test_one_process_that_is_told_to_end_is_known_after_the_step(joined: ranks.Processes) -> None:
    engine = made("zero0", joined.device, Weighted())
    batches = [{"inputs": torch.ones(2, 8)} for _ in range(4)]
    assert not engine.train_step(batches, LR).told_to_end
    assert engine.train_step(batches, LR, told_to_end=lambda: True).told_to_end
    engine.close()


@pytest.mark.parametrize("wanted", [True, False])
def test_tensor_float_32_is_set_while_an_engine_lives(wanted: bool, joined: ranks.Processes) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    engine = made("zero0", joined.device, Weighted(), tf32=wanted)
    assert torch.backends.cuda.matmul.allow_tf32 is wanted
    engine.close()
    assert torch.backends.cuda.matmul.allow_tf32 is before is False


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3"])
def test_a_model_leaves_memory_with_its_engine(stage: str, joined: ranks.Processes) -> None:
    module = Tokens()
    gone = weakref.ref(module)
    engine = made(stage, joined.device, module)
    trained(engine, 0, 2)
    engine.close()
    del module, engine
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("rounds", [False, True])
def test_a_buffer_that_deepspeed_rounds_is_an_error(rounds: bool, joined: ranks.Processes, tmp_path: Path) -> None:
    """Rotary frequencies stay float32 in bfloat16 training; a file that says otherwise is refused."""
    module = Weighted().to(torch.bfloat16)
    module.register_buffer("inv_freq", torch.full((3,), 0.1))
    values: dict[str, Any] = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
    if rounds:
        values["data_types"] = {"buffer_dtype": "bf16", "keep_in_fp32_modules": []}
    (tmp_path / "mine.json").write_text(json.dumps(values))
    if not rounds:
        made(str(tmp_path / "mine.json"), joined.device, module).close()
        assert module.inv_freq.dtype == torch.float32
        return
    with pytest.raises(UserError, match=r"cast the buffer inv_freq from torch.float32 to torch.bfloat16"):
        made(str(tmp_path / "mine.json"), joined.device, module)
