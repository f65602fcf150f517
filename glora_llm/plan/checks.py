"""Reject combinations of settings that cannot work, naming both settings and the change to make."""

import torch
from torch import nn

from glora_llm.adapters.auto_rate import check_rate
from glora_llm.adapters.methods import METHODS, check_kind, check_loraplus, check_quantised
from glora_llm.errors import UserError, nearest
from glora_llm.glora.path import Genome
from glora_llm.models.matrices import CONVOLUTIONS, LINEARS, matrix_shape
from glora_llm.plan.answers import check_generate
from glora_llm.plan.search_checks import check_search
from glora_llm.schema import AdapterSection, Recipe, SlotSetting, SupernetSection
from glora_llm.search.budget import read_budget, structure_choices
from glora_llm.tasks.task import COLUMNS, Task
from glora_llm.training.best import watched_score
from glora_llm.training.deepspeed_config import DeepSpeedConfig

RANKED_METHODS = (
    "glora",
    "lora",
    "rslora",
    "dora",
    "adalora",
    "hira",
    "lora_dropout",
    "lors",
    "periodic_lora",
    "repadapter",
)  # adapter.rank is r of a product of two factors
COMPILED_METHODS = ("glora", "lora", "rslora", "full")  # their layers trace without a graph break


def check_combination(recipe: Recipe, stage: int) -> None:
    """Check settings that exclude each other.

    Args:
        stage: of ZeRO.

    Raises:
        UserError: naming both, and what to change.
    """
    _check_origin(recipe)
    check_loraplus(recipe.adapter, recipe.training.loraplus_ratio)
    if recipe.adapter.budget is not None:
        read_budget(recipe.adapter.budget)
        structure_choices(recipe.adapter)
    if recipe.training.lr == "auto":
        check_rate(recipe.adapter)
    check_task(recipe)
    check_generate(recipe)
    if stage == 3 and recipe.model.quantization == "int8":
        raise UserError(
            f"model.quantization int8 and training.deepspeed {recipe.training.deepspeed} (ZeRO 3) do not fit: "
            "DeepSpeed cannot shard int8 weights. Use nf4, or ZeRO 2."
        )
    if recipe.training.optimizer == "muon" and not recipe.adapter.is_full:
        raise UserError(
            f"training.optimizer muon steps the matrices of a model that is trained as a whole, and adapter.method is "
            f"{recipe.adapter.method}: its rates are AdamW's. Use training.optimizer=adamw, or adapter.method=full."
        )
    if recipe.model.compile:
        _check_compile(recipe, stage)
    if recipe.search is not None:
        check_search(recipe)
    elif recipe.merge.after_training and recipe.adapter.is_supernet:
        raise UserError(
            "merge.after_training merges the genome that a search chose, and this recipe trains a supernet without "
            "searching it: give it a `search` section (search={} has all defaults), or set merge.after_training=false."
        )
    if recipe.evaluation.test_before and recipe.data.test is None:
        raise UserError("evaluation.test_before needs test rows: set data.test.")
    if recipe.evaluation.every and recipe.data.validation is None:
        raise UserError("evaluation.every needs validation rows: set data.validation.")
    _check_best(recipe)


def _check_best(recipe: Recipe) -> None:
    """Check that there are validations to choose by, and one model that they are of."""
    section = recipe.evaluation
    keys = {"evaluation.keep_best": section.keep_best, "evaluation.patience": section.patience}
    given = next((f"{key}={str(value).lower()}" for key, value in keys.items() if value), None)
    if given is None:
        return
    if section.every is None:
        raise UserError(
            f"{given} compares validations during training, and evaluation.every is not set: there is one at the end "
            "alone. Set evaluation.every to the steps between two."
        )
    if recipe.adapter.is_supernet:
        raise UserError(
            f"{given} goes by the validations of one model, and adapter.paths=sample trains a supernet, of which only "
            "the largest path is validated; the search chooses what is deployed. Take it away."
        )


