"""llama.cpp itself, as the package xllamacpp ships it."""

from pathlib import Path
from typing import Any

import torch
import xllamacpp


def generate_by_llama_cpp(file: Path, prompts: list[str], tokens: int) -> list[str]:
    """Return the greedy text after each prompt."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 512, 1, False
    parameters.cpuparams.n_threads = 1
    server = xllamacpp.Server(parameters)
    texts = []
    for prompt in prompts:
        given = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "repeat_penalty": 1.0}
        answer: Any = server.handle_completions(given)
        assert "choices" in answer, answer
        texts.append(answer["choices"][0]["text"])
    return texts


@torch.no_grad()
def generate_by_transformers(model: Any, tokenizer: Any, prompts: list[str], tokens: int) -> list[str]:
    """Return the greedy text after each prompt."""
    texts = []
    for prompt in prompts:
        given = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**given, max_new_tokens=tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        whole, begin = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[0], given["input_ids"][0]))
        texts.append(whole[len(begin) :])  # decoded alone, what follows would lose its first space
    return texts
