"""Whatever a user may get wrong ends with exit code 2 and one message, before anything is trained or written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from glora_llm import recipe as recipes
from glora_llm.cli import main
from glora_llm.models.embedded import embedded_folder
from glora_llm.run.train import train
from tests.in_process import alone, forget_launch, train_in_process

__all__ = ["alone"]
WORDS = ["card arrival", "lost card", "top up"]
Outcome = Callable[..., str]


def write_rows(path: Path, count: int = 40) -> Path:
    rows = [{"text": f"where is my card {number}", "label": WORDS[number % 3]} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def overrides(data: Path, out: Path) -> list[str]:
    model = data.parent / "model"
    return [
        f"model.name_or_path={model if model.is_dir() else 'embedded:tiny-llama'}",
        f"data.source={data}", "data.validation=8", "data.test=null", "data.max_rows=null", "data.max_test_rows=null",
        "training.steps=2", "training.warmup=0", "output.save_every=1", f"output.dir={out}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base of its own in `model`, the rows `data.jsonl`, and a finished run of two steps, `run`."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(embedded_folder("tiny-llama"), folder / "model")
    train(recipes.load("tiny_cpu", overrides(write_rows(folder / "data.jsonl"), folder / "run")))
    forget_launch()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Outcome:
    """Return what runs `glora-llm train`, checks that it is refused before ranks start, and returns the message."""

    def run(*more: str, recipe: str = "tiny_cpu") -> str:
        code = main(["train", "--recipe", recipe, *more])
        printed = capsys.readouterr()
        assert code == 2, printed
        assert printed.err.startswith("error: ") and printed.err.count("error: ") == 1
        assert "Traceback" not in printed.err
        assert "step 1/" not in printed.out
        assert not torch.distributed.is_initialized()
        return printed.err

    return run


def test_a_short_run_leaves_what_the_later_commands_need(trained: Path) -> None:
    run = trained / "run"
    assert {path.name for path in run.iterdir()} == {
        *("recipe.yaml", "base.json", "sample.json", "metrics.jsonl", "summary.json", "launches.jsonl"),
        *("tensorboard", "checkpoints", "adapter"),
    }  # fmt: skip
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-1", "step-2"}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["skipped_steps"] == 0
    with safe_open(run / "adapter" / "adapter_model.safetensors", "pt") as weights:
        assert len(weights.keys()) == 2 * 7 * 6  # layers x linears x (A and B with two factors, C, E)
    name, revision, _, dtype, data = json.loads((run / "base.json").read_text()).values()
    assert (name, revision, dtype, data) == (str(trained / "model"), None, "float32", {})


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["adapter.targets=[q_prj]"],
         ["adapter.targets: 'q_prj' matches no module. Did you mean 'q_proj'?", "gate_proj, k_proj, lm_head, o_proj"]),
        (["adapter.slots.D=vector"], ["Slot D scales the frozen bias b0, and this layer has none", "Set D to none"]),
        (["adapter.slots={A: none}"], ["has no trainable parameter"]),
        (["adapter.method=lorra", "adapter.slots=null"], ["adapter.method 'lorra' is unknown. Did you mean 'lora'?"]),
        (["adapter.method=lora", "adapter.slots=null", "adapter.peft={use_dorra: true}"],
         ["adapter.peft.use_dorra: LoraConfig has no such argument. Did you mean 'use_dora'?"]),
        (["adapter.paths={q_porj: {C: none}}"], ["adapter.paths 'q_porj' matches none of the 14 adapted layers"]),
        (["output.resume=must"], ["output.resume is must, and ", "/run/checkpoints has no checkpoint."]),
        (["training.deepspeed=zero4"], ["No DeepSpeed configuration 'zero4'"]),
        (["model.name_or_path=embedded:tiny-lama"], ["Did you mean 'tiny-llama'?"]),
        (["model.name_or_path=./absent"], ["model.name_or_path './absent' does not exist"]),
        (["data.format=clasification"], ["Did you mean 'classification'?"]),
        (["data.columns={txt: text}"], ["data.columns names the role 'txt'", "Did you mean 'text'?"]),
        (["data.labels=[no, yes]"], ["Label 'card arrival' is not among the labels: no, yes"]),
        (["data.max_tokens=8"], ["max_tokens"]),
        (["data.validation=40"], ["data.validation"]),
        (["data.test=absent.jsonl"], ["There is no file ", "absent.jsonl"]),
        (["data.source=embedded:banking78"], ["Did you mean 'banking77'?"]),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) and "=" in part[0] else "",
)  # fmt: skip
def test_a_mistake_in_the_recipe(more: list[str], said: list[str], refused: Outcome, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl")
    message = refused(*overrides(data, tmp_path / "run"), *more)
    for part in said:
        assert part in message
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl"}


def test_a_corrected_mistake_finds_the_folder_free(refused: Outcome, tmp_path: Path) -> None:
    """The same folder again with the right targets: nothing of the first attempt stands in the way."""
    settings = overrides(write_rows(tmp_path / "data.jsonl"), tmp_path / "run")
    refused(*settings, "adapter.targets=[q_prj]")
    assert main(["train", "--recipe", "tiny_cpu", "--dry-run", *settings, "adapter.targets=[q_proj]"]) == 0


def missing(data: Path) -> None:
    data.unlink()


def empty(data: Path) -> None:
    data.write_text("")


def other_columns(data: Path) -> None:
    data.write_text('{"question": "where is it", "intent": "lost card"}\n' * 20)


def not_json(data: Path) -> None:
    data.write_text(data.read_text() + '{"text": "cut o')


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (missing, ["There is no file ", "data.jsonl."]),
        (empty, ["data.jsonl holds no rows"]),
        (other_columns, ["There is no column 'text'; the columns are: question, intent.", "data.columns: {text: "]),
        (not_json, ["data.jsonl, line 41: not valid JSON"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("continued", [False, True], ids=["new", "continued"])
def test_wrong_data(
    damage: Callable[[Path], None], said: list[str], continued: bool, refused: Outcome, trained: Path, tmp_path: Path
) -> None:
    """In a new folder, and where the rows of a finished run have changed since."""
    data = trained / "data.jsonl"
    whole, run = data.read_bytes(), trained / "run" if continued else tmp_path / "run"
    before = contents(trained / "run")
    damage(data)
    try:
        message = refused(*overrides(data, run))
    finally:
        data.write_bytes(whole)
    for part in said:
        assert part in message
    assert contents(trained / "run") == before and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["output.resume=never"], ["output.resume is never, and ", "step-2 is there. Choose another output.dir"]),
        (["training.lr=0.5"], ["holds a run of another recipe (training.lr: 0.01 there, 0.5 here)"]),
        (["adapter.targets=[q_proj]"], ["holds a run of another recipe (adapter.targets: 'all-linear' there"]),
        (["training.global_batch=32", "model.quantization=nf4"],
         ["model.quantization: 'none' there, 'nf4' here; training.global_batch: 16 there, 32 here"]),
        (["training.deepspeed=zero9"], ["No DeepSpeed configuration 'zero9'"]),
    ],
)  # fmt: skip
def test_an_existing_run_is_not_touched(more: list[str], said: list[str], refused: Outcome, trained: Path) -> None:
    before = contents(trained / "run")
    message = refused(*overrides(trained / "data.jsonl", trained / "run"), *more)
    for part in said:
        assert part in message
    assert contents(trained / "run") == before


def resumed(trained: Path, *more: str) -> int:
    """Run the command of the finished run again: this is refused by what the checkpoint knows, after ranks started."""
    return train_in_process("tiny_cpu", *overrides(trained / "data.jsonl", trained / "run"), *more)


def test_rows_that_changed_since_the_checkpoint(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, before = trained / "data.jsonl", contents(trained / "run")
    whole = data.read_bytes()
    write_rows(data, 41)
    try:
        code = resumed(trained)
    finally:
        data.write_bytes(whole)
    message = capsys.readouterr().err
    assert code == 2 and "The training rows differ from those that" in message and "step-2 was trained on" in message
    assert contents(trained / "run") == before


def test_a_base_that_changed_since_the_checkpoint(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused, and the folder still knows the old base, so that a merge refuses the new one too."""
    weights, before = trained / "model" / "model.safetensors", contents(trained / "run")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        code = resumed(trained, "output.keep=7")
        message = capsys.readouterr().err
        assert code == 2 and "was trained on" in message and "Put that base back" in message
        merged = main(["merge", str(trained / "run"), "--out", str(tmp_path / "merged")])
        after = contents(trained / "run")
    finally:
        weights.write_bytes(whole)
        for name, content in before.items():
            (trained / "run" / name).write_bytes(content)
    assert merged == 2 and "Put that base back" in capsys.readouterr().err
    assert after == before and not (tmp_path / "merged").exists()


