"""Check that a run's adapter can be merged into a model that plain transformers loads: its biases decide."""

from typing import Any

from glora_llm.adapters.inject import adapted_layers, adapted_with_bias, added_biases
from glora_llm.glora.experts import GLoRAExperts
from glora_llm.models.bias import bias_support, bias_switch
from glora_llm.models.matrices import is_linear


def merge_obstacle(config: Any, model: Any) -> str | None:
    """Return why the adapter cannot be merged into its family, and what can be; None when it can."""
    experts = [name for name, layer in adapted_layers(model).items() if isinstance(layer, GLoRAExperts)]
    if experts:
        return (
            f"This adapter cannot be merged from a run's files: '{experts[0]}' holds stacked experts, which a model's "
            "files keep one by one. PEFT's merge_and_unload in a script merges it exactly (docs/glora.md); or leave "
            "the experts out of adapter.targets."
        )
    added = {name.rpartition(".")[2]: remedy for name, remedy in added_biases(model).items()}
    kinds = {name.rpartition(".")[2] for name in adapted_with_bias(model)}
    never = sorted(kind for kind in {*kinds, *added} if not holds_bias(config, kind))
    if not never:
        return None
    if never[0] in added:
        return (
            f"This adapter cannot be merged: it gives a bias to {', '.join(never)}, and a {config.model_type} model of "
            "plain transformers has none there. Training works; to merge, train without these biases: "
            f"adapter.peft={{{added[never[0]]}}}."
        )
    linears_alone = all(is_linear(layer.get_base_layer()) for layer in adapted_layers(model).values())
    as_lora = "`merge --to lora` keeps C and E as the LoRA's bias; " if linears_alone else ""
    return (
        f"This adapter cannot be merged: slots C and E give a bias to {', '.join(never)}, and a {config.model_type} "
        "model of plain transformers has none there. Training works; to merge, set C and E to none (for "
        f"'{never[0]}' alone: by adapter.paths); A and B merge everywhere. {as_lora}"
        "`merge --for transformers --without C,E` leaves them out there, and says what that costs."
    )


def holds_bias(config: Any, suffix: str) -> bool:
    """Tell whether plain transformers can give the linears named `suffix` a bias, by one switch at most."""
    if suffix == "lm_head":
        return False  # not part of the decoder layer that bias_support builds
    support = bias_support(config, suffix)
    return support == "has" or (support == "switch" and bias_switch(config, suffix) is not None)
