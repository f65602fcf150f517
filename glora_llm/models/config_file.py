"""config.json of a model folder, checked before transformers builds anything of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from glora_llm.errors import UserError, nearest
from glora_llm.files.json_file import read_object

if TYPE_CHECKING:
    from transformers import PretrainedConfig

AGAIN = "Download or copy the model again."
SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings", "n_embd", "n_layer", "n_head", "n_positions"),
)
LARGEST = 100_000_000  # of any size


def read_settings(file: Path) -> dict[str, Any]:
    """Return config.json as plain values.

    Raises:
        UserError: when it is no JSON object, or a size or a name in it is impossible.
    """
    settings = read_object(file, AGAIN)
    for part in (settings, settings.get("text_config")):
        if isinstance(part, dict):
            _require_sizes(part, file)
    kinds = {
        "model_type": (str, "a text"),
        "architectures": (list, "a list"),
        "quantization_config": (dict, "an object"),
    }
    for key, (kind, expected) in kinds.items():
        value = settings.get(key)
        if value is not None and not isinstance(value, kind):
            raise UserError(f"{file}: {key} is {str(value)[:80]!r}; expected {expected}. {AGAIN}")
    return settings


def _require_sizes(settings: dict[str, Any], file: Path) -> None:
    for key in SIZES:
        value = settings.get(key)
        if value is None or isinstance(value, list):  # one for each layer
            continue
        if type(value) is not int or not 0 < value <= LARGEST:
            raise UserError(
                f"{file}: {key} is {str(value)[:80]!r}; expected a whole number from 1 to {LARGEST}. {AGAIN}"
            )
    heads, groups = settings.get("num_attention_heads"), settings.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise UserError(f"{file}: {heads} attention heads are no multiple of {groups} key-value heads. {AGAIN}")


def load_config(folder: Path) -> "PretrainedConfig":
    """Return transformers' configuration of a model folder; code that comes with it is never run.

    Raises:
        UserError: when transformers does not take it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.activations import ACT2FN

    file = folder / "config.json"
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, OSError, StrictDataclassError) as error:
        why = " ".join(str(error).split())[:300]
        if "trust_remote_code" in str(error):
            why = "it asks for code that comes with the model, and such code is not run"
        raise UserError(f"{file} does not fit its family: {why}. {AGAIN}") from error
    activation = getattr(config.get_text_config(decoder=True), "hidden_act", None)
    if activation is not None and activation not in ACT2FN:
        raise UserError(f"{file}: hidden_act '{activation}' is unknown.{nearest(str(activation), ACT2FN)} {AGAIN}")
    return config
