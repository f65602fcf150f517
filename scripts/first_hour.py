"""Walk the first hour on three data files that the project does not know, and write the record of it as Markdown.

python scripts/first_hour.py --out docs/first_hour.md

For each file: look at it and write a recipe, dry run, train and merge, score, score the merged model, and answer a
question in plain transformers. Every command must succeed the first time. Takes about ten minutes on two cores.
"""

import argparse
import datetime
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHOWN = 14  # lines of a command's output, from its end
PROMPTS = {
    "support": "<|im_start|>user\nWhen does the museum open?<|im_end|>\n<|im_start|>assistant\n",
    "reviews": "The library, on my visit: a noisy room.\nLabel:",
    "sums": "Question: What is 3 + 4?\nAnswer:",
}
ANSWER = """
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("runs/{name}/merged")
tokenizer = AutoTokenizer.from_pretrained("runs/{name}/merged")
inputs = tokenizer({prompt!r}, return_tensors="pt", add_special_tokens=False)
tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1]:]
print(repr(tokenizer.decode(tokens)))
"""


def main() -> None:
    """Run all commands; write the record, or end at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file to write")
    out = parser.parse_args().out
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        parts = [_make_data(Path(folder)), *[_one_file(Path(folder), file) for file in _files(Path(folder))]]
    minutes = (time.monotonic() - began) / 60
    out.write_text("\n".join([_head(minutes), *parts]), encoding="utf-8")
    print(f"{out}: {minutes:.1f} minutes")


def _head(minutes: float) -> str:
    return (
        "# The first hour, recorded\n\nThree data files that the project does not know, each from the file to an "
        f"answer of the merged model, every command typed once. {minutes:.1f} minutes in all, {datetime.date.today()}, "
        f"{_processor()}, one process on the CPU, Python {platform.python_version()}. Written by\n"
        "`python scripts/first_hour.py --out docs/first_hour.md`; the data come from `tests/first_hour/make_data.py`. "
        f"Of long outputs the last {SHOWN} lines are shown, without libraries' warnings and progress bars.\n"
    )


def _processor() -> str:
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return f"{len(names)} cores of {names[0]}" if names else platform.machine()


def _make_data(folder: Path) -> str:
    return f"## The data\n\n{_run(folder, [sys.executable, str(ROOT / 'tests/first_hour/make_data.py'), '.'])}"


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in (".jsonl", ".csv", ".parquet"))


def _one_file(folder: Path, file: Path) -> str:
    name = file.stem
    glora = [sys.executable, "-m", "glora_llm"]
    commands = [
        ["init", file.name],
        ["train", "--recipe", f"{name}.yaml", "--dry-run"],
        ["train", "--recipe", f"{name}.yaml"],
        ["evaluate", f"runs/{name}", "--split", "validation"],
        ["evaluate", f"runs/{name}", "--split", "validation", "--merged", f"runs/{name}/merged"],
    ]
    answer = [sys.executable, "-c", ANSWER.format(name=name, prompt=PROMPTS[name])]
    return "\n".join([f"## {file.name}\n", *[_run(folder, [*glora, *c]) for c in commands], _run(folder, answer)])


def _run(folder: Path, command: list[str]) -> str:
    """Run one command; return it with its seconds and the end of its output, as Markdown."""
    began = time.monotonic()
    done = subprocess.run(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    seconds = time.monotonic() - began
    shown = " ".join(command).replace(f"{sys.executable} -m glora_llm", "glora-llm").replace(sys.executable, "python")
    shown = shown.replace(f"{ROOT}/", "")
    lines = [line for line in done.stdout.replace(str(folder), ".").splitlines() if not _is_noise(line)]
    print(f"{seconds:6.1f} s  exit code {done.returncode}  {shown.splitlines()[0]}", flush=True)
    if done.returncode:
        raise SystemExit(f"not the first time:\n{done.stdout}")
    return f"```\n$ {shown.strip()}\n" + "\n".join(lines[-SHOWN:]) + f"\n```\n{seconds:.1f} s\n"


def _is_noise(line: str) -> bool:
    """Tell whether a line is a library's warning or progress bar, or a step between the first and the last."""
    step = re.match(r"step (\d+)/(\d+): loss", line)
    library = any(part in line for part in ("Warning", "warn(", "it/s]", "s/it]", "real_accelerator.py"))
    return library or (step is not None and step[1] not in ("1", step[2]))


if __name__ == "__main__":
    main()
