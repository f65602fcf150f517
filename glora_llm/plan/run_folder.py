"""The run folder: whose it is, where things are, and what a later command needs to know."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glora_llm import recipe as recipes
from glora_llm.atomic import write_text
from glora_llm.errors import UserError
from glora_llm.files.json_file import read_object
from glora_llm.schema import Recipe

# A run may go on with these changed; all else makes it another run.
FREE_KEYS = {
    "training": {"deepspeed", "micro_batch", "log_every", "max_bad_steps", "deterministic"},
    "data": {"revisions"},  # the digest of the training rows binds
    "model": {"attention", "kernels", "gradient_checkpointing", "compile", "dtype"},  # base.json holds the dtype itself
}
BASE_GONE = "Put a copy of it back: without it nothing says that the base is still the one that was trained on."
RATE_GONE = "Delete it, and set training.lr to the number in recipe.yaml beside it."
AUTO_RATE = "learning_rate.json"  # what `training.lr: auto` was replaced by
LOOKED_AT = 1 << 20  # bytes of metrics.jsonl
FOLDERS = ("checkpoints", "adapter", "model", "tensorboard", "search", "finetuned", "retrained", "merged")
LAUNCHES = "launches.jsonl"
FREE_SECTIONS = {"evaluation", "search", "merge", "output"}


# Where rows are read from, and which classes compete on them; what is done with a finished run may read other ones.
ROW_KEYS = ("source", "subset", "split", "validation", "test", "max_test_rows", "columns", "images.own_classes")
DATA_KEYS = {f"data.{key}" for key in ROW_KEYS}


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run.

    Args:
        path: the folder.
        overrides: changes to its recipe, `data.KEY=VALUE`, for one command.
    """

    path: Path
    overrides: tuple[str, ...] = ()

    @property
    def checkpoints(self) -> Path:
        """The folder of the `step-N` folders."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The trained adapter, as PEFT saves it."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The model that was trained as a whole: config.json, weights, tokenizer, vlora.json where layers share."""
        return self.path / "model"

    def trained(self, recipe: Recipe) -> Path:
        """Return where what was trained is, in the end."""
        return self.model if recipe.adapter.is_full else self.adapter

    @property
    def search(self) -> Path:
        """The results of a search: journal, archive, pictures, and the chosen genome as an adapter."""
        return self.path / "search"

    @property
    def genome(self) -> Path:
        """The chosen genome of a supernet, or the genome that a run was given."""
        return self.path / "genome.json"

    def recipe(self) -> Recipe:
        """Return the run's recipe, with the structure that was chosen within adapter.budget as adapter.genome, and with
        model and data sets of the hub at the commits that the run began with.

        Raises:
            UserError: as `written_recipe`, and when base.json is damaged.
        """
        base, recipe = self.base(), self.written_recipe()
        if recipe.adapter.budget is not None and self.genome.is_file():
            chosen = {"budget": None, "slots": None, "genome": str(self.genome)}
            chosen |= {"predictor": "uniform", "budget_rows": None}  # keys of a budget alone
            recipe = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update=chosen)})
        return _at_commits(recipe, base.get("revision"), base.get("data"))

    def rated(self, recipe: Recipe) -> Recipe:
        """Return a recipe whose `training.lr: auto` is the number that this run began with, where it has begun."""
        file = self.path / AUTO_RATE
        if recipe.training.lr != "auto" or not file.is_file():
            return recipe
        lr = read_object(file, RATE_GONE).get("lr")
        if not isinstance(lr, float) or not 0 < lr < float("inf"):
            raise UserError(f"{file} has no learning rate `lr`. {RATE_GONE}")
        return recipe.model_copy(update={"training": recipe.training.model_copy(update={"lr": lr})})

    def pinned(self, recipe: Recipe) -> Recipe:
        """Return a recipe that goes on with this run: model and data of the hub at the commits that it began with.

        Revisions that the recipe names itself stay; the fingerprints of weights and rows are compared all the same.
        """
        base = self.base()
        is_pinned = recipe.model.revision is None and base.get("name") == recipe.model.name_or_path
        return _at_commits(recipe, base.get("revision") if is_pinned else None, base.get("data"))

    def written_recipe(self) -> Recipe:
        """Return the run's recipe as recipe.yaml has it.

        Raises:
            UserError: when this is no run folder, or an override is of another key than those of `DATA_KEYS`.
        """
        file = self.path / "recipe.yaml"
        if not file.is_file():
            raise UserError(
                f"{self.path} is no run folder: it has no recipe.yaml. Give the output.dir of a training run."
            )
        foreign = [text for text in self.overrides if text.partition("=")[0] not in DATA_KEYS]
        if foreign:
            raise UserError(f"'{foreign[0]}' may not be changed here. May be given: {', '.join(sorted(DATA_KEYS))}.")
        recipe = recipes.load(str(file), self.overrides)
        genome = recipe.adapter.genome
        if genome is None or Path(genome).is_file() or not self.genome.is_file():
            return recipe
        # The folder, or the file, has been moved since; a run keeps a copy.
        adapter = recipe.adapter.model_copy(update={"genome": str(self.genome)})
        return recipe.model_copy(update={"adapter": adapter})

    def summary(self) -> dict[str, Any]:
        """Return summary.json, or nothing where training has not ended."""
        file = self.path / "summary.json"
        advice = "Delete the file: the same training command writes it again."
        return read_object(file, advice) if file.exists() else {}

    def launches(self) -> list[dict[str, Any]]:
        """Return a record of every launch that began to train: started, from_step, command, versions, hardware ...

        Lines that are none are left out: nothing depends on them but a report.
        """
        file = self.path / LAUNCHES
        found = []
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            found += [entry] if isinstance(entry, dict) else []
        return found

    def write(self, name: str, text: str) -> None:
        """Write a small file atomically."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / name, text)

    def update_summary(self, values: dict[str, Any]) -> None:
        """Add values to summary.json."""
        self.write("summary.json", json.dumps(self.summary() | values, indent=1) + "\n")

    @property
    def has_ended(self) -> bool:
        """True when all steps were trained and the final weights were written."""
        return "steps" in self.summary()

    def require_same_run(self, recipe: Recipe) -> None:
        """Check that the folder is new or belongs to this recipe.

        Raises:
            UserError: naming the keys that differ, and the command that trains on in another folder where one can.
        """
        if not (self.path / "recipe.yaml").is_file():
            if self.checkpoints.is_dir():
                raise UserError(f"{self.path} has checkpoints but no recipe.yaml; choose another output.dir.")
            return
        there, here = _binding(self.written_recipe()), _binding(recipe)
        differing = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
        if differing:
            shown = "; ".join(f"{key}: {there.get(key)!r} there, {here.get(key)!r} here" for key in differing[:4])
            raise UserError(
                f"{self.path} holds a run of another recipe ({shown}). Choose another output.dir, or delete it."
                f"{self._going_on(there, here, differing)}"
            )

    def _going_on(self, there: dict[str, Any], here: dict[str, Any], differing: list[str]) -> str:
        """Return the command that trains an ended run's weights on with other data or settings, in a new folder."""
        if not self.has_ended or not all(key.startswith(("training.", "data.")) for key in differing):
            return ""
        changed, more = {key: here.get(key) for key in differing}, ""
        before, after = there.get("training.steps"), here.get("training.steps")
        if before and after and after > before:
            changed["training.steps"], more = after - before, f", {after - before} steps more"
        if there["adapter.method"] == "full":
            begun = ("model.config", "model.tokenizer", "model.revision", "model.from_dense")
            changed |= {"model.name_or_path": str(self.model)} | {key: None for key in begun if there.get(key)}
            changed |= {"vlora": None} if any(key.startswith("vlora.") for key in there) else {}
        else:
            changed["adapter.weights"] = str(self.adapter)
        changed["output.dir"] = self._free_name()
        settings = " ".join(shlex.quote(f"{key}={recipes.value_text(value)}") for key, value in changed.items())
        command = f"glora-llm train --recipe {shlex.quote(str(self.path / 'recipe.yaml'))} {settings}"
        return f" To train on from what it trained{more}, with a schedule of its own: {command}"

    def _free_name(self) -> str:
        number = 2
        while self.path.with_name(f"{self.path.name}-{number}").exists():
            number += 1
        return str(self.path.with_name(f"{self.path.name}-{number}"))

    def base(self) -> dict[str, Any]:
        """Return base.json: which base the run is trained on, computed in which dtype; nothing where it never began."""
        file = self.path / "base.json"
        if not file.exists():
            return {}
        base = read_object(file, BASE_GONE)
        named = all(isinstance(base.get(key), str) for key in ("name", "fingerprint", "dtype"))
        if not named or not isinstance(base.get("data", {}), dict):
            raise UserError(f"{file} does not say name, fingerprint, dtype and data of the base. {BASE_GONE}")
        return base

    def require_whole(self) -> None:
        """Check that what is there can be gone on with: files are files, folders are folders, and all can be read.

        Raises:
            UserError: naming the first that is wrong; or when the folder holds things, and is no run.
        """
        for name in FOLDERS:
            if (self.path / name).exists() and not (self.path / name).is_dir():
                raise UserError(f"{self.path / name} is a file, and a folder is expected there. Move it away.")
        self.base(), self.summary()
        if not self.path.is_dir():
            return
        if not any((self.path / name).exists() for name in ("recipe.yaml", "checkpoints", "failure.json", AUTO_RATE)):
            others = sorted(path.name for path in self.path.iterdir() if not path.name.startswith("."))
            if others:
                raise UserError(
                    f"output.dir {self.path} is no run folder and is not empty: it holds {', '.join(others[:3])}. "
                    "Choose another, or one below it."
                )
        _require_metrics(self.path / "metrics.jsonl")

    def require_same_base(self, base: dict[str, Any]) -> None:
        """Check that a run goes on with the base that it began with: W0 is part of what is trained.

        Raises:
            UserError: when weights or dtype are others.
        """
        there = self.base()
        if there and there["fingerprint"] != base["fingerprint"]:
            raise UserError(
                f"{self.path} was trained on {there['name']} with fingerprint {there['fingerprint'][:12]}; "
                f"{base['name']} has {base['fingerprint'][:12]}. Put that base back: W0 is part of the result."
            )
        if there and there["dtype"] != base["dtype"]:
            raise UserError(
                f"{self.path} was trained in {there['dtype']}, and this machine would go on in {base['dtype']}. "
                f"Set model.dtype={there['dtype']}."
            )