def test_checkpoints_of_nobody_are_not_touched(refused: Outcome, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step-3").mkdir(parents=True)
    message = refused(*overrides(write_rows(tmp_path / "data.jsonl"), tmp_path / "run"))
    assert "has checkpoints but no recipe.yaml" in message
    assert contents(tmp_path / "run") == {}


def test_a_batch_that_ranks_do_not_divide(refused: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = refused(*overrides(write_rows(tmp_path / "data.jsonl"), tmp_path / "run"))
    assert "training.global_batch 16 = micro_batch 4 x accumulation x 3 processes" in message
    assert "Use global_batch 12 or 24, or another micro_batch" in message
    assert not (tmp_path / "run").exists()


def test_a_merge_that_is_not_possible_is_said_before_training(refused: Outcome, tmp_path: Path) -> None:
    """A Mistral has no biases, so C and E have nowhere to go."""
    from transformers import AutoModelForCausalLM, MistralConfig

    from glora_llm.models.random_llama import byte_tokenizer

    small = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 260, "num_hidden_layers": 1}
    config = MistralConfig(**small, num_attention_heads=4, num_key_value_heads=2, head_dim=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mistral")
    byte_tokenizer(512).save_pretrained(tmp_path / "mistral")
    message = refused(
        *overrides(write_rows(tmp_path / "data.jsonl"), tmp_path / "run"),
        f"model.name_or_path={tmp_path / 'mistral'}", "merge.after_training=true",
    )  # fmt: skip
    assert "merge.after_training: This adapter cannot be merged: slots C and E give a bias to down_proj" in message
    assert not (tmp_path / "run").exists()


def test_a_dry_run_trains_and_writes_nothing(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(trained)
    for out in (tmp_path / "run", trained / "run"):
        settings: list[Any] = overrides(trained / "data.jsonl", out)
        assert main(["train", "--recipe", "tiny_cpu", "--dry-run", *settings]) == 0
        text = capsys.readouterr().out
        batch = "global batch 16 = micro batch 4 x accumulation 4 x processes 1; 2 steps"
        assert batch in text and "step 1/" not in text
    assert contents(trained) == before and list(tmp_path.iterdir()) == []
    assert not torch.distributed.is_initialized()


def test_a_misspelt_key_is_said_with_its_line(refused: Outcome, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = recipes.dump(recipes.load("tiny_cpu")).replace("  rank: 4", "  rnak: 4")
    file.write_text(text)
    line = text.splitlines().index("  rnak: 4") + 1
    message = refused(recipe=str(file))
    assert f"{file}, line {line}: unknown key 'adapter.rnak'. Did you mean 'rank'?" in message


def test_a_compiled_run_learns_what_the_run_as_it_is_learns(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    compile_module = torch.nn.Module.compile

    def trace(module: torch.nn.Module) -> None:
        """Everything of torch.compile but the code that it makes, which takes a minute."""
        compiled.append(type(module).__name__)
        compile_module(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", trace)
    train(recipes.load("tiny_cpu", [*overrides(trained / "data.jsonl", tmp_path / "run"), "model.compile=true"]))
    forget_launch()
    assert compiled == ["LlamaDecoderLayer"] * 2
    file = Path("run", "adapter", "adapter_model.safetensors")
    found, wanted = load_file(tmp_path / file), load_file(trained / file)
    assert found.keys() == wanted.keys() and found
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6, msg=name)
