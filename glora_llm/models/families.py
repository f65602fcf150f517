"""The kind of a model_type, the class of transformers that loads it, and its parts."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from glora_llm.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

Kind = Literal["text", "images", "classification"]
KINDS = {"text": "causal language model", "images": "image classifier", "classification": "sequence classifier"}
HEADS = ("score", "classifier", "pre_classifier")  # names that heads of classifiers have


def class_names(kind: Kind, model_type: str) -> set[str]:
    """Return the classes of transformers that make a model_type into this kind of model; empty: there is none."""
    from transformers.models.auto import modeling_auto

    tables = {
        "text": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "images": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        "classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    }
    known = tables[kind].get(model_type, ())
    return {known} if isinstance(known, str) else set(known)


def looks_both_ways(settings: Mapping[str, Any]) -> bool:
    """Tell whether a configuration is of an encoder, whose language model is causal with `is_decoder` alone."""
    from transformers.models.auto import modeling_auto

    is_encoder = settings.get("model_type") in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return is_encoder and not settings.get("is_decoder") and not settings.get("is_encoder_decoder")


def kind_of(model_type: str) -> Kind | None:
    """Return the kind of a model_type, a causal language model or an image classifier; None: neither."""
    kinds: tuple[Kind, ...] = ("text", "images")
    return next((kind for kind in kinds if class_names(kind, model_type)), None)


def built_as(config: "PretrainedConfig") -> Kind | None:
    """Return the kind of a model by its configuration: a family of language models may have got a head for classes."""
    if set(config.architectures or ()) & class_names("classification", config.model_type):
        return "classification"
    return kind_of(config.model_type)


def auto_class(config: "PretrainedConfig") -> Any:
    """Return the Auto class of transformers that makes and loads models of this configuration."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForSequenceClassification,
    )

    classes = {"images": AutoModelForImageClassification, "classification": AutoModelForSequenceClassification}
    return classes.get(built_as(config) or "text", AutoModelForCausalLM)


def model_class(config: "PretrainedConfig") -> Any:
    """Return the class of transformers that `auto_class` would choose for a model of this configuration."""
    from transformers.models.auto.auto_factory import _get_model_class

    return _get_model_class(config, auto_class(config)._model_mapping)


def body(model: "PreTrainedModel") -> Any:
    """Return the model without its head."""
    return model.get_decoder() if built_as(model.config) == "text" else model.base_model


def head(model: "PreTrainedModel") -> Any:
    """Return the linear that gives the logits."""
    found = model.get_output_embeddings()
    return getattr(model, head_names(model)[0]) if found is None else found


def head_names(model: "nn.Module") -> list[str]:
    """Return the names of the modules that make a classifier of its body."""
    return [name for name in HEADS if hasattr(model, name)]


def layers(model: "PreTrainedModel") -> "nn.ModuleList":
    """Return the model's like layers, in order.

    Raises:
        UserError: when no list of the body has config.num_hidden_layers modules.
    """
    from torch import nn

    wanted = model.config.get_text_config(decoder=True).num_hidden_layers
    for module in body(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return module
    raise UserError(f"A {model.config.model_type} model has no list of {wanted} like layers here.")