def _require_metrics(file: Path) -> None:
    """Check that the first lines of metrics.jsonl say their step; the last line may have been cut off by a kill.

    Not all: a run of a million steps has to go on as soon as one of ten. Training skips what is no line of a step.
    """
    if not file.exists():
        return
    try:
        with file.open("rb") as stream:
            lines = stream.read(LOOKED_AT).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}. Move it away: the run goes on with a new one.") from error
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                return
            entry = None
        if not isinstance(entry, dict) or type(entry.get("step")) is not int:
            raise UserError(f"{file}, line {number}: not the metrics of a step: {line[:80]}. Delete the line.")


def _at_commits(recipe: Recipe, model: str | None, data: dict[str, str] | None) -> Recipe:
    """Return a recipe whose model and data sets are fetched from the hub, or from its cache, at these commits."""
    if model:
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": model})})
    if data:
        revisions = data | (recipe.data.revisions or {})
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"revisions": revisions})})
    return recipe


def _binding(recipe: Recipe) -> dict[str, Any]:
    """Return the dotted keys that a run is bound to."""
    return {name: value for name, value in recipes.flat(recipe).items() if not _is_free(*name.partition(".")[::2])}


def _is_free(section: str, key: str) -> bool:
    return section in FREE_SECTIONS or key in FREE_KEYS.get(section, ())
