"""Write a small commented recipe for records that a user brings."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glora_llm.data.detect import Detected, detect, examples
from glora_llm.data.formats import Example
from glora_llm.data.sources import find_path, locate
from glora_llm.errors import UserError
from glora_llm.models.embedded import embedded_folder

SMALL_BASE, LARGE_BASE = "embedded:smollm2-135m-instruct", "meta-llama/Meta-Llama-3-8B"
GPU_BYTES_FOR_THE_LARGE_BASE = 20e9
CHARACTERS_A_TOKEN = 3.5  # of English, where the tokenizer is not at hand
TOKENS_A_TURN = 8  # role and end markers of a chat template
LONGEST = 2048  # tokens: the largest max_tokens that is proposed
GLOBAL_BATCH = 16


@dataclass(frozen=True)
class Records:
    """Records of a user's file or folder, looked at.

    Args:
        source: as data.source.
        count: training records.
        found: their format.
        held_out: data.validation: a split of the folder, or a number of records; None: a single document.
        tokens: the length of each sample looked at, sorted.
        counted: the lengths were counted by the base's tokenizer; else estimated from characters.
        problem: the error of the first record that does not fit, or None.
    """

    source: str
    count: int
    found: Detected
    held_out: str | int | None
    tokens: list[int]
    counted: bool
    problem: str | None

    def quantile(self, share: float) -> int:
        """Return the length that this share of the samples does not exceed, in tokens."""
        return self.tokens[min(len(self.tokens) - 1, math.ceil(share * len(self.tokens)) - 1)]


def look_at(source: str, base: str, task: str | None) -> Records:
    """Read records, detect their format and measure their lengths.

    Args:
        source: a file, or a folder with a file for each split.
        base: the model whose tokenizer counts.
        task: the format, where the user names it.

    Raises:
        UserError: when nothing can be read, fewer than 4 records are there, or no format fits.
    """
    table = locate(source, None, "train").read()
    found = detect(table.rows, table.label_names, task)
    if found.format == "text":  # what a run reads then: long pieces in place of lines
        table = locate(source, None, "train", documents=True).read()
    elif len(table.rows) < 4:
        raise UserError(f"{source} holds {len(table.rows)} records; at least 4 are needed to train and to validate.")
    made, problem = examples(table.rows, found, table.label_names)
    if not made:
        raise UserError(f"No record of {source} fits format {found.format}. The first one: {problem}")
    lengths, counted = _lengths(made, base)
    held_out = _held_out(source, len(table.rows))
    left = len(table.rows) - (held_out if isinstance(held_out, int) else 0)
    return Records(source, left, found, held_out, sorted(lengths), counted, problem)


def _held_out(source: str, records: int) -> str | int | None:
    """Return the validation split of a folder that has one, else a twentieth of the records, from 1 to 200."""
    path = find_path(source)
    if path is not None and path.is_dir():
        for split in ("validation", "test"):
            try:
                locate(source, None, split)
            except UserError:
                continue
            return split
    return max(1, min(200, records // 20)) if records > 1 else None


def _lengths(made: Sequence[Example], base: str) -> tuple[list[int], bool]:
    """Return the tokens of each example, and whether a tokenizer counted them.

    A chat is counted in the base's own template; without one, each turn gets an allowance.
    """
    folder = embedded_folder(base.removeprefix("embedded:")) if base.startswith("embedded:") else Path(base)
    written = _in_template(made, folder)
    texts = written or ["\n".join(m.content for m in e.messages) or e.text() for e in made]
    turns = [0 if written else max(1, len(e.messages)) for e in made]
    file = folder / "tokenizer.json"
    if not file.is_file():
        return [
            math.ceil(len(text) / CHARACTERS_A_TOKEN) + TOKENS_A_TURN * n for text, n in zip(texts, turns, strict=True)
        ], False
    from tokenizers import Tokenizer  # not transformers: it takes seconds to import

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    coded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [len(code.ids) + TOKENS_A_TURN * n for code, n in zip(coded, turns, strict=True)], True


def _in_template(made: Sequence[Example], folder: Path) -> list[str] | None:
    """Return chats as the base's template writes them; None for other examples, and where there is no such template."""
    settings, file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    if not settings.is_file() or not all(example.messages for example in made):
        return None
    values = json.loads(settings.read_text(encoding="utf-8"))
    source = file.read_text(encoding="utf-8") if file.is_file() else values.get("chat_template")
    if not isinstance(source, str):
        return None
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    given = {name: value for name, value in values.items() if name.endswith("_token")}
    chats = [[{"role": m.role, "content": m.content} for m in example.messages] for example in made]
    try:
        template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source)
        return [template.render(messages=chat, **given) for chat in chats]
    except (TemplateError, TypeError):  # it asks for what only transformers gives it
        return None


