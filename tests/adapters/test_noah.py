"""NOAH's blocks against a naive forward pass; a subnet of the supernet against a model that has those sizes alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from glora_llm.adapters.inject import inject, searched_layers
from glora_llm.adapters.noah_sizes import NoahConfig, inherit
from glora_llm.adapters.weights import load_start, save_adapter, trainables
from glora_llm.errors import AdapterError, UserError
from glora_llm.glora import GLoRAConfig
from glora_llm.glora.path import Genome, genome_from_json, genome_to_json, genome_to_slots
from glora_llm.glora.path_sampler import Supernet
from glora_llm.glora.supernet import set_paths
from glora_llm.schema import AdapterSection, SearchSection, SupernetSection
from glora_llm.search.space import space_of
from tests.adapters.module_models import perturb
from tests.in_process import one_thread  # noqa: F401 - a fixture

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
ALL: Any = {"adapter": [6, 3, 0], "lora": [4, 2, 0], "prompt": [5, 2, 0]}
GENOME = genome_from_json(
    '{"vit.layers.0": {"adapter": 3, "prompt": 2}, "vit.layers.2": {"adapter": 6, "lora": 2, "prompt": 5}}'
)
LABELS = torch.tensor([0, 1, 2, 0])


def vit() -> Any:
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=3, **SIZES))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.double().eval()


def images() -> Tensor:
    return torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def fixed(genome: Genome | None = None, **peft: Any) -> Any:
    """A model with the sizes of a genome, or the same in every block."""
    where = None if genome is None else "genome.json"  # whose content is given
    section = AdapterSection(method="noah", peft=peft or None, genome=where)
    model = inject(vit(), section, seed=0, steps=1, genome=genome).double()
    perturb(model, 0.3)
    return model


def supernet() -> Any:
    section = AdapterSection(method="noah", paths="sample", supernet=SupernetSection(sizes=ALL))
    model = inject(vit(), section, seed=0, steps=1).double()
    perturb(model, 0.3)
    return model


def trained(model: Any, ending: str = "") -> dict[str, Tensor]:
    """Return the trained parameters by the names that PEFT saves them under."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name.replace(".default", ""): p for name, p in found.items() if ending in name}


