"""`model.name_or_path` -> a local folder of config.json, safetensors and tokenizer; nothing later needs the hub."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glora_llm.errors import UserError
from glora_llm.files.links import dangling
from glora_llm.models.config_file import load_config, read_settings
from glora_llm.models.embedded import EMBEDDED, embedded_folder
from glora_llm.models.families import KINDS, Kind, class_names, kind_of, looks_both_ways
from glora_llm.models.fingerprint import fingerprint, read_header, weight_files
from glora_llm.schema import ModelSection

EMBEDDED_PREFIX = "embedded:"
SAME_NAMES = ("llama", "mistral", "qwen2", "qwen3")  # modules are called as their weights are in the files
LLAMA_LINEARS = [
    *(f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"),
    *(f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")),
    "lm_head",
]
LLAMA_NORMS = [*(f"model.layers.0.{part}_layernorm" for part in ("input", "post_attention")), "model.norm"]
LLAMA_MODULES = [*LLAMA_LINEARS, *LLAMA_NORMS, "model.layers.0.self_attn", "model.layers.0.mlp", "model.embed_tokens"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
HUB_SETTINGS = ["*.json", "*.jinja", "tokenizer.model", "*.txt"]
HUB_FILES = ["*.safetensors", *HUB_SETTINGS]
HUB_IGNORED = ["*/*", "consolidated*"]  # other formats of the same weights


@dataclass(frozen=True)
class ResolvedModel:
    """A base model on this machine.

    Attributes:
        folder: config.json, safetensors, tokenizer.
        name: what the recipe called it; another machine finds it by this name.
        revision: commit of a hub model, else None.
        fingerprint: identity of the weights; adapters and checkpoints record it and refuse another.
        headless: that of the model before it got a new head; empty: it got none.
    """

    folder: Path
    name: str
    revision: str | None
    fingerprint: str
    headless: str = ""


def look_at_model(section: ModelSection) -> None:
    """Check that the base model a recipe names can be found, without the hub and without reading weights.

    Raises:
        UserError: no such folder, file, package or possible hub id, or a folder without config.json.
    """
    name = section.name_or_path
    if name is None:  # a new model
        return
    if name.startswith(EMBEDDED_PREFIX):
        EMBEDDED.get(name.removeprefix(EMBEDDED_PREFIX))
        return
    path = Path(name).expanduser()
    if path.is_dir():
        _read_config(path, name)
    elif path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"model.name_or_path {path} is a file but no .gguf: give the folder that it is in")
    elif link := dangling(path):
        raise UserError(f"model.name_or_path {name} does not exist.{link}")
    elif path.suffix == ".gguf" or not HUB_ID.fullmatch(name):
        raise UserError(
            f"model.name_or_path '{name}' does not exist (looked for {path.absolute()}) and is no hub id. "
            "Give a folder, a .gguf file, a hub id such as meta-llama/Llama-2-7b-hf, or embedded:NAME."
        )


def stored_modules(section: ModelSection) -> tuple[list[str], list[str]]:
    """Return the names of all modules of a model on this machine, and of its linears, by the headers of its files.

    Both are empty for models that are not here yet, and for families that are stored under other names.

    Raises:
        UserError: for a file that is damaged or missing.
    """
    name = section.name_or_path or ""
    if name.startswith(EMBEDDED_PREFIX):
        return LLAMA_MODULES, LLAMA_LINEARS
    path = Path(name).expanduser()
    if not name or not path.is_dir() or _read_config(path, name).get("model_type") not in SAME_NAMES:
        return [], []
    tensors = {key: entry for file in weight_files(path) for key, entry in read_header(file)[0].items()}
    names = [key.removesuffix(".weight") for key in tensors if key.endswith(".weight")]
    matrices = [key.removesuffix(".weight") for key in tensors if len(tensors[key]["shape"]) == 2]
    holders = [name.rpartition(".")[0] for name in names]
    linears = [name for name in matrices if not name.endswith("embed_tokens")]
    return [*names, *holders, "lm_head"], [*linears, "lm_head"]  # which a file leaves out when it is tied


def resolve(section: ModelSection, weights: bool = True, kind: Kind | None = "text") -> ResolvedModel:
    """Find, download or convert the base model that the recipe names.

    Args:
        weights: False for a dry run: of a hub model only configuration and tokenizer are fetched, and there is no
            fingerprint. Weights that are on this machine are looked at all the same: the files must be whole.
        kind: what the model must be; None: anything that is trained here.

    Raises:
        UserError: missing folder or file, no network, no config.json, pickles only, weights that are quantised
            already, another kind of model.
    """
    name = section.name_or_path
    assert name is not None
    look_at_model(section)
    folder, revision = _locate(name, section.revision, weights)
    _check_kind(folder, name, kind)
    here = weights or revision is None  # on this machine, or to be
    return ResolvedModel(folder, name, revision, fingerprint(folder) if here else "")


def configuration_folder(section: ModelSection, kind: Kind | None = "text") -> Path:
    """Return a folder with the model's config.json, and perhaps no weights; of a hub model that file alone is fetched.

    Raises:
        UserError: as `resolve`, but for what weights are missing.
    """
    name = section.name_or_path
    assert name is not None
    look_at_model(section)
    path = Path(name).expanduser()
    if name.startswith(EMBEDDED_PREFIX) or path.exists():
        folder = _locate(name, section.revision, weights=False)[0]
    else:
        folder, _ = _download(name, section.revision, ["config.json"])
    _check_kind(folder, name, kind)
    return folder


def _locate(name: str, revision: str | None, weights: bool) -> tuple[Path, str | None]:
    """Return the folder and, of a hub model, its commit."""
    path = Path(name).expanduser()
    local = name.startswith(EMBEDDED_PREFIX) or path.exists()
    if local and revision is not None:
        raise UserError(f"model.revision '{revision}' belongs to hub ids, and '{name}' is local: remove one of them")
    if name.startswith(EMBEDDED_PREFIX):
        return embedded_folder(name.removeprefix(EMBEDDED_PREFIX)), None
    if path.is_dir():
        return path.resolve(), None
    if path.is_file():
        from glora_llm.models.gguf import converted

        return converted(path.resolve()), None
    return _download(name, revision, HUB_FILES if weights else HUB_SETTINGS)


def _download(name: str, revision: str | None, files: list[str]) -> tuple[Path, str]:
    """Return the snapshot folder of a hub model (from the hub's cache when it is complete there) and its commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=files, ignore_patterns=HUB_IGNORED)
    except GatedRepoError as error:
        raise UserError(
            f"The hub model '{name}' is gated: accept its licence on its page, then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"The hub model '{name}' has no revision '{revision}': check model.revision") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"'{name}' is neither a folder here nor a model on the hub: check model.name_or_path "
            "(a private model needs `hf auth login`)"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        raise UserError(
            f"'{name}' is no folder here, is not in the hub's cache, and the hub cannot be reached (no network, or "
            f"HF_HUB_OFFLINE is set). Download it where there is a network: `hf download {name}`; copy its folder "
            "here and give that as model.name_or_path; or use embedded:NAME."
        ) from error
    return Path(folder), Path(folder).name


def _check_kind(folder: Path, name: str, wanted: Kind | None) -> None:
    """Refuse a folder that transformers' Auto class of this kind would not load as it was trained.

    Raises:
        UserError: see `resolve`.
    """
    config = _read_config(folder, name)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "an unknown method")
        raise UserError(
            f"The weights of '{name}' are already quantised ({method}). Give the unquantised model and let "
            "model.quantization (nf4, fp4, int8) store it in fewer bits."
        )
    family = config.get("model_type", "")
    kind = wanted or kind_of(family) or "text"
    allowed = class_names(kind, family)
    if not allowed:
        example = {"text": "a LLaMA", "images": "a ViT", "classification": "a LLaMA or a BERT"}[kind]
        raise UserError(
            f"'{name}' has model_type '{config.get('model_type')}', which is no {KINDS[kind]} of the installed "
            f"transformers (code that comes with a model is not run). Give one, such as {example}."
        )
    if wanted == "classification":  # any model of the family can get a head
        load_config(folder)
        return
    if wanted != "images" and looks_both_ways(config):
        raise UserError(
            f"'{name}' has model_type '{family}', whose tokens see those behind them: it cannot learn to write. Give a "
            "model that was made to, such as a LLaMA."
        )
    built = config.get("architectures") or []
    if built and not allowed & set(built):
        raise UserError(f"'{name}' is a {built[0]}, expected one of the {KINDS[kind]}s ({', '.join(sorted(allowed))})")
    load_config(folder)


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    """Return config.json."""
    file = folder / "config.json"
    if not file.is_file():
        hint = ""
        if (folder / "adapter_config.json").is_file():
            hint = " It holds an adapter: give the base model that the adapter was trained on."
        elif len(files := sorted(folder.glob("*.gguf"))) > 0:
            hint = f" It holds {files[0].name}: give that file."
        raise UserError(f"'{name}' has no config.json in {folder}: expected a Hugging Face model folder.{hint}")
    return read_settings(file)
