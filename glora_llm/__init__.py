"""GLoRA fine-tuning of quantised LLaMA-style models with DeepSpeed: recipes, training, resume, merge."""

__version__ = "0.1.0"
