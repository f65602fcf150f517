"""After training: the adapter merged into a plain Hugging Face model, or exported as a plain LoRA, and how exact it was."""
