"""A plugin of pytest that runs PEFT's tests with this project's GLoRA where they name PEFT's own."""

import json
import linecache
import os
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any

import pytest

from glora_llm.glora import GLoRAConfig
from scripts.peft_tests.cases import converted, is_ours

RESULTS = "PEFT_SUITE_RESULTS"  # the file that the main process writes
# Tests of features that LoRA has and PEFT's own GLoRA in part: they skip what is not LoRA by its class.
AS_LORA = ("mixed_adapter_batches",)
_results: list[dict[str, str]] = []
_converted: dict[int, bool] = {}


def pytest_configure() -> None:
    """Let PEFT's tests be imported without diffusers, of which they name one class."""
    if find_spec("diffusers") is None:
        stub: Any = module_from_spec(ModuleSpec("diffusers", None))
        stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
        sys.modules["diffusers"] = stub


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Replace the cases of PEFT's GLoRA by ours before pytest reads them."""
    for module in _modules(metafunc.module):
        if hasattr(module, "GloraConfig"):
            module.GloraConfig = GLoRAConfig
    for mark in metafunc.definition.iter_markers("parametrize"):
        if id(mark) not in _converted and len(mark.args) > 1:
            names, values = mark.args[:2]
            cases = converted(names, values, metafunc.module.__name__.rpartition(".")[2])
            _converted[id(mark)] = cases is not None
            if cases is not None:
                object.__setattr__(mark, "args", (names, cases))
                object.__setattr__(mark, "kwargs", {key: v for key, v in mark.kwargs.items() if key != "ids"})


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the cases that are ours; the others test another method."""
    mine: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        spec = getattr(item, "callspec", None)
        (mine if spec is not None and any(map(is_ours, spec.params.values())) else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = mine


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: Any) -> Iterator[None]:
    """Let a test that skips everything but LoRA see LoRA in our configuration, while it runs."""
    modules = _modules(item.module) if any(part in item.name for part in AS_LORA) else []
    kept = [(module, module.LoraConfig) for module in modules if hasattr(module, "LoraConfig")]
    for module, _ in kept:
        module.LoraConfig = GLoRAConfig
    yield
    for module, lora in kept:
        module.LoraConfig = lora


def _modules(module: Any) -> list[Any]:
    """Return a test module and the one that holds the tests shared by all, where it is imported."""
    return [module, *filter(None, [sys.modules.get(f"{module.__package__}.testing_common")])]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep the outcome of each case: of its call, or of the phase that did not pass."""
    if report.when == "call" or report.outcome != "passed":
        crash = getattr(report.longrepr, "reprcrash", None)
        message = str(report.longrepr or "")
        if crash is not None:
            message = f"{linecache.getline(crash.path, crash.lineno).strip()} -> {crash.message}"
        _results.append({"case": report.nodeid, "outcome": report.outcome, "message": message[:600]})


def pytest_sessionfinish() -> None:
    """Write all outcomes, in the main process alone."""
    if RESULTS in os.environ and "PYTEST_XDIST_WORKER" not in os.environ:
        Path(os.environ[RESULTS]).write_text(json.dumps(_results), encoding="utf-8")
