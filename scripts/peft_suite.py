"""Run PEFT's own generic tests on GLoRA, and compare what fails with a list of expected failures.

  python scripts/peft_suite.py [--cache DIR] [--workers 2] [-k EXPRESSION]

The source package of the PEFT that is installed is fetched from the package index by pip, once, into DIR; it holds
PEFT's tests. The generic ones, which run over all methods, get `GLoRAConfig` in several variants where they name PEFT's
own GLoRA; tests of another method alone are left out. Models that they ask the hub for are built here, tiny and random:
no GPU and no hub is needed.
Exits with 1 when a case fails that scripts/peft_tests/expected.yaml does not name.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
EXPECTED = ROOT / "scripts" / "peft_tests" / "expected.yaml"
MODULES = (
    *("custom_models", "decoder_models", "encoder_decoder_models", "feature_extraction_models", "seq_classifier"),
    *("token_classification_qa", "config"),
)
NOWHERE = "http://127.0.0.1:9"  # the hub, so that a model that is not built here fails at once


def main() -> int:
    """Fetch, run, print a table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "glora_llm" / "peft_suite"
    parser.add_argument("--cache", type=Path, default=default)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("-k", metavar="EXPRESSION", help="of the cases, as pytest takes it")
    arguments = parser.parse_args()
    began, cache = time.monotonic(), arguments.cache.absolute()
    tests = fetch(version("peft"), cache)
    results = run(tests, cache, arguments.workers, arguments.k)
    return report(results, time.monotonic() - began, partial=arguments.k is not None)


def fetch(wanted: str, cache: Path) -> Path:
    """Return the folder of PEFT's tests of one version, downloaded and unpacked where it is not there."""
    source = cache / f"peft-{wanted}"
    if not (source / "tests" / "__init__.py").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--no-binary", ":all:", "--no-build-isolation", f"peft=={wanted}"], cwd=cache, check=True)
        with tarfile.open(next(cache.glob(f"peft-{wanted}.tar.gz"))) as archive:
            archive.extractall(cache, filter="data")
        (source / "tests" / "__init__.py").touch()  # they import each other as a package
    return source / "tests"


def run(tests: Path, cache: Path, workers: int, expression: str | None) -> list[dict[str, str]]:
    """Run the cases by pytest in the folder of the tiny models, and return the outcome of each."""
    models, results = cache / "models", cache / "results.json"
    models.mkdir(parents=True, exist_ok=True)
    results.unlink(missing_ok=True)
    environment = os.environ | {
        "HF_ENDPOINT": NOWHERE,
        "OMP_NUM_THREADS": "1",
        "PEFT_SUITE_RESULTS": str(results),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(tests.parent)]),
    }
    build = "import sys; from pathlib import Path; from scripts.peft_tests.models import build; build(Path.cwd())"
    subprocess.run([sys.executable, "-c", build], cwd=models, env=environment, check=True)
    files = [str(tests / f"test_{name}.py") for name in MODULES]
    options = ["-q", "--tb=no", "-p", "scripts.peft_tests.plugin", "-p", "no:warnings", "-p", "no:cacheprovider"]
    options += ["-c", os.devnull, "--rootdir", str(tests.parent), "--import-mode=importlib"]
    options += ["-n", str(workers)] if workers > 1 else []
    options += ["-k", expression] if expression else []
    # the names of models on the hub are folders below the working folder
    subprocess.run([sys.executable, "-m", "pytest", *options, *files], cwd=models, env=environment, check=False)
    if not results.is_file():
        raise SystemExit("pytest wrote no results: see its messages above")
    found: list[dict[str, str]] = json.loads(results.read_text(encoding="utf-8"))
    return found


def report(results: list[dict[str, str]], seconds: float, partial: bool) -> int:
    """Print a table by module, the expected failures by reason, and what was not expected; return the exit code.

    Args:
        partial: not all cases were run, so an expected failure may be missing.
    """
    expected: list[dict[str, Any]] = yaml.safe_load(EXPECTED.read_text(encoding="utf-8")) or []
    table: dict[str, Counter[str]] = {}
    reasons: Counter[str] = Counter()
    surprises = []
    for result in results:
        module = result["case"].partition("::")[0].rpartition("/")[2]
        table.setdefault(module, Counter())[result["outcome"]] += 1
        entry = next((item for item in expected if re.search(item["case"], result["case"])), None)
        if result["outcome"] == "failed" and (entry is None or not re.search(entry["says"], result["message"], re.S)):
            surprises.append(result)
        elif result["outcome"] == "failed" and entry is not None:
            reasons[entry["reason"]] += 1
    print(f"\nPEFT {version('peft')}, {len(results)} cases in {seconds / 60:.1f} minutes\n")
    rows = [(name, table[name]) for name in sorted(table)] + [("all", sum(table.values(), Counter()))]
    for name, counts in rows:
        print(f"{name:34}" + "".join(f"{counts[kind]:6} {kind}" for kind in ("passed", "failed", "skipped")))
    for reason, count in reasons.most_common():
        print(f"\nexpected, {count}: {reason}")
    for item in () if partial else expected:
        held = [r for r in results if re.search(item["case"], r["case"]) and r["outcome"] != "skipped"]
        passed = [r["case"] for r in held if r["outcome"] == "passed"]
        if passed or not held:
            print(f"\nexpected to fail, {'passed' if held else 'not there'}: {item['case']} {' '.join(passed[:3])}")
    for result in surprises:
        print(f"\nNOT EXPECTED: {result['case']}\n    {result['message']}")
    return 1 if surprises or not results else 0


if __name__ == "__main__":
    raise SystemExit(main())
