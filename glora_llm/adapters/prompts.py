"""Prompt methods of PEFT for language models: learnt vectors before every sample, the model itself unchanged.

prompt_tuning (arXiv 2104.08691): P vectors before the embedded tokens. p_tuning (2103.10385): the same, given by an MLP
or LSTM. prefix_tuning (2101.00190): P keys and values before those of every attention, given by an MLP of P vectors.
p_tuning_v2 (2110.07602): these keys and values are learnt themselves.

PEFT inserts the prompt in the forward pass of its own wrapper, before each row; here a row may hold several samples,
and losses, scores and generation call the transformers model inside. So the prompt is inserted in the decoder's
forward pass: each sample becomes a row with the prompt before it, and its hidden states are put back to where its
tokens stood. All callers see a decoder that knows the prompt.

Letters: B rows, T tokens a row, S samples of all rows, P tokens of the prompt, H hidden, K key-value heads, D size of a
head.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from glora_llm.adapters.prompt_arguments import PREFIXES
from glora_llm.errors import UserError
from glora_llm.models.families import body, built_as, looks_both_ways

PACKED = ("segment_lengths", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@contextmanager
def accept_prompt(base: nn.Module, method: str) -> Iterator[None]:
    """Let PEFT put a prompt on a model: it refuses prefixes beside gradient checkpointing, which works here.

    Raises:
        UserError: for a model that no prompt is put on.
    """
    config: Any = base.config
    if built_as(config) == "images":
        raise UserError(
            f"adapter.method {method} puts a prompt before the tokens of a text, and a {config.model_type} model reads "
            "images: adapter.method=vpt is the prompt of images."
        )
    if built_as(config) == "classification" and looks_both_ways(config.to_dict()):
        raise UserError(
            f"adapter.method {method} puts a prompt before the first token, from which the head of an encoder "
            f"({config.model_type}) reads the class. Take a causal language model, or another method "
            "(`glora-llm methods`)."
        )
    if method in PREFIXES and config.model_type in TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING:
        raise UserError(
            f"adapter.method {method}: PEFT gives the prefix of a {config.model_type} model in a form that "
            "transformers no longer reads. Take adapter.method=prompt_tuning or p_tuning."
        )
    checkpointed = [module for module in base.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in checkpointed:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True  # type: ignore[assignment]


def install_prompt(model: Any) -> None:
    """Let the decoder inside a PeftModel insert the model's prompt; the PeftModel then calls it as it is.

    The encoder of the prompt becomes a part of the decoder too, so that whoever holds the bare model holds it.
    """
    base = model.get_base_model()
    decoder = body(base)
    decoder.forward = PromptedDecoder(model, decoder)
    decoder.add_module("prompt_encoder", model.prompt_encoder)
    # PyTorch names a shared module by the first place that it is found in: PEFT's name, under which it is saved.
    model._modules["base_model"] = model._modules.pop("base_model")
    model.forward = base.forward
    model.disable_adapter = decoder.forward.disabled
    if decoder.forward.is_prefix:
        _checkpoint_with_prefix(base)


def _checkpoint_with_prefix(base: nn.Module) -> None:
    """Keep the prefix where gradient checkpointing drops a cache, which the recomputation would fill a second time.

    A prefix is only read (see `_PrefixLayer`). Layers are checkpointed by themselves: where the model around them says
    that it is checkpointed (GPT-2), it gives them no cache.
    """
    for module in base.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module._can_checkpoint_with_cache = True
        elif getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False  # type: ignore[assignment]


class PromptedDecoder:
    """The forward pass of a decoder with the learnt prompt before every sample.

    Args:
        model: PEFT's model, which gives the prompt.
        decoder: of the transformers model inside.
    """

    def __init__(self, model: Any, decoder: Any):
        self.model, self.plain, self.embed = model, decoder.forward, decoder.get_input_embeddings()
        config = model.active_peft_config
        self.length = int(config.num_virtual_tokens)
        self.is_prefix = config.peft_type == "PREFIX_TUNING"
        self.is_active = True
        functools.update_wrapper(self, self.plain)

    def __call__(self, input_ids: Tensor | None = None, **given: Any) -> Any:
        """Return what the decoder gives for tokens (B, T), its last hidden states (B, T, H) of these tokens alone.

        Rows without a padding mask whose positions start at 0 several times hold several samples.
        """
        if not self.is_active:
            return self.plain(input_ids, **given)
        cache, mask = given.get("past_key_values"), given.get("attention_mask")
        if cache is not None and cache.get_seq_length():
            return self.plain(input_ids, **self._behind(given))
        no_padding = mask is None or mask.dim() == 4
        if cache is None and not given.get("use_cache") and no_padding and given.get("position_ids") is not None:
            return self._samples(input_ids, **given)
        return self._rows(input_ids, **given)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Leave the prompt out."""
        self.is_active = False
        try:
            yield
        finally:
            self.is_active = True

    def _samples(self, input_ids: Tensor | None, position_ids: Tensor, **given: Any) -> Any:
        """Compute packed rows (B, T): each sample in a row of its own, as wide as the longest one."""
        embedded = given.pop("inputs_embeds", None)
        like: Any = input_ids if embedded is None else embedded
        rows, width = like.shape[:2]
        lengths = given.get("segment_lengths") or _lengths(position_ids.expand(rows, -1))
        given = {name: value for name, value in given.items() if name not in (*PACKED, "attention_mask")}
        if all(length == width for length in lengths):
            return self._rows(input_ids, inputs_embeds=embedded, **given)
        apart, back = (places.to(position_ids.device) for places in _places(lengths))
        samples = like.flatten(0, 1)[apart]
        tokens = {"input_ids": samples, "inputs_embeds": None} if embedded is None else {"inputs_embeds": samples}
        found = self._rows(**({"input_ids": None} | tokens), **given)
        states = found.last_hidden_state.flatten(0, 1).index_select(0, back)
        found.last_hidden_state = states.unflatten(0, (rows, width))
        return found

    def _rows(self, input_ids: Tensor | None, **given: Any) -> Any:
        """Compute rows (B, T) of one sample each, padded on either side."""
        embedded = given.pop("inputs_embeds", None)
        like: Any = input_ids if embedded is None else embedded
        rows, width = like.shape[:2]
        given = self._behind(given)
        if self.is_prefix:
            cache = self._prefix(given.pop("past_key_values", None), bool(given.get("use_cache")), rows)
            found = self.plain(input_ids, inputs_embeds=embedded, past_key_values=cache, **given)
            _require_read(cache, self.model.config.model_type)
            return found
        embedded = self.embed(input_ids) if embedded is None else embedded
        prompt = self.model.get_prompt(batch_size=1).to(embedded.dtype).expand(rows, -1, -1)
        if given.get("position_ids") is not None:
            first = torch.arange(self.length, device=embedded.device).expand(rows, -1)
            given["position_ids"] = torch.cat([first, given["position_ids"].expand(rows, -1)], dim=1)
        found = self.plain(None, inputs_embeds=torch.cat([prompt, embedded], dim=1), **given)
        found.last_hidden_state = found.last_hidden_state[:, -width:]
        return found

    def _behind(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return arguments with the padding mask (B, P + T) and positions (B, T) of tokens behind the prompt."""
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if mask is not None:
            given = given | {"attention_mask": torch.cat([mask.new_ones(mask.shape[0], self.length), mask], dim=1)}
        if positions is not None:
            given = given | {"position_ids": positions + self.length}
        return given

    def _prefix(self, cache: Any, is_kept: bool, rows: int) -> Any:
        """Return the keys and values of the prefix: in the cache of a caller that goes on with it, or to read alone."""
        if cache is None and not is_kept:
            prefix = self.model.get_prompt(batch_size=1)
            cache = DynamicCache()
            cache.layers = [_PrefixLayer(layer.keys, layer.values) for layer in prefix.layers]
            return cache
        cache = DynamicCache() if cache is None else cache
        cache.layers = self.model.get_prompt(batch_size=rows).layers
        return cache


class _PrefixLayer(DynamicLayer):
    """Keys and values of a prefix, (1, K, P, D) each, put before those of a batch.

    Nothing is added to it, so a layer that is computed again in the backward pass reads the same.
    """

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self.is_read = False

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return the keys and values (B, K, P + T, D) of a batch of keys and values (B, K, T, D)."""
        self.is_read = True
        rows, heads, size = key_states.shape[0], key_states.shape[1], key_states.shape[3]
        made, made_size = self.keys.shape[1], self.keys.shape[3]
        if (heads, size) != (made, made_size):
            raise UserError(
                f"The attention has {heads} key-value heads of size {size}, and PEFT makes a prefix for {made} of size "
                f"{made_size}: set adapter.peft.num_attention_heads={heads} and adapter.peft.token_dim={heads * size}."
            )
        keys, values = (part.to(key_states.dtype).expand(rows, -1, -1, -1) for part in (self.keys, self.values))
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


def _require_read(cache: Any, model_type: str) -> None:
    """Check that the attention of every layer took the prefix: families without a cache of keys pass it over."""
    if any(isinstance(layer, _PrefixLayer) and not layer.is_read for layer in cache.layers):
        raise UserError(
            f"A {model_type} model has layers that read no keys and values before those of its tokens, so no prefix "
            "can be put there. Take adapter.method=prompt_tuning."
        )


def check_prefix(model: Any) -> None:
    """Check that a prefix fits the attention of a model without weights, on two tokens without values.

    Raises:
        UserError: for layers that read no prefix, or one for other heads.
    """
    if model.active_peft_config.peft_type != "PREFIX_TUNING":
        return
    tokens = torch.zeros(1, 2, dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            body(model.get_base_model())(input_ids=tokens, use_cache=False)
    except (NotImplementedError, RuntimeError, TypeError, ValueError):  # a family that computes nothing like this
        return


def _lengths(position_ids: Tensor) -> list[int]:
    """Return the lengths of the samples in rows whose positions (B, T) start again at 0; reads the device."""
    starts = (position_ids.flatten() == 0).nonzero()[:, 0].tolist()
    return [stop - start for start, stop in pairwise([*starts, position_ids.numel()])]


def _places(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return which of the B * T tokens each place of the rows (S, longest) holds, and of each token its place there.

    Places behind a sample's end repeat its last token: causal attention hides them from all that is read.
    """
    longest = max(lengths)
    starts = torch.tensor([0, *accumulate(lengths[:-1])])[:, None]
    sizes = torch.tensor(lengths)[:, None]
    columns = torch.arange(longest)[None]
    apart = starts + torch.minimum(columns, sizes - 1)
    back = torch.arange(len(lengths) * longest).view(len(lengths), longest)[columns < sizes]
    return apart, back
