"""The attention backend of a model, and attention over packed rows without a (T, T) mask.

A packed row holds several samples, and attention stays inside of each of them: inside of its segment. transformers' own
way is a mask (B, 1, T, T), with which all T x T products are computed. The two backends here compute those of the
segments alone: `varlen`, torch's variable-length flash attention, on a GPU in half precision, and `segments`, one call
of torch's scaled dot product attention a segment, anywhere. The collator says where segments are (`data.batch`).

Letters: B rows, T tokens a row, H heads, K key-value heads, D head size, S segments.
"""

import copy
import inspect
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from glora_llm.errors import UserError
from glora_llm.models.families import auto_class, built_as
from glora_llm.schema import ModelSection

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PretrainedConfig

VARLEN, SEGMENTS, PROBE = "varlen", "segments", "glora_llm_probe"
KERNELS = "kernels-community/"
# attribute of transformers' model classes that says whether the family has a backend; all have eager
FLAGS = {
    "sdpa": "_supports_sdpa",
    "flash_attention_2": "_supports_flash_attn",
    "flex_attention": "_supports_flex_attn",
}
ADVICE = "Set model.attention to auto."
LARGEST_HEAD = 256  # of flash attention


def attention_arguments(
    section: ModelSection, config: "PretrainedConfig", device: "torch.device", dtype: "torch.dtype"
) -> dict[str, str]:
    """Return the argument by which transformers gives a model its attention backend.

    With `auto` a causal language model gets `varlen` on a GPU and `segments` on a CPU where these are possible, and
    else, like any other model, what transformers chooses: sdpa where the family has it. `segments` is a loop over
    numbers that differ from batch to batch, so a layer that is compiled does without.

    Raises:
        UserError: a backend that the family, the device or the dtype does not have.
    """
    wanted: str = section.attention
    if wanted == "auto":
        wanted = VARLEN if device.type == "cuda" else SEGMENTS
        loops = wanted == SEGMENTS and section.compile
        if loops or built_as(config) != "text" or _obstacle(wanted, config, device, dtype):
            return {}
    elif built_as(config) == "classification" and wanted in (VARLEN, SEGMENTS):
        raise UserError(f"model.attention is {wanted}, of packed rows; a head reads one sample a row. {ADVICE}")
    elif reason := _obstacle(wanted, config, device, dtype):
        raise UserError(f"model.attention is {wanted}, {reason}. {ADVICE}")
    return {"attn_implementation": wanted}


def packed_arguments(backend: str, offsets: "Tensor", lengths: tuple[int, ...]) -> dict[str, Any]:
    """Return how a decoder is told the segments of its rows, beside `position_ids` that start again at 0.

    Args:
        backend: the model's attention.
        offsets: (S + 1) int32 on the model's device, where segments begin in the B * T tokens.
        lengths: of the segments.

    Returns:
        arguments of the decoder, which hands them to its attention; nothing where transformers finds the segments by
        the positions (which reads one value back from the device a forward pass).
    """
    flash = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
    flash |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}  # type: ignore[dict-item]
    if backend.startswith((KERNELS, "flash_attention")):
        return flash
    if backend not in (VARLEN, SEGMENTS):
        return {}
    # A mask of four dimensions is handed on as it is: none is made, and these backends do not look at it.
    no_mask = offsets.new_ones(1, 1, 1, 1).bool()
    return (flash if backend == VARLEN else {"segment_lengths": lengths}) | {"attention_mask": no_mask}


def fetch_kernel(name: str, download: bool = True) -> None:
    """Download an attention kernel of the hub, if `name` (model.attention) is one, and register it by this name.

    Args:
        download: False checks that it could be.

    Raises:
        UserError: when the package `kernels` is not installed, or the kernel cannot be had.
    """
    if not name.startswith(KERNELS):
        return
    if find_spec("kernels") is None:
        raise UserError(f"model.attention is {name}, which needs the package kernels: pip install kernels. {ADVICE}")
    if not download:
        return
    from transformers.integrations.hub_kernels import load_and_register_attn_kernel

    try:
        load_and_register_attn_kernel(name)
    except (ValueError, ImportError, OSError) as error:
        raise UserError(f"model.attention is {name}, which cannot be loaded from the hub: {error} {ADVICE}") from error


