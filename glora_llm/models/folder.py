"""Model folders of our own: a new model without weights, and a trained one whose layers may share bases.

Beside config.json and the tokenizer a folder may hold

- start.json: the seed of random weights, where there are none yet;
- vlora.json: how layers share weights (a `VLoRAConfig`, or an `UnequalSharing`); model.safetensors then holds bases and
  increments, float32.

A trained folder without vlora.json is a plain Hugging Face checkpoint.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glora_llm.atomic import cache_root, make_once
from glora_llm.errors import UserError, nearest
from glora_llm.models.families import KINDS, Kind, class_names, kind_of, layers, looks_both_ways
from glora_llm.models.sharded_load import Shards, fill, stored_tensors, without_values
from glora_llm.schema import ModelSection, VLoRASection
from glora_llm.schema.vlora import TRAINING_KEYS
from glora_llm.vlora import UnequalSharing, VLoRAConfig, make_compounds, make_groups

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

START, SHARING, WEIGHTS = "start.json", "vlora.json", "model.safetensors"
Sharing = VLoRAConfig | UnequalSharing
INCREMENTS = 51  # stream of the seeded draw of increments, beside the one of all other weights


def new_config(section: ModelSection, kind: Kind, given: Mapping[str, Any]) -> "PretrainedConfig":
    """Return transformers' configuration of model.config.

    Args:
        kind: what the model must be.
        given: values that follow from the data (token ids, class names); what the recipe says itself wins.

    Raises:
        UserError: for a family that is not there or of another kind, an unknown key, or values that do not fit.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    require_family(section, kind)
    settings = dict(section.config or {})
    family = settings.pop("model_type")
    usual = AutoConfig.for_model(family)
    known = {*usual.to_dict(), *usual.attribute_map, "num_labels"}
    for name in settings:
        if name not in known:
            raise UserError(f"model.config.{name}: a {family} has no such setting.{nearest(name, known)}")
    try:
        return AutoConfig.for_model(family, **{**given, **settings})
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"model.config: {' '.join(str(error).split())}") from error


def require_family(section: ModelSection, kind: Kind) -> None:
    """Check that model.config names a family of this kind of model.

    Raises:
        UserError: when it does not.
    """
    family = (section.config or {})["model_type"]
    if not class_names(kind, family):
        other = kind_of(family)
        is_what = f"is a family of {KINDS[other]}s" if other else "is no family of models of the installed transformers"
        raise UserError(f"model.config.model_type '{family}' {is_what}; expected one of {KINDS[kind]}s.")
    if kind == "text" and looks_both_ways(section.config or {}):
        raise UserError(
            f"model.config.model_type '{family}' is an encoder, whose tokens see those behind them. Add is_decoder: "
            "true to model.config, or take a family such as llama."
        )


def new_folder(
    config: "PretrainedConfig", vlora: VLoRASection | None, seed: int, identity: str, add: Callable[[Path], None]
) -> tuple[Path, str]:
    """Return the folder of a new model, made once in the cache, and its fingerprint.

    Args:
        seed: of its random weights.
        identity: of what `add` writes.
        add: writes the tokenizer, or the image processor.
    """
    sharing = None if vlora is None else vlora_config(vlora)
    parts = {
        "config": config.to_diff_dict(),
        "vlora": None if sharing is None else sharing.as_json(),
        "seed": seed,
        "identity": identity,
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def make(folder: Path) -> None:
        add(folder)
        config.save_pretrained(folder)
        (folder / START).write_text(json.dumps({"seed": seed}) + "\n", encoding="utf-8")
        if sharing is not None:
            write_sharing(sharing, folder)

    return make_once(cache_root() / f"new-{key[:24]}", make), key


def vlora_config(section: VLoRASection) -> VLoRAConfig:
    """Return the section as VLoRA itself takes it."""
    return VLoRAConfig(**section.model_dump(exclude=set(TRAINING_KEYS)))


def write_sharing(config: Sharing, folder: Path) -> None:
    """Write vlora.json."""
    (folder / SHARING).write_text(json.dumps(config.as_json(), indent=1) + "\n", encoding="utf-8")


def read_sharing(folder: Path) -> Sharing | None:
    """Return how the layers of a model folder share weights; None: they do not.

    Raises:
        UserError: when vlora.json does not hold a `VLoRAConfig`.
    """
    file = folder / SHARING
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return UnequalSharing.from_json(values) if "groups" in values else VLoRAConfig.from_json(values)
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} does not say how layers share weights: {error}. Write the folder again.") from error


