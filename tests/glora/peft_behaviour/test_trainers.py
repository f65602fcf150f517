"""Other people's loops on GLoRA, each beside PEFT's LoRA: transformers' Trainer, trl's SFTTrainer, and a pipeline."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, pipeline

from tests.glora.conftest import Llama, logits
from tests.glora.peft_behaviour.conftest import TUNERS, config

WORDS = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(29))]
TEXTS = ["w1 w2 w3 w4 w5 w6", "w2 w3 w4 w5 w6 w7", "w3 w4 w5 w6 w7 w8", "w4 w5 w6 w7 w8 w9"]


@pytest.fixture
def tokenizer() -> Any:
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **marks)


def started(tuner: str, llama: Llama) -> Any:
    """Return the LLaMA with an adapter that changes nothing yet."""
    model: Any = get_peft_model(llama(), config(tuner, modules_to_save=["lm_head"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".down", ".vector", ".scalar", "lora_B.default.weight")):
                parameter.zero_()
    return model


def arguments(folder: Path, kind: Any = TrainingArguments, **keys: Any) -> Any:
    fixed = {"per_device_train_batch_size": 2, "learning_rate": 0.05, "logging_steps": 1, "save_steps": 3, "seed": 3}
    return kind(output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True, bf16=False, **fixed, **keys)


def trainer(model: Any, folder: Path, steps: int) -> Trainer:
    rows = [{"input_ids": [number, *range(number, number + 6)]} for number in range(1, 9)]
    data = Dataset.from_list([row | {"labels": row["input_ids"]} for row in rows])
    schedule = {"lr_scheduler_type": "constant"}
    return Trainer(model, arguments(folder, max_steps=steps, **schedule), train_dataset=data)


@pytest.mark.parametrize("tuner", TUNERS)
def test_trainer_trains_saves_resumes_and_merges(tuner: str, llama: Llama, tmp_path: Path) -> None:
    base = logits(llama())
    whole = trainer(started(tuner, llama), tmp_path / "whole", 6)
    assert torch.equal(logits(whole.model.eval()), base)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trained = logits(whole.model.eval())
    assert not torch.allclose(trained, base, atol=1e-2)

    trainer(started(tuner, llama), tmp_path / "halves", 3).train()
    resumed = trainer(started(tuner, llama), tmp_path / "halves", 6)
    resumed.train(resume_from_checkpoint=True)
    torch.testing.assert_close(logits(resumed.model.eval()), trained)

    whole.save_model(str(tmp_path / "saved"))
    loaded: Any = PeftModel.from_pretrained(llama(), str(tmp_path / "saved"))
    assert torch.equal(logits(loaded.eval()), trained)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tuner", TUNERS)
def test_sft_trainer(tuner: str, llama: Llama, tokenizer: Any, tmp_path: Path) -> None:
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    data = Dataset.from_list([{"text": text} for text in TEXTS])
    keys = {"max_steps": 4, "max_length": 16, "dataset_text_field": "text", "gradient_checkpointing": False}
    made = SFTTrainer(
        llama(),
        arguments(tmp_path, SFTConfig, **keys),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=config(tuner),
    )
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    names = [name for name, parameter in made.model.named_parameters() if parameter.requires_grad]
    assert names and all(("lora_" if tuner == "lora" else "slot_") in name for name in names)
    trained = logits(made.model.eval())
    loaded: Any = PeftModel.from_pretrained(llama(), str(tmp_path / "checkpoint-4"))
    torch.testing.assert_close(logits(loaded.eval()), trained)


@pytest.mark.parametrize("tuner", TUNERS)
def test_a_pipeline_writes_what_the_model_generates(tuner: str, llama: Llama, tokenizer: Any, tmp_path: Path) -> None:
    """By the adapter, by its folder beside the base, and merged."""
    llama().save_pretrained(tmp_path / "base")
    model: Any = get_peft_model(llama(), config(tuner)).eval()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(str(tmp_path / "adapter"))
    greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    given = tokenizer(TEXTS[:1], return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        expected = tokenizer.decode(model.generate(**given, **greedy)[0]).split()
    base = tokenizer.decode(llama().generate(**given, **greedy)[0]).split()
    assert expected != base
    tokenizer.save_pretrained(tmp_path / "adapter")
    merged = PeftModel.from_pretrained(llama(), str(tmp_path / "adapter")).merge_and_unload()
    for what in (model, str(tmp_path / "adapter"), merged):
        writes = pipeline("text-generation", model=what, tokenizer=tokenizer, device="cpu")
        written = writes(TEXTS[0], return_full_text=False, **greedy)[0]["generated_text"]
        assert written.split() == expected[6:]
