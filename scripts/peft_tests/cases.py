"""Where PEFT's tests say `GloraConfig` (PEFT's own GLoRA), the same case with this project's `GLoRAConfig`."""

from typing import Any

from peft import GloraConfig

from glora_llm.glora import GLoRAConfig

ALL_MODES = {"A": "lora", "B": "lora", "C": "lora", "D": "vector", "E": "vector"}
VECTORS = dict.fromkeys("ABCDE", "vector")
SCALARS = {"A": "scalar", "B": "scalar", "C": "vector", "D": "scalar", "E": "scalar"}
FREE = {"d_without_bias": "none"}  # D is left out where a layer has no bias
ROW = "test_name,model_id,config_cls,config_kwargs"
LANGUAGE_ROW = "config_cls,config_kwargs"

# of tests on small modules: model, arguments
CUSTOM: dict[str, tuple[str, dict[str, Any]]] = {
    "a string": ("MLP", {"target_modules": "lin0"}),
    "a list": ("MLP", {"target_modules": ["lin0"]}),
    "the last layer": ("MLP", {"target_modules": ["lin1"]}),
    "both layers": ("MLP", {"target_modules": ["lin0", "lin1"]}),
    "a saved module": ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    "a saved target": ("MLP", {"target_modules": ["lin0", "lin1"], "modules_to_save": ["lin1"]}),
    "all modes": ("MLP", {"target_modules": ["lin0", "lin1"], "slots": ALL_MODES}),
    "hadamard": ("MLP", {"target_modules": ["lin0", "lin1"], "slots": ALL_MODES, "composition": "hadamard"}),
    "vectors": ("MLP", {"target_modules": ["lin0", "lin1"], "slots": VECTORS}),
    "scalars": ("MLP", {"target_modules": ["lin0", "lin1"], "slots": SCALARS}),
    "B alone": ("MLP", {"target_modules": ["lin0"], "slots": {"B": "lora"}}),
    "dropout": ("MLP", {"target_modules": ["lin0"], "dropout": 0.1}),
    "rank stabilised": ("MLP", {"target_modules": ["lin0"], "rank": 4, "rank_stabilized": True}),
    "paths": ("MLP", {"target_modules": ["lin0", "lin1"], "paths": {"lin1": {"B": "lora", "E": "scalar"}}}),
    "all-linear": ("MLP", {"target_modules": "all-linear"}),
    "a layer norm saved": ("MLP_LayerNorm", {"target_modules": ["lin0"], "modules_to_save": ["layernorm0"]}),
    "behind an embedding": ("EmbConv1D", {"target_modules": ["lin0"], "slots": ALL_MODES}),
}
# of tests on transformers models, beside the defaults
LANGUAGE: list[dict[str, Any]] = [
    {"slots": ALL_MODES, **FREE},
    {"slots": ALL_MODES, "composition": "hadamard", "init_weights": False, **FREE},
    {"slots": VECTORS, "init_weights": False, **FREE},
]
# lists of other methods that are as generic, by module
ALSO = {"test_token_classification_qa"}


def converted(names: str, values: Any, module: str) -> list[Any] | None:
    """Return the cases of a parametrisation for GLoRAConfig; None where it does not name PEFT's GLoRA."""
    rows = [row for row in values if _mentions(row)]
    flat = names.replace(" ", "") if isinstance(names, str) else ",".join(names)
    if not rows and module in ALSO and flat == LANGUAGE_ROW:
        rows = [(GloraConfig, {"task_type": next(iter(values))[1]["task_type"], "target_modules": None})]
    if not rows:
        return None
    if flat == ROW:
        return [(name, model, GLoRAConfig, dict(keys)) for name, (model, keys) in CUSTOM.items()]
    found = [_replaced(row) for row in rows]
    if flat == LANGUAGE_ROW:
        shared = {key: value for key, value in rows[0][1].items() if key in ("task_type", "target_modules")}
        found += [(GLoRAConfig, shared | keys) for keys in LANGUAGE]
    return found


def is_ours(value: Any) -> bool:
    """Tell whether a value of a test's parameters is this project's GLoRA, or holds it."""
    if isinstance(value, list | tuple):
        return any(map(is_ours, value))
    return value is GLoRAConfig or isinstance(value, GLoRAConfig)


def _mentions(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_mentions, value))
    return value is GloraConfig or isinstance(value, GloraConfig)


def _replaced(value: Any) -> Any:
    if value is GloraConfig:
        return GLoRAConfig
    if isinstance(value, GloraConfig):
        keys = ("target_modules", "modules_to_save", "init_weights")
        return GLoRAConfig(rank=value.r, **{key: getattr(value, key) for key in keys})
    if isinstance(value, dict):
        return {{"r": "rank"}.get(key, key): item for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return type(value)._make(map(_replaced, value))
    return type(value)(map(_replaced, value)) if isinstance(value, list | tuple) else value