def check_watched_score(recipe: Recipe, task: Task) -> None:
    """Check that the task reports the score that keep_best and patience go by.

    Raises:
        UserError: naming those that it reports.
    """
    if not recipe.evaluation.keep_best and recipe.evaluation.patience is None:
        return
    rows = torch.ones(2, len(COLUMNS), dtype=torch.float64)  # two rows of made-up scores, for the names alone
    rows[0, 5:7] = 0
    known = [name.partition("/")[2] for name in task.means(rows, "validation")]
    wanted = watched_score(recipe.evaluation)
    if wanted not in known:
        raise UserError(
            f"evaluation.keep_best is {wanted}, which this task does not report.{nearest(wanted, known)} It reports: "
            f"{', '.join(known)}."
        )


def check_task(recipe: Recipe) -> None:
    """Check that data.format has what the task learns, and what a head cannot do.

    Raises:
        UserError: naming both settings.
    """
    task, form, head = recipe.task, recipe.data.format, recipe.head
    fits = {"classification": ("classification", "images"), "regression": ("regression",)}
    if task in fits and form not in fits[task]:
        raise UserError(
            f"task {task} learns the column `label` of data.format {' or '.join(fits[task])}, and data.format is "
            f"{form}: set data.format, or task=auto."
        )
    if task == "language_modeling" and form in ("regression", "images"):
        raise UserError(f"task language_modeling learns text, and data.format is {form}: set task=auto.")
    if head is None:
        return
    what = f"a head ({head})"
    if recipe.data.packing:
        raise UserError(f"{what} reads one sample a row, and data.packing puts several into one: data.packing=false.")
    if recipe.evaluation.generate is not None:
        raise UserError(f"{what} writes no text, which evaluation.generate scores: evaluation.generate=null.")
    if recipe.data.chat_template == "tokenizer":
        raise UserError(f"{what} answers a prompt, not a conversation: data.chat_template=auto, and write data.prompt.")
    if (
        recipe.search
        and recipe.search.metric != "loss"
        and (head, recipe.search.metric) != ("classification", "exact_match")
    ):
        raise UserError(
            f"search.metric {recipe.search.metric} is of label words; of {what} it is loss, or exact_match where "
            "classes are learnt (their accuracy)."
        )


def _check_compile(recipe: Recipe, stage: int) -> None:
    """Check that torch.compile can trace a decoder layer once for the whole run."""
    method, deepspeed = recipe.adapter.method, recipe.training.deepspeed
    if stage == 3:
        obstacle = f"training.deepspeed {deepspeed} (ZeRO 3) gathers weights by hooks inside every layer. Use zero2"
    elif recipe.adapter.is_supernet:
        obstacle = "adapter.paths=sample draws another path at every micro step, each a graph of its own"
    elif method not in COMPILED_METHODS:
        obstacle = f"adapter.method {method} is not among those that are compiled: {', '.join(COMPILED_METHODS)}"
    elif recipe.vlora is not None:
        obstacle = "layers that share weights (section vlora) are not compiled"
    elif recipe.model.kernels == "liger":
        obstacle = "model.kernels is liger, and its kernels are not traced. Set model.kernels=auto"
    else:
        return
    raise UserError(f"model.compile is set, and {obstacle}; or set model.compile=false.")


def _check_origin(recipe: Recipe) -> None:
    """Check that model, adapter and vlora agree on what is trained."""
    model, method = recipe.model, recipe.adapter.method
    if model.config is not None and not recipe.adapter.is_full:
        raise UserError(
            f"model.config makes a model of random weights, and adapter.method {method} would leave them frozen. Set "
            "adapter.method=full; an adapter goes on the trained model: model.name_or_path=RUN/model."
        )
    if recipe.vlora is not None and not recipe.adapter.is_full:
        raise UserError(
            f"The section vlora shares the weights of a model that is trained as a whole, and adapter.method is "
            f"{method}. Set adapter.method=full, or take the section away (vlora=null)."
        )
    if recipe.vlora is not None and model.config is None:
        raise UserError(
            f"The section vlora is for a new model (model.config). To make {model.name_or_path} into VLoRA: "
            f"model.from_dense.budget=0.5 vlora=null; or glora-llm vlora from-dense {model.name_or_path} --rank R "
            "--out DIR, then model.name_or_path=DIR vlora=null."
        )
    if recipe.adapter.is_full and model.quantization != "none":
        raise UserError(
            f"adapter.method full trains the weights, which model.quantization {model.quantization} freezes. Set "
            "model.quantization=none."
        )
    if recipe.adapter.method in METHODS:  # else another check names it
        check_quantised(recipe.adapter, model.quantization)
        images = recipe.data.format == "images"
        check_kind(recipe.adapter, "classification" if recipe.head else "images" if images else "text")


