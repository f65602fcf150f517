"""`--for` and `--without`: what a server would drop is refused with its measured cost, or left out on request."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, pipeline

from glora_llm.adapters.inject import adapted_layers
from glora_llm.cli import main
from glora_llm.errors import UserError
from glora_llm.evaluation.trained import load_adapted
from glora_llm.merge.targets import TARGETS, is_served
from glora_llm.models.load import load_base, meta_model
from tests.glora.test_merged_families import SIZES, small
from tests.merge.conftest import ALL_MODES, CPU, Train, Trained, logits

MLP = {"gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def default(train: Train) -> Trained:
    """A run with the default slots, whose C and E matter."""
    return train(slots=ALL_MODES)


@pytest.fixture(scope="module")
def gentle(train: Train) -> Trained:
    """The same, trained so little that leaving C and E out is cheap."""
    return train(std=0.001, slots=ALL_MODES)


def merge(trained: Trained, out: Path, *options: str) -> int:
    return main(["merge", str(trained.folder.path), "--out", str(out), "--dtype", "float32", *options])


def report_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "merge_report.json").read_text())
    return found


def without(trained: Trained, slots: set[str], kinds: set[str] | None = None) -> torch.Tensor:
    """The logits of the unmerged model whose layers have lost some slots, by hand."""
    model = load_adapted(trained.plan, trained.folder.adapter)
    for name, layer in adapted_layers(model).items():
        if kinds is None or name.rpartition(".")[2] in kinds:
            for slot in slots:
                layer.path["default"] = layer.path["default"].without(slot)
    return logits(model)


@pytest.mark.parametrize("target", ["transformers", "vllm"])
def test_a_llama_is_written_whole(target: str, default: Trained, tmp_path: Path) -> None:
    assert merge(default, tmp_path / "out", "--for", target) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(model), default.logits(), rtol=1e-4, atol=2e-4)
    assert "without" not in report_of(tmp_path / "out")
    write = pipeline("text-generation", model=str(tmp_path / "out"), device="cpu")
    (said,) = write("What is 7?", max_new_tokens=8, do_sample=False)
    assert said["generated_text"].startswith("What is 7?") and len(said["generated_text"]) > len("What is 7?")


def test_what_sglang_drops_is_refused_with_its_cost(
    default: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge(default, tmp_path / "out", "--for", "sglang") == 2
    said = capsys.readouterr().err
    assert "sglang gives down_proj, gate_proj, up_proj of a llama model no bias" in said
    assert "sgl-project/sglang 0.5.23, python/sglang/srt/models/llama.py" in said
    assert "slots C and E of 6 of 14 layers would be dropped" in said
    assert "add --without C,E. To train so that it fits: adapter.paths='{down_proj|gate_proj|up_proj: " in said
    assert "{A: lora, B: lora}}'" in said and not list(tmp_path.iterdir())
    before, after = (float(word) for word in said.split("the loss from ")[1].split(" nats")[0].split(" to "))
    assert merge(default, tmp_path / "out", "--for", "sglang", "--without", "C,E", "--max-loss-change", "9") == 0
    cost = report_of(tmp_path / "out")["without"]
    assert (cost["loss_before"], cost["loss_after"]) == (
        pytest.approx(before, abs=1e-4),
        pytest.approx(after, abs=1e-4),
    )
    assert abs(after - before) > 0.01, "else nothing was measured"
    assert cost["top1_agreement"] < 1 and len(cost["left_out"]) == 6


def test_what_the_message_says_to_train_fits(
    default: Trained, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge(default, tmp_path / "out", "--for", "sglang", "--no-compare") == 2
    said = capsys.readouterr().err
    assert "What leaving them out costs was not measured" in said
    paths = yaml.safe_load(said.split("adapter.paths='")[1].split("'")[0])
    again = train(slots=ALL_MODES, paths=paths)
    assert merge(again, tmp_path / "out", "--for", "sglang", "--no-compare") == 0
    assert "sglang serves all slots of this adapter." in capsys.readouterr().out


def test_left_out_where_the_target_drops_them_alone(default: Trained, tmp_path: Path) -> None:
    assert merge(default, tmp_path / "out", "--for", "sglang", "--without", "C,E", "--max-loss-change", "9") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.config.attention_bias is True and model.config.mlp_bias is False
    expected = without(default, {"C", "E"}, MLP)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=2e-4)
    assert (expected - default.logits()).abs().max() > 0.05
    assert report_of(tmp_path / "out")["max_abs_logit_diff"] < 1e-3, "compared with the adapter that was written"


def test_left_out_everywhere(gentle: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert merge(gentle, tmp_path / "out", "--without", "C,E") == 0
    assert "left out: slots C and E of 14 layers, which changes the loss from " in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert not any(name.endswith("proj.bias") for name, _ in model.named_parameters())
    torch.testing.assert_close(logits(model), without(gentle, {"C", "E"}), rtol=1e-4, atol=2e-4)


def test_what_costs_more_than_its_bound_is_not_written(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bound is the recipe's, or one that is named; less loss is no cost."""
    trained = train(slots={"A": "lora", "E": "vector"}, data={"validation": 8}, merge={"max_loss_change": 1e-6})
    codes = {slot: merge(trained, tmp_path / slot, "--without", slot) for slot in "AE"}
    assert 1 in codes.values(), "one of the two lowers the loss by chance: the seeds decide"
    bad = next(slot for slot, code in codes.items() if code == 1)
    said = capsys.readouterr().err
    assert f"Without slot {bad} of 14 layers the loss rises by" in said and "merge.max_loss_change 1e-06" in said
    assert not (tmp_path / bad).exists() and not (tmp_path / f"{bad}.failed").exists()
    assert merge(trained, tmp_path / bad, "--without", bad, "--max-loss-change", "9") == 0


