"""The draws of a supernet, its own teacher, and a trained B as its start."""

from pathlib import Path

from tests.bad_input.case import Case, Change, bad, file


def lora(folder: Path) -> None:
    """Save a LoRA of rank 4 of the recipe's model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from glora_llm.models.embedded import embedded_folder

    base = AutoModelForCausalLM.from_pretrained(embedded_folder("tiny-llama"))
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(folder / "lora")


def supernet(says: str, options: str = "", *words: str, change: Change | None = None) -> Case:
    """Return a case of a supernet with options of its draws."""
    return bad(says, f"adapter={{paths: sample, supernet: {{ranks: [4, 2]{options}}}}}", *words, change=change)


SUPERNETS: dict[str, Case] = {
    "supernet: all options": supernet("", ", sandwich: 3, odds: {B: {lora: 2, none: 0}}, distill: 0.5"),
    "supernet: a sandwich without a filling": supernet(
        "adapter.supernet.sandwich: got 2 (integer), expected greater than or equal to 3", ", sandwich: 2"
    ),
    "supernet: odds of a mode that it has not": supernet(
        "odds: slot A has no mode lora in this supernet, but vector, none",
        ", modes: {A: [vector, none]}, odds: {A: {lora: 2}}",
    ),
    "supernet: odds of nothing": supernet(
        "odds: every mode of slot C has 0", ", odds: {C: {lora: 0, vector: 0, none: 0}}"
    ),
    "supernet: odds below 0": supernet("adapter.supernet.odds.B.lora: got -1", ", odds: {B: {lora: -1}}"),
    "supernet: odds of a slot that there is not": supernet("odds", ", odds: {F: {lora: 1}}"),
    "supernet: distill without sandwich": supernet(
        "distill learns from the largest path, which sandwich trains: set sandwich", ", distill: 0.5"
    ),
    "supernet: two teachers": supernet(
        "training.distill and adapter.supernet.distill are two teachers of one model",
        ", sandwich: 4, distill: 0.5",
        "training.distill={teacher: 'embedded:tiny-llama'}",
    ),
    "supernet: distill where no tokens are learnt": supernet(
        "adapter.supernet.distill compares the logits of tokens",
        ", sandwich: 4, distill: 0.5",
        "task=classification",
        "data.format=classification",
        change=file("rows.jsonl", "".join(f'{{"text": "{n}", "label": "{"xy"[n % 2]}"}}\n' for n in range(16))),
    ),
    "supernet: rank_stabilized": supernet(
        "rank_stabilized is of fixed ranks, and a supernet scales by alpha / rank", "", "adapter.rank_stabilized=true"
    ),
    "supernet: a LoRA where slot B begins": supernet("", "", "adapter.weights=lora", change=lora),
    "supernet: a LoRA of a larger rank": supernet(
        "has rank 4, and the largest of this supernet is 2: set adapter.supernet.ranks so",
        "",
        "adapter.weights=lora",
        "adapter.supernet.ranks=[2]",
        change=lora,
    ),
    "supernet: a LoRA of other targets": supernet(
        "lora has B of model.layers.0.self_attn.q_proj, which is none of the 2 layers of this",
        "",
        "adapter.weights=lora",
        "adapter.targets=[up_proj]",
        change=lora,
    ),
}