def naive(base: Any, model: Any, genome: Genome, pixels: Tensor) -> Tensor:
    """Return the logits as the equations of the module's docstring have them."""
    weights = {name.partition("layers.")[2]: p for name, p in trained(model, "noah_parts").items()}
    x = base.vit.embeddings(pixels)
    for number, layer in enumerate(base.vit.layers):
        sizes = genome_to_slots({"": genome.get(f"vit.layers.{number}", genome_from_json('{"": {}}')[""])})[""]
        own = {name.rpartition(".")[2]: p for name, p in weights.items() if name.startswith(f"{number}.")}
        if prompts := sizes.get("prompt", 0):
            x = torch.cat([x[:, :1], own["prompt"].expand(len(x), -1, -1), x[:, 1:]], 1)
        z, heads = layer.layernorm_before(x), 2
        q, k, v = (getattr(layer.attention, f"{name}_proj")(z) for name in "qkv")
        if sizes.get("lora"):
            q = q + linear(linear(z, own["query_down"]), own["query_up"])
            v = v + linear(linear(z, own["value_down"]), own["value_up"])
        q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        shares = (q @ k.transpose(2, 3) * (32 / heads) ** -0.5).softmax(3)
        x = x + layer.attention.o_proj((shares @ v).transpose(1, 2).flatten(2))
        y = layer.mlp(layer.layernorm_after(x))
        if sizes.get("adapter"):
            hidden = linear(y, own["down"], own["down_bias"])
            y = y + linear(hidden * torch.sigmoid(1.702 * hidden), own["up"], own["up_bias"])
        x = x + y
        if prompts:
            x = torch.cat([x[:, :1], x[:, 1 + prompts :]], 1)
    logits: Tensor = model.get_base_model().classifier(base.vit.layernorm(x)[:, 0])
    return logits


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_forward_pass_is_that_of_the_equations(checkpointing: bool) -> None:
    model = fixed(GENOME)
    if checkpointing:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    parameters = list(trained(model).values())
    found = model(pixel_values=images(), labels=LABELS)
    expected = naive(vit(), model, GENOME, images())
    torch.testing.assert_close(found.logits, expected, rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad(found.loss, parameters)
    wanted = torch.autograd.grad(cross_entropy(expected, LABELS), parameters)
    torch.testing.assert_close(gradients, wanted, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_subnet_is_the_model_of_those_sizes(checkpointing: bool) -> None:
    """In values and gradients; what it leaves out of the supernet has a gradient of zero, not none."""
    whole, alone = supernet(), fixed(GENOME)
    weights = {name: p.detach() for name, p in trained(whole).items()}
    inherited = inherit(weights, GENOME)
    assert inherited.keys() == trained(alone).keys()
    for name, parameter in trained(alone).items():
        parameter.data.copy_(inherited[name])
    layers = searched_layers(whole)
    set_paths(layers, {name: GENOME.get(name, genome_from_json('{"": {}}')[""]) for name in layers})
    losses = []
    for model in (whole, alone):
        if checkpointing:
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        found = model.train()(pixel_values=images(), labels=LABELS)
        found.loss.backward()
        losses.append(found.loss.detach())
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
    gradients = {name: p.grad for name, p in trained(whole).items()}
    assert all(gradient is not None for gradient in gradients.values())
    shared = inherit({name: g for name, g in gradients.items() if g is not None}, GENOME)
    for name, parameter in trained(alone).items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, shared[name], rtol=1e-9, atol=1e-13)
    total = sum(int(g.count_nonzero()) for g in gradients.values() if g is not None)
    assert total == sum(int(g.count_nonzero()) for g in shared.values()), "of all else: zero"


def test_the_space_counts_what_is_trained() -> None:
    space = space_of(searched_layers(supernet()), SearchSection(strategy="evolution"))
    assert [(gene.slot, len(gene.specs)) for gene in space.genes] == 3 * [("adapter", 3), ("lora", 3), ("prompt", 3)]
    model = fixed(GENOME)
    assert space.size(space.code(GENOME)) == sum(p.numel() for p in trained(model, "noah_parts").values())
    # adapter 3 and prompt 2; adapter 6, LoRA 2 on two linears, prompt 5; of width 32
    assert space.size(space.code(GENOME)) == (3 * 65 + 32 + 2 * 32) + (6 * 65 + 32 + 2 * 2 * 64 + 5 * 32)
    assert space.genome(space.code(GENOME)) == GENOME | {"vit.layers.1": space.genome(space.code({}))["vit.layers.1"]}
    assert genome_from_json(genome_to_json(GENOME)) == GENOME
    assert '"vit.layers.0": {"adapter": 3, "prompt": 2}' in genome_to_json(GENOME)


def test_every_size_is_drawn() -> None:
    layers = searched_layers(supernet())
    net, seen = Supernet(layers, 0), set()
    for step in range(60):
        net.draw(step, 0)
        seen |= {(slot, layer.path["default"][slot].rank) for layer in layers.values() for slot in ALL}
    assert seen == {(slot, size) for slot, sizes in ALL.items() for size in sizes}
    net.largest()
    assert {slot: layers["vit.layers.1"].path["default"][slot].rank for slot in ALL} == {
        slot: sizes[0] for slot, sizes in ALL.items()
    }


@torch.no_grad()
def test_save_load_disable_and_unload(tmp_path: Path) -> None:
    model = fixed(GENOME)
    section = AdapterSection(method="noah", genome="genome.json")
    items = trainables(model, section, 1.0)
    save_adapter(model, {f"master/{item.name}": item.parameter for item in items}, tmp_path, "-")
    expected = model.eval()(pixel_values=images()).logits
    loaded = PeftModel.from_pretrained(vit(), str(tmp_path)).eval()
    torch.testing.assert_close(loaded(pixel_values=images()).logits, expected, rtol=1e-5, atol=1e-5)
    further = inject(vit(), section, seed=3, steps=1, genome=GENOME)
    load_start(further, trainables(further, section, 1.0), tmp_path)
    torch.testing.assert_close(further.eval()(pixel_values=images()).logits, expected, rtol=1e-5, atol=1e-5)
    with loaded.disable_adapter():
        torch.testing.assert_close(loaded(pixel_values=images()).logits, vit()(pixel_values=images()).logits)
    with pytest.raises(AdapterError, match=r"vit.layers.0 has adapter and prompt, and only LoRA is a part of a weight"):
        loaded.merge_and_unload()
    torch.testing.assert_close(loaded.unload().vit(images())[0], vit().vit(images())[0])


@torch.no_grad()
def test_lora_alone_merges() -> None:
    model = fixed(adapter=0, lora=3, prompt=0, scale=0.5).eval()
    expected = model(pixel_values=images()).logits
    model.merge_adapter()
    torch.testing.assert_close(model(pixel_values=images()).logits, expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model(pixel_values=images()).logits, expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(pixel_values=images()).logits, expected)
    assert (expected - vit()(pixel_values=images()).logits).abs().max() > 1e-3
    assert not any(module._forward_hooks for module in merged.modules())


def test_it_begins_as_the_base_and_learns() -> None:
    """Thirty steps tell images by the sign of their mean; without prompts the start changes nothing."""
    section = AdapterSection(method="noah", peft={"prompt": 0})
    begun = inject(vit(), section, seed=0, steps=1).double().eval()
    torch.testing.assert_close(begun(pixel_values=images()).logits, vit()(pixel_values=images()).logits)
    labels = torch.arange(32) % 2
    noise = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    pixels = 0.5 * noise + (labels * 2.0 - 1)[:, None, None, None]
    model = inject(vit(), AdapterSection(method="noah"), seed=0, steps=30).double().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(30):
        loss = model(pixel_values=pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0], (losses[0], losses[-1])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: fixed(prompt=-1), "adapter.peft.prompt is -1; expected its size, a whole number from 0"),
        (lambda: fixed(lora=33), "LoRA of rank 33 is above the smaller side of the linears here, 32"),
        (lambda: fixed(activation="quick_gellu"), "activation 'quick_gellu' is unknown. Did you mean 'quick_gelu'?"),
        (lambda: fixed({"vit.layers.9": GENOME["vit.layers.0"]}), "there is no adapted layer 'vit.layers.9'"),
        (lambda: NoahConfig(genome={"vit.layers.0": {"B": "vector"}}), "the genome has GLoRA's slots"),  # type: ignore[dict-item]
        (lambda: GLoRAConfig(genome={"vit.layers.0": {"lora": 2}}), "the genome has the sizes of method noah"),
        (lambda: genome_from_json('{"vit.layers.0": {"lora": -2}}'), "lora of vit.layers.0 is -2; expected its size"),
        (lambda: genome_from_json('{"vit.layers.0": {"lora": 2, "A": "none"}}'), "has sizes of method noah, and 'A'"),
        (lambda: inherit({}, GENOME), "there is no adapted layer 'vit.layers.0'"),
        (lambda: inject(vit(), AdapterSection(method="noah", targets=["mlp"]), 0, 1), "is no layer of a ViT, into"),
        (
            lambda: inject(LlamaForCausalLM(LlamaConfig(vocab_size=16, **SIZES)), AdapterSection(method="noah"), 0, 1),
            "adapter.method noah puts prompts beside the patches of a vit model",
        ),
    ],
)
def test_what_is_refused(make: Any, said: str) -> None:
    with pytest.raises((UserError, AdapterError)) as caught:
        make()
    assert said in str(caught.value)


def test_a_genome_inherits_no_more_than_there_is() -> None:
    weights = {name: p.detach() for name, p in trained(supernet()).items()}
    with pytest.raises(UserError, match=r"lora of vit.layers.1 has size 5; the supernet has up to 4"):
        inherit(weights, genome_from_json('{"vit.layers.1": {"lora": 5}}'))
    few = {name: tensor for name, tensor in weights.items() if ".prompt" not in name}
    with pytest.raises(UserError, match=r"vit.layers.1 is to have prompt, and the supernet has none there"):
        inherit(few, genome_from_json('{"vit.layers.1": {"prompt": 2}}'))
