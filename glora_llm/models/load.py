"""The base model: dense, shared between layers or quantised by bitsandbytes, or as a shape without weights."""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glora_llm.errors import UserError
from glora_llm.models.attention import attention_arguments
from glora_llm.models.config_file import load_config
from glora_llm.models.families import HEADS, Kind, auto_class, body, built_as, head, layers
from glora_llm.models.folder import build, is_ours, share
from glora_llm.models.kernels import apply_liger, uses_liger
from glora_llm.models.sharded_load import Shards, load_divided
from glora_llm.schema import ModelSection

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel


def load_base(
    section: ModelSection, folder: Path, device: "torch.device", shards: Shards | None = None
) -> "PreTrainedModel":
    """Load the weights of `folder` (see `resolve`) frozen, in eval mode, without a cache of keys and values.

    Batch norms keep their running statistics, whatever is trained.

    Args:
        device: where the weights go.
        shards: divides each weight over the processes as it is read (ZeRO 3); None: every process holds all.

    Raises:
        UserError: an attention backend, kernel or quantisation that cannot work here, or weights that do not fit
            the configuration.
    """
    from glora_llm.models.batch_norm import keep_statistics

    config = load_config(folder)
    liger = _uses_liger(section, config, device)
    if is_ours(folder):
        model = _build_ours(section, folder, config, device, shards)
    else:
        model = _load_pretrained(section, folder, config, device, shards)
    _freeze(model)
    keep_statistics(model)
    if section.gradient_checkpointing and model.supports_gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if liger:
        apply_liger(model)
    return model


def compile_layers(model: "PreTrainedModel") -> None:
    """Let torch.compile compile each decoder layer, with the adapters that are in it, when it is called first."""
    for layer in layers(model):
        layer.compile()


def _build_ours(
    section: ModelSection, folder: Path, config: "PretrainedConfig", device: "torch.device", shards: Shards | None
) -> "PreTrainedModel":
    """Return a new model, or one whose layers share weights."""
    import torch

    if section.quantization != "none":
        raise UserError(
            f"model.quantization is {section.quantization}, and {folder} is a VLoRA folder: bases and increments must "
            "be dense. Set model.quantization=none, or merge it into a dense model first."
        )
    if section.compile:
        raise UserError(
            f"model.compile is set, and the layers of {folder} share weights, which are composed anew for each layer: "
            "that is not compiled. Set model.compile=false."
        )
    dtype = compute_dtype(section, device)
    attention = attention_arguments(section, config, device, dtype)
    settings: dict[str, Any] = {"dtype": torch.float32, **attention}
    return build(folder, lambda: auto_class(config).from_config(config, **settings), dtype, device, shards)


def _load_pretrained(
    section: ModelSection, folder: Path, config: "PretrainedConfig", device: "torch.device", shards: Shards | None
) -> "PreTrainedModel":
    dtype = compute_dtype(section, device)
    settings: dict[str, Any] = {
        "dtype": dtype,
        "quantization_config": quantization_config(section, dtype, built_as(config)),
        "device_map": {"": device},
        **attention_arguments(section, config, device, dtype),
    }
    if shards is None:
        model, report = auto_class(config).from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
            **settings,
        )
    else:
        model, report = load_divided(folder, config, shards, settings)
    _check_complete(report, folder)
    keep_quantized_weights(model)
    return model


def meta_model(section: ModelSection, folder: Path) -> "PreTrainedModel":
    """Return the model on the meta device: names and shapes (O, I) as in float, no memory. For dry runs.

    Raises:
        UserError: layers that cannot share weights as vlora.json says.
    """
    import torch

    device = torch.device("meta")
    config = load_config(folder)
    with device:
        model = auto_class(config).from_config(config, dtype=compute_dtype(section, device))
        share(model, folder)
    _freeze(model)
    return model.eval()


def describe_kernels(section: ModelSection, folder: Path, device: "torch.device") -> str:
    """Return dtype, attention and fused kernels that a model would compute with on a device, in words.

    Raises:
        UserError: an attention backend or kernels that this family or device does not have.
    """
    config, dtype = load_config(folder), compute_dtype(section, device)
    attention = attention_arguments(section, config, device, dtype).get("attn_implementation", "transformers' choice")
    liger = _uses_liger(section, config, device)
    words = f"{str(dtype).removeprefix('torch.')} on {device.type}, attention {attention}"
    return f"{words}, Liger kernels" if liger else words


def _uses_liger(section: ModelSection, config: "PretrainedConfig", device: "torch.device") -> bool:
    # torch.compile fuses norms, rotary embedding and SwiGLU itself
    if section.compile or (built_as(config) == "classification" and section.kernels == "auto"):
        return False
    return uses_liger(section.kernels, config.model_type, device)


def compute_dtype(section: ModelSection, device: "torch.device") -> "torch.dtype":
    """Return model.dtype; auto is bfloat16 on a GPU that computes in it, else float32."""
    import torch

    if section.dtype != "auto":
        return getattr(torch, section.dtype)
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


def quantization_config(
    section: ModelSection, dtype: "torch.dtype", kind: "Kind | None" = "text"
) -> "BitsAndBytesConfig | None":
    """Return bitsandbytes' settings. 4-bit blocks are stored in `dtype`, else ZeRO 3 would not shard them.

    The output head, and what is tied to it, is left out by transformers; that of a classifier, which it would
    quantise, is named here; embeddings are no linears.

    Raises:
        UserError: when bitsandbytes is not installed.
    """
    if section.quantization == "none":
        return None
    if find_spec("bitsandbytes") is None:
        raise UserError(f"model.quantization {section.quantization} needs bitsandbytes: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    kept = None if kind == "text" else list(HEADS)
    if section.quantization == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_cast_warning)
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=kept,
        bnb_4bit_quant_type=section.quantization,
        bnb_4bit_use_double_quant=section.double_quantization,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def linear_names(model: "PreTrainedModel") -> list[str]:
    """Return the full names of all linears of the body (dense, 4-bit or 8-bit), without the output head."""
    from glora_llm.models.matrices import is_linear

    decoder = {id(module) for module in body(model).modules()}
    output = head(model)
    return [
        name
        for name, module in model.named_modules()
        if is_linear(module) and id(module) in decoder and module is not output
    ]


def _is_no_cast_warning(record: logging.LogRecord) -> bool:
    """Drop what bitsandbytes says at every int8 layer of every forward pass: that it computes in float16."""
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


def _check_complete(report: dict[str, Any], folder: Path) -> None:
    """Refuse weights that transformers would replace by random ones with no more than a warning.

    Raises:
        UserError: tensors that are missing or of another shape.
    """
    wrong = [str(key) for kind in ("missing_keys", "mismatched_keys") for key in sorted(report.get(kind) or [])]
    if wrong:
        raise UserError(
            f"{len(wrong)} tensors that config.json asks for are missing in {folder} or have another shape, the first: "
            f"{wrong[0]}. The folder does not hold the whole model: download or copy it again."
        )


def keep_quantized_weights(model: Any) -> None:
    """Stop bitsandbytes from changing the frozen weight at the first evaluation on a CPU with AVX512-BF16.

    There Linear4bit repacks its weight for good and rounds the block scales to bfloat16 (0.50: nn/modules.py,
    Linear4bit.forward): the base would no longer be the one that was trained on, and every later backward pass would
    lose the gradient through these layers without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _freeze(model: "PreTrainedModel") -> None:
    """No parameter learns, and no keys and values are kept in training; generate() still keeps them."""
    model.requires_grad_(False)
    model.config.use_cache = False
