"""Adapters that other packages trained, read into GLoRA's slots: PEFT's LoRA, HiRA, IA3 and GLoRA, LyCORIS's GLoRA."""
