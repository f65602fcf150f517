"""`glora-llm import FOLDER --base MODEL --out DIR`: a foreign adapter as a run folder, as if trained here."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from glora_llm import recipe as recipes
from glora_llm.adapters.start import ADAPTER_WEIGHTS
from glora_llm.atomic import require_new, whole_folder
from glora_llm.errors import UserError
from glora_llm.foreign.files import READ, ForeignFiles, find_files
from glora_llm.foreign.lycoris_format import from_lycoris, is_lycoris
from glora_llm.foreign.peft_formats import from_peft
from glora_llm.foreign.slots import Base, Foreign
from glora_llm.glora import GLoRAConfig
from glora_llm.glora.path import PEFT_ROOT, genome_to_json, genome_to_slots
from glora_llm.merge.layers import AdapterLayers
from glora_llm.models.load import meta_model
from glora_llm.models.resolve import ResolvedModel, resolve
from glora_llm.models.stored import StoredTensors, stored_tensors
from glora_llm.schema import Recipe
from glora_llm.training.checkpoint import write_manifest
from glora_llm.vlora import to_dense

HEADER = """\
# {format}, imported from {source}: the same function on the same base, in GLoRA's slots (genome.json).
#   glora-llm merge {out} --out merged
#   glora-llm train --recipe {out}/recipe.yaml data.source=FILE data.format=FORMAT training.steps=N
# The data below are text that ships, and stand in the place of yours.
"""


def import_adapter(path: Path, base: str | None, out: Path, quantization: str, dtype: str) -> None:
    """Read a foreign adapter, check it against the base, and write a run folder with it.

    Args:
        path: the adapter: a folder, or a .safetensors file.
        base: the base model, as model.name_or_path; None: the one that the adapter names.
        out: the folder to make: recipe.yaml, base.json, genome.json, adapter/.
        quantization: of the base that the adapter was trained on.
        dtype: that the base was computed in.

    Raises:
        UserError: for an unknown format, another base, or a part that has no exact form; nothing is written then.
    """
    require_new(out)
    files = find_files(path)
    tensors, metadata = files.read()
    if files.config is None and not is_lycoris(tensors):
        raise UserError(f"{path}: the file holds {next(iter(tensors), 'nothing')}, which is of no format here. {READ}")
    name = base or files.base_name
    if name is None:
        raise UserError(f"{path} does not say which base it was trained on: give --base MODEL.")
    recipe = _recipe(name, quantization, dtype, {}, out)
    resolved = resolve(recipe.model)
    _require_same_weights(files, resolved)
    shapes = Base(to_dense(meta_model(recipe.model, resolved.folder)))
    foreign = (
        from_lycoris(tensors, metadata, shapes) if files.config is None else from_peft(files.config, tensors, shapes)
    )
    foreign.require_fits(shapes)
    _require_same_copies(foreign, stored_tensors(resolved.folder, recipe.model, torch.float32))
    recipe = _recipe(name, quantization, dtype, _adapter_section(foreign, shapes, out), out)
    with whole_folder(out) as folder:
        _write(folder, out, foreign, recipe, resolved, path)
    _report(out, foreign, files, name)


def _require_same_weights(files: ForeignFiles, base: ResolvedModel) -> None:
    """Check an adapter that was trained by this program (another method) against the fingerprint of its base.

    Raises:
        UserError: when the base is another one.
    """
    trained = files.weights.parent.parent / "base.json"
    if not trained.is_file() or not trained.with_name("recipe.yaml").is_file():
        return
    identity: dict[str, Any] = json.loads(trained.read_text(encoding="utf-8"))
    if identity.get("fingerprint") != base.fingerprint:
        raise UserError(
            f"{files.path} was trained on {identity.get('name')} with fingerprint "
            f"{str(identity.get('fingerprint'))[:12]}; {base.name} has {base.fingerprint[:12]}. Give that base."
        )


def _require_same_copies(foreign: Foreign, stored: StoredTensors) -> None:
    """Check the tensors of the base that an adapter holds against those of this base.

    Raises:
        UserError: when one is not of the base, or differs.
    """
    for name, copy in foreign.copies.items():
        there = "model.embed_tokens.weight" if name == "lm_head.weight" and name not in stored else name  # tied
        if there not in stored:
            raise UserError(f"The adapter holds {name}, which is no part of an adapted layer, and the base has it not.")
        own = stored.get(there)
        if own.shape != copy.shape or not torch.equal(own.to(copy.dtype), copy):
            raise UserError(
                f"The adapter holds a copy of its base's {name}, and that of this base differs: this is not the base "
                "that it was trained on."
            )


def _adapter_section(foreign: Foreign, base: Base, out: Path) -> dict[str, Any]:
    section: dict[str, Any] = {
        "method": "glora",
        "targets": _targets(foreign, base),
        "genome": str(out / "genome.json"),
        "weights": str(out / "adapter"),
    }
    if foreign.composition is not None:
        section["composition"] = foreign.composition
    if foreign.saved_modules:
        section["modules_to_save"] = foreign.saved_modules
    return section


def _targets(foreign: Foreign, base: Base) -> list[str]:
    """Return the last parts of the layers' names, or whole names where a module that is no linear shares one."""
    suffixes = sorted({name.rpartition(".")[2] for name in foreign.layers})
    linears = base.linears
    others = {name.rpartition(".")[2] for name, _ in base.model.named_modules() if name not in linears}
    return sorted(foreign.layers) if others & set(suffixes) else suffixes


