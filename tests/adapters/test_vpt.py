"""Visual prompts against a naive forward pass, and in a run of image classification."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from glora_llm.adapters.inject import inject
from glora_llm.adapters.weights import load_start, save_adapter, trainables
from glora_llm.errors import AdapterError, UserError
from glora_llm.schema import AdapterSection
from tests.in_process import one_thread  # noqa: F401 - a fixture

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
PROMPTS = 5


def vit() -> Any:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=3, **SIZES)).double().eval()


def section(**more: Any) -> AdapterSection:
    return AdapterSection(method="vpt", peft={"num_tokens": PROMPTS, **more})


def images() -> Tensor:
    return torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def naive(model: Any, prompts: list[Tensor], classifier: Any, pixels: Tensor) -> Tensor:
    """Return the logits as equations 4 to 6 of the paper have them; one tensor of prompts is shallow."""
    tokens = model.vit.embeddings(pixels)
    x, patches = tokens[:, :1], tokens[:, 1:]
    z = prompts[0].expand(len(pixels), -1, -1)
    for number, layer in enumerate(model.vit.layers):
        if number and len(prompts) > 1:
            z = prompts[number].expand(len(pixels), -1, -1)
        x, z, patches = layer(torch.cat([x, z, patches], 1)).split([1, z.shape[1], patches.shape[1]], 1)
    logits: Tensor = classifier(model.vit.layernorm(x)[:, 0])
    return logits


def prompts_of(model: Any) -> list[Tensor]:
    return [parameter for name, parameter in model.named_parameters() if "vpt_prompt" in name]


@pytest.mark.parametrize("deep", [True, False])
def test_the_forward_pass_is_that_of_the_paper(deep: bool) -> None:
    base = vit()
    base.activation_checkpointing_enable({"use_reentrant": False})
    model = inject(base, section(deep=deep), seed=0, steps=1)
    model.double().train()
    prompts = prompts_of(model)
    assert [tuple(prompt.shape) for prompt in prompts] == [(PROMPTS, 32)] * (3 if deep else 1)
    bound = math.sqrt(6 / (3 * 4 * 4 + 32))
    assert all(0.8 * bound < float(prompt.detach().abs().max()) <= bound for prompt in prompts)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == len(prompts) + 2 and sum("classifier" in name for name in trained) == 2

    pixels, labels = images(), torch.tensor([0, 1, 2, 0])
    found = model(pixel_values=pixels, labels=labels)
    gradients = torch.autograd.grad(found.loss, prompts)
    expected = naive(vit(), prompts, model.get_base_model().classifier, pixels)
    torch.testing.assert_close(found.logits, expected, rtol=1e-10, atol=1e-10)
    loss = torch.nn.functional.cross_entropy(expected, labels)
    torch.testing.assert_close(gradients, torch.autograd.grad(loss, prompts), rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_save_load_disable_and_no_merge(tmp_path: Path) -> None:
    model = inject(vit(), section(dropout=0.1), seed=0, steps=1)
    items = trainables(model, section(), 1.0)
    for item in items:
        item.parameter.data += 0.1
    save_adapter(model, {f"master/{item.name}": item.parameter for item in items}, tmp_path, "-")
    expected = model.eval()(pixel_values=images()).logits
    loaded = PeftModel.from_pretrained(vit(), str(tmp_path)).eval()
    torch.testing.assert_close(loaded(pixel_values=images()).logits, expected, rtol=1e-6, atol=1e-6)
    further = inject(vit(), section(dropout=0.1), seed=3, steps=1)
    load_start(further, trainables(further, section(), 1.0), tmp_path)
    torch.testing.assert_close(further.eval()(pixel_values=images()).logits, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loaded.unload().vit(images())[0], vit().vit(images())[0])
    with pytest.raises(AdapterError, match="cannot be merged: its prompts are further tokens"):
        model.merge_and_unload()
    drawn = [model.train()(pixel_values=images()).logits for _ in range(2)]
    assert not torch.equal(*drawn), "dropout of the prompts"


@pytest.mark.parametrize("deep", [True, False])
def test_it_learns(deep: bool) -> None:
    """Forty steps tell images by the sign of their mean."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(32) % 2
    pixels = 0.5 * torch.randn(32, 3, 16, 16, generator=generator, dtype=torch.float64)
    pixels += (labels * 2.0 - 1)[:, None, None, None]
    model = inject(vit(), section(deep=deep), seed=0, steps=40).double().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(40):
        loss = model(pixel_values=pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0], (losses[0], losses[-1])


def test_other_models_and_lengths_are_refused() -> None:
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=16, **SIZES))
    with pytest.raises(UserError, match="whose head reads the class token alone, and this is a llama model"):
        inject(llama, section(), seed=0, steps=1)
    with pytest.raises(UserError, match="num_tokens is 0; a prompt has 1 token or more"):
        inject(vit(), section(num_tokens=0), seed=0, steps=1)
    with pytest.raises(UserError, match="is no layer of a ViT, at whose input"):
        inject(vit(), AdapterSection(method="vpt", targets=["q_proj"]), seed=0, steps=1)