def choose_base(gpu_bytes: float | None) -> str:
    """Return the base model for this machine: a large one in nf4 where a GPU holds it, else the embedded small one."""
    return LARGE_BASE if gpu_bytes is not None and gpu_bytes >= GPU_BYTES_FOR_THE_LARGE_BASE else SMALL_BASE


def recipe_text(name: str, records: Records, base: str, on_gpu: bool) -> str:
    """Return a recipe with a comment behind every choice, as YAML."""
    found, is_text = records.found, records.found.format == "text"
    limit = LONGEST if on_gpu else LONGEST // 4
    longest = limit if is_text else min(limit, 64 * math.ceil(records.quantile(0.99) / 64))
    dropped = 0.0 if is_text else 100 * sum(length > longest for length in records.tokens) / len(records.tokens)
    budget = 8192 if on_gpu else 1024  # tokens of a micro batch
    micro = max(1, min(8, 2 ** int(math.log2(max(1, budget // longest)))))
    small = base.startswith("embedded:")
    steps, epochs = _steps(records, longest if is_text else None, None if on_gpu else 200)
    every = max(1, steps // 4)
    how = "by its tokenizer" if records.counted else f"estimated at {CHARACTERS_A_TOKEN} characters a token"
    lengths = f"half <= {records.quantile(0.5)}, 99 % <= {records.quantile(0.99)}, longest {records.tokens[-1]} ({how})"
    lines = [
        f"# GLoRA on {base} for {records.source}: {records.count} training records, {found.reason}.",
        f"#   glora-llm train --recipe {name}.yaml --dry-run    checks it and shows three samples",
        f"#   glora-llm train --gpus all --recipe {name}.yaml   trains on every GPU",
        f"description: GLoRA for {Path(records.source).name}",
        "model:",
        f"  name_or_path: {json.dumps(base)}",
        f"  quantization: {'none' if small else 'nf4'}{'' if small else '  # 4 bits: a quarter of the memory'}",
        f"  gradient_checkpointing: {json.dumps(not small)}{'' if small else '  # less memory, a third more time'}",
        "adapter: {method: glora, targets: all-linear, rank: 8, alpha: 16}  # docs/glora.md",
        "data:",
        f"  format: {found.format}  # {found.reason}",
        f"  source: {json.dumps(records.source)}",
        *_optional(found),
        *_validation(records.held_out),
        f"  max_tokens: {longest}  # lengths in tokens: {lengths}",
        f"  overlong: {'split' if is_text else 'drop'}" + ("" if is_text else f"  # {dropped:.1f} % of the samples"),
        f"  packing: {json.dumps(is_text or on_gpu)}  # several samples in one sequence; none sees another",
        "training:",
        f"  global_batch: {GLOBAL_BATCH}  # of one optimizer step, over all processes",
        f"  micro_batch: {min(micro, GLOBAL_BATCH)}  # of one forward pass; lower it when memory runs out",
        f"  steps: {steps}  # {epochs:.1f} epochs",
        f"  lr: {'2e-3' if small else '3e-4'}",
        "  warmup: 0.1",
        *([] if records.held_out is None else [f"evaluation: {{every: {every}, max_rows: 200, batch: 8}}"]),
        f"output: {{dir: runs/{Path(name).name}, save_every: {every}, keep: 2}}",
        f"merge: {{after_training: true}}  # runs/{Path(name).name}/merged loads in plain transformers",
    ]
    return "\n".join(lines) + "\n"


def _validation(held_out: str | int | None) -> list[str]:
    if held_out is None:
        return []
    origin = "a split of the folder" if isinstance(held_out, str) else "records, drawn by the seed"
    return [f"  validation: {held_out}  # {origin}"]


def _optional(found: Detected) -> list[str]:
    lines = []
    if found.columns:
        pairs = ", ".join(f"{role}: {json.dumps(column)}" for role, column in found.columns.items())
        lines.append(f"  columns: {{{pairs}}}  # role of the format: name of the column")
    if found.prompt is not None:
        lines.append(f"  prompt: {json.dumps(found.prompt)}")
    if found.labels is not None:
        lines.append(f"  labels: {json.dumps(found.labels)}  # put a word for each class number here")
    return lines


def _steps(records: Records, sequence: int | None, most: int | None) -> tuple[int, float]:
    """Return optimizer steps for a sensible number of epochs, at most `most`, and the epochs that they come to.

    Args:
        sequence: running text is cut into sequences of so many tokens; None: a sample a record.
    """
    samples: float = records.count
    if sequence is not None:
        mean = sum(records.tokens) / len(records.tokens)
        samples = max(1.0, records.count * mean / sequence)
    epochs = 10 if samples < 200 else 5 if samples < 1000 else 3 if samples < 20_000 else 1
    steps = max(1, math.ceil(samples * epochs / GLOBAL_BATCH))
    if most is not None:
        steps = min(steps, most)
    return steps, steps * GLOBAL_BATCH / samples