def check_ranks(recipe: Recipe, model: nn.Module, genome: Genome | None) -> None:
    """Check that no rank is above the smaller side of every layer of a model: all of them could hold any matrix.

    Raises:
        UserError: naming the rank and the largest one that a layer can use.
    """
    kinds = LINEARS + CONVOLUTIONS
    sides = [min(matrix_shape(module)) for module in model.modules() if isinstance(module, kinds)]
    wanted, most = _largest_rank(recipe.adapter, genome), max(sides, default=0)
    if sides and wanted > most:
        raise UserError(
            f"A rank of {wanted} is above the smaller side of every linear of this model, at most {most}: more than "
            "that changes nothing. Lower it (adapter.rank, the rank of a slot, of the supernet or of the genome)."
        )


def _largest_rank(section: AdapterSection, genome: Genome | None) -> int:
    if section.method not in RANKED_METHODS:
        return 0
    if section.method == "lors":
        return max(section.rank, (section.peft or {}).get("shared_rank", 0))
    if genome is not None:
        return max((spec.rank for path in genome.values() for _, spec in path.active()), default=0)
    if section.is_supernet:
        return max((section.supernet or SupernetSection()).ranks)
    slots = [section.slots or {}, *(section.paths.values() if isinstance(section.paths, dict) else ())]
    own = [given.rank or 0 for chosen in slots for given in chosen.values() if isinstance(given, SlotSetting)]
    modes = [given for chosen in slots for given in chosen.values() if not isinstance(given, SlotSetting)]
    uses_rank = section.method != "glora" or section.slots is None or "lora" in modes
    return max([section.rank if uses_rank else 0, *own])


def check_float16(deepspeed: DeepSpeedConfig, dtype: torch.dtype) -> None:
    """Check that the device computes in float16 where that is asked for, and that the ZeRO stage scales the loss."""
    from deepspeed.accelerator import get_accelerator

    if dtype != torch.float16 and not deepspeed.values["fp16"]["enabled"]:
        return
    asked = "model.dtype is float16" if dtype == torch.float16 else f"'{deepspeed.name}' sets fp16.enabled to true"
    if not get_accelerator().is_fp16_supported():
        raise UserError(
            f"{asked}, and this {get_accelerator().device_name()} does not compute in it. Use "
            "model.dtype=bfloat16 or float32."
        )
    if deepspeed.stage == 0:
        raise UserError(
            f"{asked}, and training.deepspeed {deepspeed.name} (ZeRO 0) does not scale the loss: small "
            "gradients would become zero. Use training.deepspeed=zero1, or model.dtype=float32."
        )


def check_offload(recipe: Recipe, deepspeed: DeepSpeedConfig) -> None:
    """Check that the optimizer runs where its states are kept.

    Raises:
        UserError: for Muon's with offload.
    """
    if recipe.training.optimizer == "muon" and deepspeed.offloads:
        raise UserError(
            f"training.optimizer muon orthogonalises whole matrices, and training.deepspeed {deepspeed.name} keeps the "
            "optimizer's states on the CPU, where that takes longer than a step. Use zero2 or zero3, or adamw."
        )


def check_masters(recipe: Recipe, dtype: torch.dtype, stage: int) -> None:
    """Check that weights of the model itself that are trained have float32 masters: ZeRO 0 keeps none.

    An adapter's own weights are float32 there; a whole model, and a head or another of adapter.modules_to_save, is not.

    Raises:
        UserError: when they are trained in another dtype.
    """
    adapter, what = recipe.adapter, ""
    if adapter.is_full:
        what = "adapter.method full"
    elif adapter.modules_to_save:
        what = "adapter.modules_to_save"
    elif adapter.modules_to_save is None and (recipe.head or recipe.data.format == "images"):
        what = "a head"
    if what and dtype != torch.float32 and stage == 0:
        short = str(dtype).removeprefix("torch.")
        raise UserError(
            f"{what} in {short} needs float32 masters, which training.deepspeed "
            f"{recipe.training.deepspeed} (ZeRO 0) does not keep: steps would be lost to rounding. Use zero1, or "
            "model.dtype=float32."
        )
