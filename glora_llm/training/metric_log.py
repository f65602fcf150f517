"""Write metrics to metrics.jsonl, TensorBoard and the terminal. One process writes."""

import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from glora_llm.failpoints import reach
from glora_llm.training.board import Board
from glora_llm.training.hyperparameters import TEST, end_summaries, start_summary
from glora_llm.training.metric_file import MetricFile
from glora_llm.training.trackers import Tracker, open_trackers

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
        trackers: names of experiment trackers that get the numbers too.
    """

    def __init__(
        self,
        folder: Path,
        start: int,
        total: int,
        enabled: bool,
        unit: str = "tokens",
        trackers: Sequence[str] = (),
    ):
        self.folder, self.enabled, self.total, self.start, self.unit = folder, enabled, total, start, unit
        self.names, self.trackers = trackers, list[Tracker]()
        if not enabled:
            return
        self.file = MetricFile(folder / "metrics.jsonl", self.say)
        self.file.forget_from(start)
        self.board = Board(folder / "tensorboard", start + 1, self.say)
        self.board.write(lambda writer: writer.add_custom_scalars(charts(unit)))
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=start, unit="step", disable=not self.terminal, smoothing=0.1)
        self.last_line = 0.0

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log numbers under names such as `train/loss` after `step` optimizer steps."""
        if not self.enabled:
            return
        self.file.append(step, values)
        reach("metrics.after_write")

        def add(writer: Any) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        self.board.write(add)
        for tracker in self.trackers:
            tracker.log(step, values)

    def scores(self, step: int, values: dict[str, float]) -> None:
        """Log scores such as `validation/loss`, and print them on one line."""
        self.scalars(step, values)
        self.say(f"step {step}/{self.total}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))

    def lacks(self, step: int, prefix: str) -> bool:
        """Tell whether the file has metrics, but none of this step whose names begin with `prefix`."""
        names = self.file.names_at(step) if self.enabled else None
        return names is not None and not any(name.startswith(prefix) for name in names)

    def values_at(self, step: int, prefix: str) -> dict[str, float]:
        """Return the numbers of a step whose names begin with `prefix`, as they are in the file."""
        return self.file.values_at(step, prefix) if self.enabled else {}

    def text(self, name: str, text: str) -> None:
        """Show a text in TensorBoard."""
        if self.enabled:
            self.board.write(lambda writer: writer.add_text(name, "```\n" + text + "\n```"))

    def begin(self, settings: dict[str, str | float]) -> None:
        """Show the run, which is still going on, in TensorBoard's tab HParams and in the trackers.

        Args:
            settings: of `compared_settings`.
        """
        if self.enabled:
            self._add(start_summary(str(self.folder), settings))
            self.trackers = open_trackers(self.names, self.folder, settings, self.say)

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
        self.board.write(lambda writer: writer.file_writer.add_summary(summary))

    def test_scores(self, step: int, values: dict[str, float]) -> None:
        """Put the test scores into the charts of the validation, as a dot of a run of their own.

        Args:
            step: the last one.
            values: under names such as `test/loss`.
        """
        if not self.enabled or not values:
            return

        def add(writer: Any) -> None:
            for name, value in zip(_without_split(values), values.values(), strict=True):
                writer.add_scalar(f"validation/{name}", value, step)

        board = Board(self.folder / "tensorboard" / TEST, step, self.say)
        board.write(add)
        board.close()
        for tracker in self.trackers:
            tracker.log(step, values)

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
            self.file.write_waiting()
            self.board.flush()

    def close(self) -> None:
        """Flush and close."""
        if self.enabled:
            self.bar.close()
            self.file.close()
            self.board.close()
            for tracker in self.trackers:
                tracker.close()


def _without_split(names: Iterable[str]) -> list[str]:
    """Return `loss` for `validation/loss` and `test/loss`."""
    return [name.partition("/")[2] for name in names]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