def is_ours(folder: Path) -> bool:
    """Tell whether plain transformers cannot load this folder: it has no weights yet, or shared ones."""
    return (folder / START).is_file() or (folder / SHARING).is_file()


def require_weights(folder: Path) -> None:
    """Check that a folder that is ours has weights.

    Raises:
        UserError: when it has none.
    """
    if not (folder / WEIGHTS).is_file() and not (folder / START).is_file():
        raise UserError(f"{folder} holds {SHARING} and no {WEIGHTS}: it was written half-way. Write it again.")


def build(
    folder: Path,
    empty: "Callable[[], PreTrainedModel]",
    dtype: "torch.dtype",
    device: "torch.device",
    shards: Shards | None = None,
) -> "PreTrainedModel":
    """Return the model of a folder that is ours, in eval mode.

    Random weights are drawn in float32 on the CPU, so a seed means the same weights everywhere; a dense model and a
    VLoRA one of the same seed begin with the same bases. Then layers share, stored weights are read, and parameters
    (no buffers: rotary frequencies stay exact) become `dtype`.

    Args:
        empty: makes the dense model in float32.
        shards: divides each parameter over the processes as it gets its values (ZeRO 3). Stored weights are then read
            one at a time. Random ones are drawn by the main process alone, whose host memory holds the whole model in
            float32 until it is divided: a generator's numbers have an order.

    Raises:
        UserError: layers that cannot share as vlora.json says, or stored weights that do not fit.
    """
    import torch

    require_weights(folder)
    stored = (folder / WEIGHTS).is_file()
    seed = 0 if stored else int(json.loads((folder / START).read_text(encoding="utf-8"))["seed"])
    draws = not stored and (shards is None or shards.is_main_process)
    with torch.random.fork_rng(devices=[]), contextlib.nullcontext() if draws else without_values():
        torch.manual_seed(seed)
        model = empty()
        share(model, folder, torch.Generator().manual_seed(seed * 1_000_003 + INCREMENTS))
    values = _stored_values(folder, model) if stored else dict(model.named_parameters()) if draws else {}
    fill(model, values, dtype, device, shards)
    return model.eval()


def share(model: "PreTrainedModel", folder: Path, generator: "torch.Generator | None" = None) -> None:
    """Let the layers of a dense model share weights as vlora.json says; without that file nothing is done."""
    sharing = read_sharing(folder)
    if isinstance(sharing, UnequalSharing):
        make_groups(model, list(layers(model)), sharing, generator)
    elif sharing is not None:
        make_compounds(model, list(layers(model)), sharing, generator)


def _stored_values(folder: Path, model: "PreTrainedModel") -> dict[str, Any]:
    """Return the stored tensors by name, none of them read yet.

    Raises:
        UserError: when they are not those of the model.
    """
    tensors = stored_tensors(folder)
    for name, parameter in model.named_parameters():
        shape = tuple(tensors[name].get_shape()) if name in tensors else None
        if shape != tuple(parameter.shape):
            got = "is missing" if shape is None else f"has shape {shape}"
            raise UserError(f"{folder / WEIGHTS}: {name} {got}; expected {tuple(parameter.shape)}. Write it again.")
    left = tensors.keys() - dict(model.named_parameters())
    if left:
        raise UserError(f"{folder / WEIGHTS} has {min(left)}, which {SHARING} does not ask for.")
    return tensors


def write_trained(
    folder: Path, config: "PretrainedConfig", sharing: Sharing | None, weights: "Mapping[str, Tensor]"
) -> None:
    """Write config.json, the weights as they were trained and, where layers share, vlora.json."""
    from safetensors.torch import save_file

    write_trained_config(folder, config, sharing, next(iter(weights.values())).dtype)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS, {"format": "pt"})


def write_trained_config(
    folder: Path, config: "PretrainedConfig", sharing: Sharing | None, dtype: "torch.dtype"
) -> None:
    """Write config.json of weights of that dtype and, where layers share, vlora.json."""
    import copy

    folder.mkdir(parents=True, exist_ok=True)
    written = copy.deepcopy(config)
    written.use_cache = True
    written.dtype = dtype
    written.save_pretrained(folder)
    if sharing is not None:
        write_sharing(sharing, folder)
