"""The search for a path of every layer of a supernet. It knows GLoRA's slots, nothing of models or data."""