def test_a_family_without_the_biases_is_written_without_them(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], families: dict[str, str]
) -> None:
    trained = train(std=0.001, model={"name_or_path": families["qwen2"]}, slots=ALL_MODES)
    assert merge(trained, tmp_path / "out", "--for", "transformers") == 2
    said = capsys.readouterr().err
    assert "transformers gives down_proj, gate_proj, o_proj, up_proj of a qwen2 model no bias" in said
    assert "found by building one of its layers" in said and "the loss from" in said
    assert merge(trained, tmp_path / "out", "--for", "transformers", "--without", "C,E") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = without(trained, {"C", "E"}, MLP | {"o_proj"})
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=2e-4)


WRONG = [
    (["--for", "nobody"], "invalid choice: 'nobody'"),
    (["--for", "vllm", "--to", "lora"], "--for vllm writes a whole model, and --to lora an adapter"),
    (["--for", "llama.cpp", "--quantize", "nf4"], "nf4 is a format of bitsandbytes"),
    (["--without", "D"], "--without D: this adapter has no slot D; it has slots A, B, C and E."),
    (["--without", "F"], "--without F: expected slots among A, B, C, D, E"),
    (["--without", "A,B,C,E"], "nothing of the adapter is left"),
    (["--without", "C", "--both"], "--both writes two adapters"),
    (["--max-loss-change", "1"], "no slots are left out"),
    (["--for", "sglang", "--without", "C"], "slots C and E of 6 of 14 layers would be dropped"),
]


