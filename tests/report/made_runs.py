"""Run folders that are written without training, for the tests of a report."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from glora_llm import recipe as recipes

LAYERS, KINDS = 3, ("self_attn.q_proj", "mlp.up_proj")
LAUNCH: dict[str, Any] = {
    "started": "2026-11-29T10:00:00Z",
    "from_step": 0,
    "processes": 2,
    "command": "deepspeed --num_gpus 2 train.py --recipe tiny_cpu",
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "commit": "c0ffee" * 6,
    "hardware": {"device": "cpu", "gpus": [], "cpu": "Some CPU", "cores": 2, "memory_bytes": 8e9, "system": "Linux"},
}


def write_run(folder: Path, *overrides: str, steps: int = 40, recipe: str = "tiny_cpu") -> Path:
    """Write a finished run of so many logged steps, with a validation every tenth of them and an adapter."""
    folder.mkdir(parents=True)
    resolved = recipes.load(recipe, [f"output.dir={folder}", *overrides])
    (folder / "recipe.yaml").write_text(recipes.dump(resolved), encoding="utf-8")
    base = {"name": "some/base", "revision": None, "fingerprint": "f" * 64, "dtype": "float32"}
    (folder / "base.json").write_text(json.dumps(base))
    (folder / "launches.jsonl").write_text(json.dumps(LAUNCH) + "\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics(steps)))
    summary = {
        "steps": steps,
        "validation": {"validation/loss": 1.5, "validation/label_accuracy": 0.5},
        "test_before": {"test/loss": 5.5, "test/label_accuracy": 0.0125},
        "test": {"test/loss": 1.25, "test/label_accuracy": 0.625},
        "trained_parameters": 18432, "seconds": 61.5, "peak_memory_gb": 1.25, "predicted_peak_gb": 1.5,
        "load_peak_gb": 0.5, "bytes_per_rank": 500_000, "skipped_steps": 0,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    write_adapter(folder / "adapter")
    return folder


def metrics(steps: int) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl: a falling loss with noise of a fixed seed."""
    noise = np.random.default_rng(0).normal(size=steps)
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        lines.append(
            {
                "step": step, "train/loss": 1 + 4 / step**0.5 + 0.1 * noise[step - 1],
                "train/lr": 1e-3 * (1 - step / steps), "train/grad_norm": 1.0 + 0.01 * step,
                "train/label_tokens": 65, "train/samples": 16 * step,
                "train/seconds_per_step": 0.25, "train/tokens_per_second": 5000.0 + 100 * noise[step - 1],
                "train/model_flop_utilisation": 0.5, "train/peak_memory_gb": 1.25,
            }
        )  # fmt: skip
        if step % max(1, steps // 10) == 0:
            lines.append(
                {"step": step, "validation/loss": 1.2 + 4 / step, "validation/label_accuracy": step / steps / 2}
            )
    return lines


def write_adapter(folder: Path) -> None:
    """Write a GLoRA adapter of rank 4: A and B lora, C and E vector, of small linears."""
    folder.mkdir()
    tensors: dict[str, Any] = {}
    for layer in range(LAYERS):
        for kind in KINDS:
            stem = f"base_model.model.model.layers.{layer}.{kind}"
            shapes = {
                "slot_A.down": (8, 4), "slot_A.up": (4, 8), "slot_B.down": (6, 4), "slot_B.up": (4, 8),
                "slot_C.vector": (8,), "slot_E.vector": (6,),
            }  # fmt: skip
            tensors |= {f"{stem}.{name}": np.zeros(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")


def write_comparison(folder: Path) -> Path:
    """Write the folder of a race of four methods, one of which did not run, and one was stopped."""
    folder.mkdir()

    def method(name: str, scores: list[float], verdict: str, **more: Any) -> dict[str, Any]:
        mean = sum(scores) / len(scores)
        return {
            "name": name, "parameters": 9000, "knob": {"rank": 4}, "lr": 1e-3,
            "rates": {"1e-4": mean - 0.2, "1e-3": mean},
            "stopped_rates": {"1e-2": mean - 0.3}, "lr_at_edge": False,
            "scores": scores, "mean": mean, "low": min(scores), "high": max(scores), "verdict": verdict,
            "tokens_per_second": 1200.0, "peak_gb": 1.5, "seconds": 90.0, "steps_to_target": 12, "forgetting": 0.02,
            "trials": [f"trials/{name}-{place}" for place in range(len(scores))], **more,
        }  # fmt: skip

    methods = [
        method("glora", [0.75, 0.875], "best"),
        method("lora", [0.625, 0.6875], "behind", p_value=0.03),
        {"name": "beft", "verdict": "not run", "why": "a LLaMA's linears have no bias"},
        {"name": "dora", "verdict": "stopped", "stopped_at": 10, "validation": 0.5, "lr": 1e-3, "steps_spent": 10},
    ]
    values = {
        "recipe": "tiny_cpu", "score": "label_accuracy", "higher": True, "budget": "10,000 trained parameters",
        "methods": methods, "race": True, "choice": "label_accuracy", "steps_spent": 90,
        "versions": {"torch": "2.13.0"}, "hardware": LAUNCH["hardware"],
        "command": "glora-llm compare --recipe tiny_cpu --methods glora,lora,beft --budget 10k",
    }  # fmt: skip
    (folder / "comparison.json").write_text(json.dumps(values))
    return folder