def _recipe(base: str, quantization: str, dtype: str, adapter: dict[str, Any], out: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name_or_path": base, "quantization": quantization, "dtype": dtype},
            "adapter": adapter,
            "data": {
                "format": "text",
                "source": "embedded:tinyshakespeare",
                "validation": 16,
                "max_tokens": 256,
                "overlong": "drop",
                "packing": True,
            },
            "training": {"global_batch": 8, "micro_batch": 1, "steps": 100, "lr": 1e-4},
            "output": {"dir": f"{out}-trained"},
        }
    )


def _write(folder: Path, out: Path, foreign: Foreign, recipe: Recipe, base: ResolvedModel, source: Path) -> None:
    """Fill the run folder, and check by the merge's own reading that every weight found its place."""
    header = HEADER.format(format=foreign.format, source=source, out=out)
    identity = {"name": base.name, "revision": base.revision, "fingerprint": base.fingerprint}
    (folder / "recipe.yaml").write_text(header + recipes.dump(recipe), encoding="utf-8")
    (folder / "base.json").write_text(json.dumps(identity | {"dtype": recipe.model.dtype}), encoding="utf-8")
    (folder / "genome.json").write_text(genome_to_json(foreign.genome()), encoding="utf-8")
    adapter = folder / "adapter"
    adapter.mkdir()
    tensors = foreign.tensors() | {name: tensor.float() for name, tensor in foreign.saved.items()}
    save_file({PEFT_ROOT + name: tensor.contiguous() for name, tensor in tensors.items()}, adapter / ADAPTER_WEIGHTS)
    section = recipe.adapter
    config = GLoRAConfig(
        task_type="CAUSAL_LM",
        target_modules=section.targets,
        modules_to_save=section.modules_to_save,
        genome=genome_to_slots(foreign.genome()),
        composition=section.composition,
        base_model_name_or_path=str(base.folder) if base.name.startswith("embedded:") else base.name,
        inference_mode=True,
    )
    config.save_pretrained(str(adapter))
    write_manifest(adapter)
    here = section.model_copy(update={"genome": str(folder / "genome.json"), "weights": None})
    AdapterLayers(recipe.model_copy(update={"adapter": here}), base.folder, adapter, steps=1)


def _report(out: Path, foreign: Foreign, files: ForeignFiles, base: str) -> None:
    slots = sorted({slot for values in foreign.layers.values() for slot in values})
    numbers = sum(tensor.numel() for tensor in foreign.tensors().values())
    print(f"{out}: {foreign.format}, {len(foreign.layers)} layers, slots {', '.join(slots)}, {numbers:,} numbers")
    named = files.base_name
    if named is not None and named != base and Path(named).name != Path(base).name:
        print(f"warning: it was trained on a base called {named}, and --base is {base}; their shapes agree.")
    print(f"next:  glora-llm merge {out} --out merged")
    print(f"       glora-llm train --recipe {out}/recipe.yaml data.source=FILE data.format=FORMAT")