def _obstacle(backend: str, config: "PretrainedConfig", device: "torch.device", dtype: "torch.dtype") -> str:
    """Return why a model cannot have a backend, as the end of a sentence; empty when it can."""
    import torch

    family = auto_class(config)._model_mapping[type(config)]
    flag = FLAGS.get("flash_attention_2" if backend.startswith(KERNELS) else backend)
    if flag and not getattr(family, flag, False):
        return f"which {family.__name__} does not have"
    if backend == SEGMENTS:
        return _segment_obstacle(family, config)
    if backend == VARLEN or backend.startswith((KERNELS, "flash_attention")):
        if device.type != "cuda":
            return f"which needs a GPU; this is the {device}"
        if dtype == torch.float32:
            return "which computes in bfloat16 or float16, not in float32: set model.dtype"
    if backend == "flex_attention" and device.type == "cpu":
        return "which has no backward pass on a CPU"
    if backend == "flash_attention_2" and find_spec("flash_attn") is None:
        return "but flash-attn is not installed"
    if backend == VARLEN:
        return _varlen_obstacle(device) or _segment_obstacle(family, config, flash=True)
    return ""


def _varlen_obstacle(device: "torch.device") -> str:
    """Return why this torch or this GPU has no variable-length attention."""
    import torch

    if find_spec("torch.nn.attention.varlen") is None:
        return f"which torch {torch.__version__} does not have"
    capability = torch.cuda.get_device_capability(device)
    return "" if capability >= (8, 0) else f"which needs compute capability 8.0; this GPU has {capability}"


class _Call(NamedTuple):
    """One layer's call of the attention function."""

    module: Any
    shapes: tuple[Any, Any, Any]  # of query, key, value
    mask: Any
    arguments: dict[str, Any]


def _segment_obstacle(family: Any, config: "PretrainedConfig", flash: bool = False) -> str:
    """Return why attention by segments would not be what a family computes; empty when it would.

    A model of the family is built without weights and run once on tokens without values. Its layers must hand their
    arguments through to the attention function and ask for nothing but causal attention, whole or in a window.
    """
    calls = _calls_of(family, config)
    text = config.get_text_config(decoder=True)
    if calls is None or len(calls) != text.num_hidden_layers:
        return f"and a {config.model_type} model does not tell its attention where segments are"
    kinds = getattr(text, "layer_types", None)
    for call in calls:
        kind = kinds[call.module.layer_idx] if kinds else "full_attention"
        window = getattr(text, "sliding_window", None) if kind == "sliding_attention" or not kinds else None
        given = call.arguments
        others = any(given.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
        causal = call.module.is_causal and given.get("is_causal") is not False
        plain = kind in ("full_attention", "sliding_attention") and given.get("sliding_window") == window
        if others or given.get("dropout") or not (causal and plain and call.mask.shape == (1, 1, 1, 1)):
            return f"and the attention of a {config.model_type} model is more than causal attention"
        query, key, value = (shape[-1] for shape in call.shapes)
        if flash and not (query == key == value <= LARGEST_HEAD and query % 8 == 0):
            return f"which has no heads of size {query}"
    return ""


def _calls_of(family: Any, config: "PretrainedConfig") -> list[_Call] | None:
    """Return the calls of the attention function in one forward pass in training mode; None: it cannot be had."""
    import torch

    register()
    if not (family._supports_attention_backend and family._supports_sdpa):
        return None
    bare = copy.deepcopy(config)
    bare._attn_implementation = PROBE
    calls: list[_Call] = []
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    told = packed_arguments(SEGMENTS, torch.zeros(3, dtype=torch.int32, device="meta"), (1, 1))
    try:
        with torch.device("meta"), torch.no_grad():
            decoder = family(bare).get_decoder().train()
            decoder(input_ids=ids, position_ids=ids, use_cache=False, probe=calls, **told)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):  # a family that is not made like this
        return None
    return calls