@pytest.mark.parametrize(("options", "said"), WRONG, ids=[" ".join(options) for options, _ in WRONG])
def test_wrong_options(
    options: list[str], said: str, default: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["merge", str(default.folder.path), "--out", str(tmp_path / "out"), *options]
    try:
        code = main(arguments)
    except SystemExit as end:  # of argparse
        code = end.code  # type: ignore[assignment]
    assert code == 2 and said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_family_that_the_target_has_not(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], families: dict[str, str]
) -> None:
    trained = train(model={"name_or_path": families["gptj"]}, slots={"B": "lora"}, targets=["q_proj"])
    assert merge(trained, tmp_path / "out", "--for", "sglang") == 2
    assert "--for sglang has no rule for a gptj model; it has: cohere" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of small models with the byte tokenizer."""
    from glora_llm.models.random_llama import byte_tokenizer

    made = {}
    for family in ("qwen2", "gptj"):
        folder = tmp_path_factory.mktemp(family)
        model = small(family, vocab_size=260, max_position_embeddings=512, n_positions=512)
        assert model is not None
        model.save_pretrained(folder)
        byte_tokenizer(512).save_pretrained(folder)
        made[family] = str(folder)
    return made


def test_every_rule_names_linears_that_transformers_has() -> None:
    """A rule about a linear that is not there would say nothing: names are checked on small models."""
    seen = 0
    for target, rules in TARGETS.items():
        for family, rule in (rules.families or {}).items():
            model = small(family)
            assert model is not None, family
            kinds = {
                name.rpartition(".")[2] for name, module in model.named_modules() if "Linear" in type(module).__name__
            }
            assert rule.biases is None or rule.biases <= kinds, (target, family)
            served = {kind for kind in kinds - {"lm_head", "embed_out"} if is_served(target, model.config, kind)}
            assert rule.biases is None or served <= rule.biases
            seen += 1
    assert seen > 30


def test_an_export_says_which_servers_take_it(
    gentle: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["merge", str(gentle.folder.path), "--to", "lora"]
    assert main([*run, "--out", str(tmp_path / "whole")]) == 0
    said = capsys.readouterr().out
    assert "vllm does not take the biases" in said and "sglang does not take the biases" in said
    assert main([*run, "--out", str(tmp_path / "two"), "--without", "C,E", "--both"]) == 0
    said = capsys.readouterr().out
    assert "sglang takes it" in said and "--max-lora-rank 8" in said
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"whole", "without_C_E"}
    for name, expected in (("whole", gentle.logits()), ("without_C_E", without(gentle, {"C", "E"}))):
        base = load_base(gentle.plan.recipe.model, gentle.plan.base.folder, CPU)
        found = logits(PeftModel.from_pretrained(base, str(tmp_path / "two" / name)).eval())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)
    assert "without" in report_of(tmp_path / "two" / "without_C_E")


def test_a_base_whose_own_biases_are_dropped_is_refused(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from glora_llm.models.random_llama import byte_tokenizer

    sizes = {key: size for key, size in SIZES.items() if key in LlamaConfig().to_dict()} | {"vocab_size": 260}
    LlamaForCausalLM(LlamaConfig(**sizes | {"max_position_embeddings": 512}, mlp_bias=True)).save_pretrained(
        tmp_path / "base"
    )
    byte_tokenizer(512).save_pretrained(tmp_path / "base")
    trained = train(model={"name_or_path": str(tmp_path / "base")}, slots={"B": "lora"})
    assert merge(trained, tmp_path / "out", "--for", "sglang") == 2
    assert "the base itself has biases on down_proj, gate_proj, up_proj, which sglang drops" in capsys.readouterr().err
    assert meta_model(trained.plan.recipe.model, trained.plan.base.folder).config.mlp_bias is True


def test_an_unknown_target_in_a_script(default: Trained, tmp_path: Path) -> None:
    from glora_llm.merge.command import merge_run

    with pytest.raises(UserError, match=r"--for vlm: there is transformers, vllm, .* Did you mean 'vllm'"):
        merge_run(default.folder.path, tmp_path / "out", target="vlm")


def test_without_b_four_bits_lose_nothing(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """B alone keeps these slots from `nf4_lossless`; the report has what leaving it out costs."""
    slots = {"A": "block", "B": "lora", "C": "vector", "E": "vector"}
    trained = train(std=0.01, rank=1, slots=slots, model={"quantization": "nf4"})
    run = ["merge", str(trained.folder.path), "--out", str(tmp_path / "out"), "--quantize", "nf4_lossless"]
    assert main(run) == 2 and "B lora" in capsys.readouterr().err
    assert main([*run, "--without", "B", "--max-loss-change", "5"]) == 0
    report = report_of(tmp_path / "out")
    assert report["lossless"]["codes_changed"] == 0 < report["lossless"]["codes"]
    assert len(report["without"]["left_out"]) == 14 and "latency" in report
