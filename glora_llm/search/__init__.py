"""The supernet's draws, and the search for a path of every layer. Knows GLoRA's slots, nothing of models or data."""
