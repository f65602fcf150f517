"""NOAH's sizes, its supernet and its search."""

from pathlib import Path

from tests.bad_input.case import Case, Change, bad, both, file
from tests.bad_input.vision_cases import pictures

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VIT = (
    "model.name_or_path=vit",
    "data={format: images, source: pictures, validation: 2, images: {mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}}",
)
SLOTS = '{"vit.layers.0": {"A": {"mode": "lora", "rank": 2, "scale": 1.0}}}'
UNKNOWN = '{"vit.layers.7": {"adapter": 2}}'
SUPERNET = "adapter={method: noah, paths: sample, supernet: {sizes: {adapter: [0, 2], lora: [0, 2], prompt: [0, 2]}}}"


def vit(folder: Path) -> None:
    """Write a ViT of images of 8 x 8 pixels."""
    from transformers import ViTConfig, ViTForImageClassification

    ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4)).save_pretrained(folder / "vit")


def noah(says: str, *words: str, change: Change | None = None) -> Case:
    """Return a case of a ViT of one block of width 16."""
    made = both(pictures("cat", "dog"), vit)
    return bad(says, *VIT, *words, change=made if change is None else both(made, change))


NOAH: dict[str, Case] = {
    "noah: sizes of each part": noah("", "adapter={method: noah, peft: {adapter: 4, lora: 0, prompt: 2}}"),
    "noah: a language model": bad(
        "adapter.method noah trains image classifiers, and this recipe has one of the language models.",
        "adapter={method: noah}",
    ),
    "noah: a size below 0": noah(
        "adapter.peft.prompt is -1; expected its size, a whole number from 0.",
        "adapter={method: noah, peft: {prompt: -1}}",
    ),
    "noah: a genome among PEFT's arguments": noah(
        "adapter.peft.genome follows from adapter.genome: take it away.",
        "adapter={method: noah, peft: {genome: {vit.layers.0: {lora: 2}}}}",
    ),
    "noah: a scale of 0": noah("scale is 0, and LoRA would not be trained", "adapter={method: noah, peft: {scale: 0}}"),
    "noah: a part that there is not": noah(
        "adapter.peft.prompts: NoahConfig has no such argument. Did you mean 'prompt'?",
        "adapter={method: noah, peft: {prompts: 3}}",
    ),
    "noah: LoRA wider than its linears": noah(
        "LoRA of rank 17 is above the smaller side of the linears here, 16:", "adapter={method: noah, peft: {lora: 17}}"
    ),
    "noah: a linear as its place": noah(
        "adapter.targets: a Linear is no layer of a ViT, into which noah puts its",
        "adapter={method: noah, targets: [q_proj]}",
    ),
    "noah: a supernet of GLoRA's modes": noah(
        "supernet.modes is not of method noah, whose supernet has sizes",
        "adapter={method: noah, paths: sample, supernet: {modes: {A: [none, lora]}}}",
    ),
    "noah: sizes in GLoRA's supernet": noah(
        "supernet.sizes is not of method glora, whose supernet has modes and ranks",
        "adapter={paths: sample, supernet: {sizes: {lora: [0, 2]}}}",
    ),
    "noah: a genome of GLoRA's slots": noah(
        "the genome has GLoRA's slots; one of noah gives blocks their sizes",
        *("adapter={method: noah, genome: genome.json}",),
        change=file("genome.json", SLOTS),
    ),
    "noah: a genome of another model": noah(
        "vit.layers.7", *("adapter={method: noah, genome: genome.json}",), change=file("genome.json", UNKNOWN)
    ),
    "noah: the additive search": noah(
        "search.strategy additive takes the first-order importance of every choice",
        *(SUPERNET, "search={strategy: additive, budget: 100}"),
    ),
    "noah: a search under seconds": noah(
        "search.limit seconds is measured of linears with GLoRA's slots alone",
        *(SUPERNET, "search={strategy: evolution, limit: seconds, budget: 1}"),
    ),
    "noah: a search without a supernet": noah(
        "A search needs a supernet, and this recipe trains fixed paths",
        *("adapter={method: noah}", "search={strategy: evolution, budget: 100}"),
    ),
    "noah: merged after training": noah(
        "merge.after_training: An adapter of method noah cannot be merged:",
        *("adapter={method: noah}", "merge.after_training=true"),
    ),
}
