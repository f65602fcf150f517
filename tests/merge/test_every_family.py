"""`glora-llm merge` of a run on the families that are built small: plain transformers loads what was trained.

LLaMA and Qwen2 are in test_families.py. `tests/glora/test_merged_families.py` does the same in a script, by
`merge_and_unload`.
"""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from glora_llm.cli.main import main
from glora_llm.models.resolve import ResolvedModel
from tests.glora.test_merged_families import KNOWN, SLOTS, small
from tests.merge.conftest import Train, logits

BIAS = "This adapter cannot be merged: slots C and E give a bias to "


@pytest.mark.parametrize("family", [family for family in KNOWN if family not in ("llama", "qwen2")])
def test_the_command_merges_it_or_names_what_it_cannot_hold(
    family: str, tiny: ResolvedModel, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small(family, vocab_size=260, max_position_embeddings=512, n_positions=512)
    assert model is not None
    base, out = tmp_path / "base", tmp_path / "out"
    model.save_pretrained(base)
    for file in tiny.folder.glob("token*"):
        shutil.copy(file, base)
    options = ["--out", str(out), "--dtype", "float32"]
    if family == "glm":  # of those that cannot hold the biases of C and E; their tests are all alike
        trained = train(model={"name_or_path": str(base)}, slots=SLOTS)
        assert main(["merge", str(trained.folder.path), *options]) == 2
        assert BIAS in capsys.readouterr().err and not out.exists()
    trained = train(model={"name_or_path": str(base)}, slots=SLOTS if KNOWN[family] else {"A": "lora", "B": "lora"})
    assert main(["merge", str(trained.folder.path), *options]) == 0
    again, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = trained.logits()
    torch.testing.assert_close(logits(again.eval()), expected, rtol=1e-4, atol=2e-4)
    assert (logits(model.eval()) - expected).abs().max() > 1e-3
