"""A head on a tiny LLaMA and a tiny BERT: learns, resumes bit for bit, merges into what plain transformers loads."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from glora_llm.cli import main
from glora_llm.evaluation.trained import load_adapted
from glora_llm.plan.plan import make_plan
from glora_llm.plan.run_folder import RunFolder
from tests.in_process import alone, one_thread, train_in_process
from tests.run.wordpiece import WORDS, small_wordpiece

__all__ = ["alone", "one_thread"]
SMALL = [
    "data.max_rows=null", "data.max_test_rows=null", "data.validation=16", "training.global_batch=16",
    "training.micro_batch=8", "training.warmup=0", "data.max_tokens=64", "data.prompt='Card {text}.'",
]  # fmt: skip


@pytest.fixture
def rows(tmp_path: Path) -> list[str]:
    """Changes of a recipe whose class, or number, is told by one word of the text."""
    made = [{"text": f"{n}: {WORDS[n % 3]}", "label": n % 3, "much": 2.0 - n % 3} for n in range(96)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return [*SMALL, f"data.source={tmp_path / 'rows.jsonl'}", "data.test=16"]


def outcome(run: Path) -> dict[str, float]:
    return json.loads((run / "summary.json").read_text())["test"]


CLASSES = ["task=classification", "data.labels=[a, b, c]"]


def test_a_head_for_classes_learns_resumes_and_merges(rows: list[str], tmp_path: Path) -> None:
    run, halves = tmp_path / "run", tmp_path / "halves"
    more = [*rows, *CLASSES, "evaluation.metrics=[accuracy, f1]", "training.steps=30", "output.save_every=15"]
    assert train_in_process("tiny_cpu", *more, f"output.dir={run}") == 0
    scores = outcome(run)
    assert set(scores) == {"test/loss", "test/accuracy", "test/f1"}
    assert scores["test/accuracy"] == 1.0 and scores["test/loss"] < 0.5

    train_in_process("tiny_cpu", *more, f"output.dir={halves}", "output.stop_after=15")
    assert not (halves / "adapter").exists()
    assert train_in_process("tiny_cpu", *more, f"output.dir={halves}") == 0
    whole, resumed = (load_file(place / "adapter" / "adapter_model.safetensors") for place in (run, halves))
    assert any("score" in name for name in whole)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)

    assert main(["merge", str(run), "--out", str(run / "merged")]) == 0
    assert json.loads((run / "merged" / "merge_report.json").read_text())["max_abs_logit_diff"] < 1e-4
    plain = AutoModelForSequenceClassification.from_pretrained(run / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "merged")
    assert plain.config.id2label == {0: "a", 1: "b", 2: "c"}
    folder = RunFolder(run)
    plan = make_plan(folder.recipe())
    rows_of_test = plan.rows("test")
    assert rows_of_test is not None
    batch = plan.batch(rows_of_test, list(range(16)))
    with torch.no_grad():
        adapted = load_adapted(plan, run / "adapter")(input_ids=batch["input_ids"]).logits
        merged = plain(input_ids=batch["input_ids"]).logits
        torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)
        alone = plain(**tokenizer("Card 103: found.", return_tensors="pt")).logits
    assert alone.argmax() == 1
    assert merged.argmax(-1).tolist() == [int(label) for label in batch["labels"]]
    assert outcome(run) | json.loads((run / "summary.json").read_text())["test_merged"] == pytest.approx(
        scores, abs=1e-4
    )


def test_a_head_for_a_number_in_nf4(rows: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["data.format=regression", "data.columns={label: much}", "training.steps=40", "model.quantization=nf4"]
    assert train_in_process("tiny_cpu", *rows, *more, f"output.dir={run}") == 0
    scores = outcome(run)
    assert set(scores) == {"test/loss", "test/pearson", "test/spearman"}
    assert scores["test/pearson"] > 0.9 and scores["test/loss"] < 0.3
    assert main(["merge", str(run), "--out", str(run / "merged")]) == 0
    plain = AutoModelForSequenceClassification.from_pretrained(run / "merged")
    assert plain.config.num_labels == 1 and plain.config.problem_type == "regression"


Outcome = Callable[..., str]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["task=clasification"], "task: got 'clasification'"),
        (["task=regression", "data.labels=[a, b, c]"], "learns the column `label` of data.format regression"),
        (["task=language_modeling", "data.format=regression", "data.columns={label: much}"],
         "language_modeling learns text"),
        ([*CLASSES, "data.packing=true"], "reads one sample a row, and data.packing puts several into one"),
        ([*CLASSES, "evaluation.metrics=[pearson]"], "'pearson', which a head of classification does not have"),
        ([*CLASSES, "evaluation.metrics=[label_accuracy]"], "which a head of classification does not have"),
        (["task=classification", "data.labels=[a, b]"], "Class number 2 has no word: data.labels has numbers 0 to 1"),
        (["data.format=regression", "data.columns={label: text}"],
         "The label of a regression should be a number, and is"),
        ([*CLASSES, "model.attention=segments"], "a head reads one sample a row"),
        ([*CLASSES, "model.dtype=bfloat16", "training.deepspeed=zero0"],
         "a head in bfloat16 needs float32 masters, which training.deepspeed zero0 (ZeRO 0) does not keep"),
        ([*CLASSES, "data.chat_template=tokenizer"], "answers a prompt, not a conversation"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)  # fmt: skip
def test_a_mistake_with_heads(
    more: list[str], said: str, rows: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_in_process("tiny_cpu", *rows, *more, f"output.dir={tmp_path / 'run'}") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_encoder_gets_a_head_too(family: str, rows: list[str], tmp_path: Path) -> None:
    """A masked language model: its own head is left, the new one is trained; attention goes both ways, with a mask."""
    folder, run = tmp_path / "encoder", tmp_path / "run"
    torch.manual_seed(0)
    tokenizer = small_wordpiece()
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), max_position_embeddings=66, pad_token_id=0, **sizes
    )
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    more = [*rows, *CLASSES, f"model.name_or_path={folder}", "training.steps=60"]
    assert train_in_process("tiny_cpu", *more, f"output.dir={run}") == 0
    assert outcome(run)["test/accuracy"] == 1.0
    assert main(["merge", str(run), "--out", str(run / "merged")]) == 0
    assert json.loads((run / "merged" / "merge_report.json").read_text())["max_abs_logit_diff"] < 1e-4
    plain = AutoModelForSequenceClassification.from_pretrained(run / "merged").eval()
    inputs = tokenizer(["Card 1: found.", "Card 5: late."], return_tensors="pt", padding=True)
    assert inputs["input_ids"][0, 0] == tokenizer.cls_token_id
    with torch.no_grad():
        assert plain(**inputs).logits.argmax(-1).tolist() == [1, 2]


@pytest.mark.parametrize("task", ["auto", "classification"])
def test_a_glue_recipe_learns_from_a_folder_of_splits(task: str, tmp_path: Path) -> None:
    """MRPC's columns and words; the second sentence tells the class. Label words and a head give the same scores."""
    folder, run = tmp_path / "mrpc", tmp_path / "run"
    folder.mkdir()
    for split, begin, end in (("train", 0, 120), ("validation", 120, 152)):
        lines = [{"sentence1": f"card {n}", "sentence2": WORDS[n % 2], "label": n % 2} for n in range(begin, end)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tiny = ["model.name_or_path=embedded:tiny-llama", "training.steps=60", "training.lr=1e-2", "data.validation=16"]
    recipe = ["data.benchmark=mrpc", f"data.source={folder}", f"task={task}", f"output.dir={run}"]
    assert train_in_process("smollm2_glue", *tiny, *recipe) == 0
    scores = outcome(run)
    assert {"test/f1", "test/accuracy"} <= set(scores)
    assert scores["test/f1"] == scores["test/accuracy"] == 1.0
