"""Generalized LoRA (GLoRA, arXiv 2306.07967): f(x) = (W0 + W0 A + B) x + W0 C + D b0 + E + b0.

Importing this package registers the tuner with PEFT, so `peft.get_peft_model(model, GLoRAConfig(...))` works.
"""

from glora_llm.glora.config import GLoRAConfig
from glora_llm.glora.layer import GLoRALinear
from glora_llm.glora.model import GLoRAModel
from glora_llm.glora.path import Genome, LayerPath, SlotSpec

__all__ = ["GLoRAConfig", "GLoRALinear", "GLoRAModel", "Genome", "LayerPath", "SlotSpec"]
