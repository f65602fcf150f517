"""After training: the adapter merged into a plain model, or exported as a plain LoRA, and how exact that was."""
