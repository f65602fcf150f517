"""One adapter method from its first step to its merge, as runs in this process, on a tiny model of each kind."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from glora_llm.adapters.methods import METHODS
from glora_llm.cli import main
from glora_llm.compare.budget import parameters_of
from glora_llm.evaluation.trained import load_adapted
from glora_llm.models.embedded import embedded_folder
from glora_llm.plan.plan import Plan, make_plan
from glora_llm.plan.run_folder import RunFolder
from tests.in_process import train_in_process
from tests.run.wordpiece import small_wordpiece

NEEDED: dict[str, dict[str, Any]] = {  # arguments without which a method does not fit layers of 64 inputs
    "c3a": {"block_size": 32},
    "road": {"group_size": 16},
    "waveft": {"n_frequency": 64},
}
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "initializer_range": 0.1,
}
EVERY = [
    "adapter.slots=null", "training.steps=2", "training.warmup=0", "training.schedule=constant", "training.lr=1e-2",
    "data.max_rows=64", "data.validation=4", "data.max_test_rows=4", "output.save_every=1", "output.keep=2",
    "evaluation.every=null",
]  # fmt: skip
IMAGES = [
    "data.source=embedded:colours", "data.images={flip: true}", "training.epochs=null", "training.global_batch=16",
    "training.micro_batch=8",
]  # fmt: skip
IDS = {"input_ids": torch.arange(24).reshape(2, 12) + 3}


@dataclass(frozen=True)
class Kind:
    """A kind of model, and a recipe that trains it.

    Args:
        recipe: and `arguments`: what is trained.
        auto: reads the merged model.
        inputs: two samples.
        make: writes the base into a folder; None: it is the embedded LLaMA.
        claimed: as what a method claims it (`methods.KINDS`).
    """

    recipe: str
    arguments: list[str]
    auto: Any
    inputs: dict[str, Tensor]
    make: Callable[[Path], None] | None
    claimed: str


def _make_gpt2(folder: Path) -> None:
    """GPT-2, whose linears keep their weights transposed."""
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512, "initializer_range": 0.1}
    GPT2LMHeadModel(GPT2Config(vocab_size=260, **sizes, **special)).save_pretrained(folder)
    for file in embedded_folder("tiny-llama").glob("token*"):
        shutil.copy(file, folder)


def _make_bert(folder: Path) -> None:
    """An encoder without a head for classes; its dropout is on."""
    tokenizer = small_wordpiece()
    BertForMaskedLM(BertConfig(**SIZES, vocab_size=len(tokenizer), max_position_embeddings=160)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _make_vit(folder: Path) -> None:
    ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=8, num_labels=7)).save_pretrained(folder)


PIXELS = {"pixel_values": torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
MODELS = {
    "llama": Kind("tiny_cpu", ["training.deepspeed=zero0"], AutoModelForCausalLM, IDS, None, "text"),
    "gpt2": Kind("tiny_cpu", ["training.deepspeed=zero1"], AutoModelForCausalLM, IDS, _make_gpt2, "text"),
    "vit": Kind("vit_cifar10_glora", [*IMAGES, "training.deepspeed=zero2"], AutoModelForImageClassification, PIXELS,
                _make_vit, "images"),
    "bert": Kind("tiny_cpu", ["task=classification", "training.deepspeed=zero3"], AutoModelForSequenceClassification,
                 IDS, _make_bert, "classification"),
    "llama-head": Kind("tiny_cpu", ["task=classification", "training.deepspeed=zero3"],
                       AutoModelForSequenceClassification, IDS, None, "classification"),
}  # fmt: skip


class Walker:
    """Takes methods through their runs on the models of one kind.

    Args:
        kind: of MODELS, or another one.
        folder: the base, and the adapters that a fusion weighs, are made there once.
    """

    def __init__(self, kind: Kind, folder: Path):
        self.kind, self.folder = kind, folder
        self.base, self.adapters = embedded_folder("tiny-llama"), ""
        if kind.make is not None:
            torch.manual_seed(0)
            self.base = folder / "base"
            kind.make(self.base)

    def arguments(self, method: str, *more: str) -> list[str]:
        """Return the changes of the recipe for a method."""
        base = [] if self.kind.make is None else [f"model.name_or_path={self.base}"]
        needed = [f"adapter.peft={NEEDED[method]}"] if method in NEEDED else []
        if method == "adapter_fusion":
            needed = [f"adapter.peft={{adapters: [{self.fused()}]}}"]
        return [*self.kind.arguments, *EVERY, *base, f"adapter.method={method}", *needed, *more]

    def fused(self) -> str:
        """Return two folders of trained adapters."""
        if not self.adapters:
            runs = [self.folder / "one", self.folder / "two"]
            for seed, run in enumerate(runs):
                more = [f"output.dir={run}", f"training.seed={seed}", "training.steps=1", "merge.after_training=false"]
                assert self.train("pfeiffer", *more) == 0
            self.adapters = ", ".join(str(run / "adapter") for run in runs)
        return self.adapters

    def train(self, method: str, *more: str) -> int:
        return train_in_process(self.kind.recipe, *self.arguments(method, *more))

    def require_refused(self, method: str, out: Path, said: pytest.CaptureFixture[str], reason: str) -> None:
        """A method that has no meaning for the model: one message, exit code 2, nothing written."""
        assert self.train(method, f"output.dir={out / 'run'}", "merge.after_training=false") == 2
        message = said.readouterr().err
        assert reason in message and message.count("error:") == 1 and not (out / "run").exists()

    def walk(self, method: str, out: Path, said: pytest.CaptureFixture[str], *more: str) -> Path:
        """Train, resume, score, count and merge a method; return its run.

        It trains two steps; from its first checkpoint on again, with the same bytes; what is saved scores as the model
        did that was trained; without weights its parameters are as many; merged, it computes the same, or it is
        refused with the reason of the table, before and after the training.
        """
        run, reason = out / "run", METHODS[method].unmerged
        more = (*more, f"output.dir={run}")
        if reason:
            assert self.train(method, *more, "merge.after_training=true") == 2
            assert reason in said.readouterr().err and not run.exists()
        more = (*more, "merge.after_training=false")
        assert self.train(method, *more) == 0
        assert ("merge      An adapter" in said.readouterr().out) == bool(reason)
        self._require_resumed(run, method, said, *more)

        summary = json.loads((run / "summary.json").read_text())
        assert main(["evaluate", str(run), "--split", "test"]) == 0
        assert f"{summary['test']['test/loss']:.4f}" in said.readouterr().out
        plan = make_plan(RunFolder(run).recipe())
        if method != "full":
            assert parameters_of(plan, plan.recipe.adapter) == summary["trained_parameters"]

        merged = out / "merged"
        code = main(["merge", str(run), "--out", str(merged), "--dtype", "float32", "--no-compare"])
        assert code == (2 if reason else 0)
        if reason:
            assert reason in said.readouterr().err and not merged.exists()
        else:
            self._require_equal(plan, run, merged)
        return run

    def _require_resumed(self, run: Path, method: str, said: pytest.CaptureFixture[str], *more: str) -> None:
        """Take the run back to its first checkpoint, and give its command again."""
        result = weights(run)
        whole, before = result.read_bytes(), load_file(result)
        if method != "full":
            first = load_file(run / "checkpoints" / "step-1" / "adapter" / result.name)
            moved = [name for name in before if name not in first or not torch.equal(before[name], first[name])]
            assert [name for name in moved if "score" not in name and "classifier" not in name]
        shutil.rmtree(run / "checkpoints" / "step-2")
        shutil.rmtree(result.parent)
        assert self.train(method, *more) == 0
        assert "resumed after step 1" in said.readouterr().out
        assert result.read_bytes() == whole

    @torch.no_grad()
    def outputs(self, model: Any) -> tuple[Tensor, Tensor]:
        """Return hidden states behind the last layer, and logits."""
        out = model.eval()(**self.kind.inputs, output_hidden_states=True)
        return out.hidden_states[-1], out.logits

    def _require_equal(self, plan: Plan, run: Path, merged: Path) -> None:
        """The merged model, read by plain transformers, computes what the adapted one does, and not what the base does.

        Hidden states tell that of the base, for a head may be new.
        """
        read = self.kind.auto.from_pretrained
        trained = read(run / "model") if plan.recipe.adapter.is_full else load_adapted(plan, run / "adapter")
        hidden, logits = self.outputs(trained)
        plain, report = read(merged, output_loading_info=True)
        assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        hidden_merged, logits_merged = self.outputs(plain)
        tolerance = 2e-4 * max(1.0, float(hidden.abs().max()) / 4)  # FourierFT's steps make large numbers
        changed = (hidden - self.outputs(read(self.base))[0]).abs().max()
        assert changed > 2 * tolerance, (changed, tolerance)
        torch.testing.assert_close(hidden_merged, hidden, rtol=1e-4, atol=tolerance)
        torch.testing.assert_close(logits_merged, logits, rtol=1e-4, atol=tolerance)

    def require_trained_on(self, run: Path, method: str, *more: str) -> None:
        """Train on from a run with a learning rate of zero and another seed: the function is that of the run.

        Whatever a method draws at random and does not save must come again; AdaLoRA prunes ranks at any learning rate.
        A head is drawn by the seed, and is part of the base.
        """
        out = run.with_name("further")
        start = [f"adapter.weights={run / 'adapter'}", f"output.dir={out}", "training.lr=1e-30"]
        start += ["training.seed=5"] if self.kind.claimed == "text" else []
        assert self.train(method, *start, "training.steps=1", "merge.after_training=false", *more) == 0
        if method != "adalora":
            found, expected = (
                self.outputs(load_adapted(make_plan(RunFolder(one).recipe()), one / "adapter")) for one in (out, run)
            )
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def weights(run: Path) -> Path:
    """Return the file of what a run trained."""
    whole = run / "model" / "model.safetensors"
    return whole if whole.exists() else run / "adapter" / "adapter_model.safetensors"