def register() -> None:
    """Make the backends of this module known to transformers; without segments they are its sdpa."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name, function in ((VARLEN, _varlen), (SEGMENTS, _segments), (PROBE, _probe)):
        ALL_ATTENTION_FUNCTIONS.register(name, function)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, sdpa_mask)


def _probe(
    module: "nn.Module", query: "Tensor", key: "Tensor", value: "Tensor", mask: Any, *, probe: list[_Call], **given: Any
) -> tuple["Tensor", None]:
    probe.append(_Call(module, (query.shape, key.shape, value.shape), mask, given))
    rows, heads, tokens, _ = query.shape
    return query.new_empty(rows, tokens, heads, value.shape[-1]), None


def _segments(
    module: "nn.Module",
    query: "Tensor",
    key: "Tensor",
    value: "Tensor",
    mask: "Tensor | None",
    segment_lengths: tuple[int, ...] | None = None,
    **others: Any,
) -> tuple["Tensor", None]:
    """Compute query (B, H, T, D) on key and value (B, K, T, D) segment by segment; return (B, T, H, D)."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    if segment_lengths is None:
        return _sdpa(module, query, key, value, mask, **others)
    rows, _, tokens, _ = query.shape
    more: dict[str, Any] = {"scale": others.get("scaling"), "enable_gqa": query.shape[1] != key.shape[1]}
    window = others.get("sliding_window") or tokens
    if len(set(segment_lengths)) == 1:  # all in one call
        parts = [tuple(_as_rows(states, len(segment_lengths)) for states in (query, key, value))]
    else:
        parts = list(zip(*(_as_rows(s, 1).split(segment_lengths, dim=2) for s in (query, key, value)), strict=True))
    outputs = []
    for q, k, v in parts:
        band = _band(q.shape[2], window, q) if window < q.shape[2] else None
        output = scaled_dot_product_attention(q, k, v, attn_mask=band, is_causal=band is None, **more)
        outputs.append(output.transpose(1, 2))
    return torch.cat([output.reshape(-1, *output.shape[2:]) for output in outputs]).unflatten(0, (rows, tokens)), None


def _as_rows(states: "Tensor", rows: int) -> "Tensor":
    """Cut the tokens of states (B, H, T, D), row after row, into so many rows of equal length."""
    if states.shape[0] == rows:
        return states
    flat = states.transpose(1, 2).flatten(0, 1)
    return flat.unflatten(0, (rows, -1)).transpose(1, 2)


def _band(tokens: int, window: int, like: "Tensor") -> "Tensor":
    """Return (T, T) bool, True where a token sees another: itself and the `window - 1` before it."""
    places = like.new_ones(tokens, tokens).bool()
    return places.tril() & places.triu(1 - window)


def _varlen(
    module: "nn.Module",
    query: "Tensor",
    key: "Tensor",
    value: "Tensor",
    mask: "Tensor | None",
    cu_seq_lens_q: "Tensor | None" = None,
    max_length_q: int = 0,
    **others: Any,
) -> tuple["Tensor", None]:
    """Compute query (B, H, T, D) on key and value (B, K, T, D) by flash attention; return (B, T, H, D)."""
    if cu_seq_lens_q is None:
        return _sdpa(module, query, key, value, mask, **others)
    from torch.nn.attention import varlen

    rows, heads, tokens, _ = query.shape
    before = (others.get("sliding_window") or 0) - 1  # tokens that a token sees before itself; -1: all
    more: dict[str, Any] = {"scale": others.get("scaling"), "window_size": (before, 0)}
    if heads != key.shape[1]:
        if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters:
            more["enable_gqa"] = True
        else:  # torch 2.11
            key, value = (states.repeat_interleave(heads // key.shape[1], dim=1) for states in (key, value))
    q, k, v = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    output = varlen.varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, **more)
    return output.unflatten(0, (rows, tokens)), None  # type: ignore[union-attr]


def _sdpa(*states: Any, **others: Any) -> tuple["Tensor", None]:
    """Use transformers' own sdpa: the caller has named no segments (generation, a plain call of the model)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(*states, **others)
