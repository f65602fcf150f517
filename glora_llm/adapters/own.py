"""The adapter methods of this trainer beside GLoRA: importing this module registers them with PEFT."""

import glora_llm.adapters.bottleneck
import glora_llm.adapters.fusion
import glora_llm.adapters.lora_dropout
import glora_llm.adapters.lors
import glora_llm.adapters.noah
import glora_llm.adapters.periodic_lora
import glora_llm.adapters.repadapter
import glora_llm.adapters.ssf
import glora_llm.adapters.vpt  # noqa: F401
