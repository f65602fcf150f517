"""The frozen base: where it comes from (resolve, embedded), its tokenizer, and how it is loaded (causal_lm)."""
