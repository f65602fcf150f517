"""Write metrics to metrics.jsonl, TensorBoard and the terminal. One process writes."""

import json
import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from glora_llm.atomic import write_text
from glora_llm.training.hyperparameters import TEST, end_summaries, start_summary

SECONDS_BETWEEN_LINES = 5.0  # where there is no progress bar


def charts(unit: str) -> dict[str, dict[str, list[Any]]]:
    """Return the page that TensorBoard's tab Custom Scalars shows first: title -> curves by name.

    Args:
        unit: of the throughput, `tokens` or `patches`.
    """
    return {
        "training": {
            "loss": ["Multiline", ["train/loss", "validation/loss"]],
            "validation scores": ["Multiline", [r"validation/(?!loss|perplexity).*"]],
            "learning rate": ["Multiline", ["train/lr"]],
            "throughput": ["Multiline", [f"train/{unit}_per_second"]],
            "gradient norm": ["Multiline", ["train/grad_norm"]],
        }
    }


class MetricLog:
    """Writes the metrics of a run.

    Args:
        folder: the run folder.
        start: first step of this launch; what an earlier launch logged from here on is dropped, so nothing is twice.
        total: optimizer steps of the run.
        enabled: False on all ranks but one: nothing is written.
        unit: what speed is counted in.
    """

    def __init__(self, folder: Path, start: int, total: int, enabled: bool, unit: str = "tokens"):
        self.enabled, self.total, self.start, self.unit = enabled, total, start, unit
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.file = folder / "metrics.jsonl"
        self._forget_from(start)
        self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self.tensorboard.add_custom_scalars(charts(unit))
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=start, unit="step", disable=not self.terminal, smoothing=0.1)
        self.last_line = 0.0

    def _forget_from(self, start: int) -> None:
        """Keep the lines of steps up to `start`, and drop a last line that was cut off."""
        if not self.file.exists():
            return
        kept = []
        for line in self.file.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if entry["step"] <= start:
                kept.append(line)
        write_text(self.file, "".join(line + "\n" for line in kept))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log numbers under names such as `train/loss` after `step` optimizer steps."""
        if not self.enabled:
            return
        with self.file.open("a") as file:
            plain = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
            file.write(json.dumps({"step": step, **plain}) + "\n")
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)

    def scores(self, step: int, values: dict[str, float]) -> None:
        """Log scores such as `validation/loss`, and print them on one line."""
        self.scalars(step, values)
        self.say(f"step {step}/{self.total}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))

    def lacks(self, step: int, prefix: str) -> bool:
        """Tell whether the file has metrics, but none of this step whose names begin with `prefix`."""
        if not self.enabled or not self.file.exists():
            return False
        entries = [json.loads(line) for line in self.file.read_text().splitlines()]
        return bool(entries) and not any(
            entry["step"] == step and name.startswith(prefix) for entry in entries for name in entry
        )

    def text(self, name: str, text: str) -> None:
        """Show a text in TensorBoard."""
        if self.enabled:
            self.tensorboard.add_text(name, "```\n" + text + "\n```")

    def begin(self, settings: dict[str, str | float]) -> None:
        """Show the run, which is still going on, in TensorBoard's tab HParams.

        Args:
            settings: of `compared_settings`.
        """
        if self.enabled:
            self._add(start_summary(str(self.file.parent), settings))

    def end(self, settings: dict[str, str | float], validation: Iterable[str], test: Iterable[str]) -> None:
        """Show the settings and the final scores in TensorBoard's tab HParams.

        Args:
            settings: of `compared_settings`.
            validation, test: names of the scores, such as `validation/loss` and `test/loss`.
        """
        if self.enabled:
            for summary in end_summaries(settings, _without_split(validation), _without_split(test)):
                self._add(summary)

    def _add(self, summary: Any) -> None:
        writer: Any = self.tensorboard.file_writer
        writer.add_summary(summary)

    def test_scores(self, step: int, values: dict[str, float]) -> None:
        """Put the test scores into the charts of the validation, as a dot of a run of their own.

        Args:
            step: the last one.
            values: under names such as `test/loss`.
        """
        if not self.enabled or not values:
            return
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(self.file.parent / "tensorboard" / TEST), purge_step=step) as board:
            for name, value in zip(_without_split(values), values.values(), strict=True):
                board.add_scalar(f"validation/{name}", value, step)

    def progress(self, step: int, values: dict[str, float]) -> None:
        """Move the bar, or print a line at most every five seconds (always the first and the last)."""
        if not self.enabled:
            return
        brief = (
            f"loss {values['train/loss']:.4f}, lr {values['train/lr']:.2e}, grad norm {values['train/grad_norm']:.3g}, "
            f"{values[f'train/{self.unit}_per_second']:.0f} {self.unit}/s"
        )
        self.bar.set_postfix_str(brief, refresh=False)
        self.bar.update(step - self.bar.n)
        now = time.monotonic()
        if not self.terminal and (
            now - self.last_line >= SECONDS_BETWEEN_LINES or step in (self.start + 1, self.total)
        ):
            left = (self.total - step) * values["train/seconds_per_step"]
            print(f"step {step}/{self.total}: {brief}, {_clock(left)} left", flush=True)
            self.last_line = now

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self.enabled:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def flush(self) -> None:
        """Put on disk what TensorBoard still holds; called before a checkpoint, so that a killed run lacks no point."""
        if self.enabled:
            self.tensorboard.flush()

    def close(self) -> None:
        """Flush and close."""
        if self.enabled:
            self.bar.close()
            self.tensorboard.close()


def _without_split(names: Iterable[str]) -> list[str]:
    """Return `loss` for `validation/loss` and `test/loss`."""
    return [name.partition("/")[2] for name in names]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
