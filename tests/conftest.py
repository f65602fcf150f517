"""Rules for every test: no network, a cache of the session's own, and GPU tests only where there is a GPU.

A test that takes the fixture `device` runs on the CPU and, marked `gpu`, on the first CUDA device: each is the other's
twin. A test for CUDA alone is called `test_NAME_on_gpu` and has a twin `test_NAME` in the same file.
"""

import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

    from glora_llm.models.resolve import ResolvedModel

# Before transformers and datasets are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("PYTHONUNBUFFERED", None)  # commands print as they do where nobody has set it
os.environ.pop("GLORA_DATA", None)  # a folder of the user's own; tests use what the project ships
# Sockets to other machines are refused, here and in every Python process that a test starts.
NO_NETWORK = Path(__file__).parent / "no_network"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(NO_NETWORK), os.environ.get("PYTHONPATH")]))
if "sitecustomize" not in sys.modules or not hasattr(sys.modules["sitecustomize"], "NetworkRefused"):
    runpy.run_path(str(NO_NETWORK / "sitecustomize.py"))


COLLECTED = pytest.StashKey[list[pytest.Item]]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is no CUDA device; keep a list of all tests, whatever is left out.

    Files with slow tests come first: of several workers none then begins a long file when the others are done.
    """
    config.stash[COLLECTED] = list(items)
    slow = {item.path for item in items if item.get_closest_marker("launch") or item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the session's own: embedded models are made once for all tests, and nothing of the user's is read."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("GLORA_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny(cache: Path) -> "ResolvedModel":
    """The embedded LLaMA of two layers with random weights."""
    from glora_llm.models.resolve import resolve
    from glora_llm.schema import ModelSection

    return resolve(ModelSection(name_or_path="embedded:tiny-llama"))


@pytest.fixture
def collected(request: pytest.FixtureRequest) -> list[pytest.Item]:
    """All tests that were found, those too that -k or -m leave out."""
    return request.config.stash[COLLECTED]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> "torch.device":
    """The CPU and, marked `gpu`, the first CUDA device."""
    import torch

    return torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")
