"""What an imported adapter computes equals, in float64, what the package that trained it computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import GloraConfig, HiraConfig, IA3Config, LoraConfig
from safetensors.torch import save_file

from glora_llm.models.resolve import ResolvedModel
from tests.foreign.conftest import Save, imported, load, logits, seed_values

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}
LORA = {
    "plain": {"r": 3, "lora_alpha": 5},
    "rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True},
    "patterns": {
        "r": 3,
        "lora_alpha": 5,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 4},
        "alpha_pattern": {"down_proj": 7},
    },
    "bias": {"r": 2, "lora_alpha": 4, "lora_bias": True},  # scale 2: E = 2 b is a float32 again
    "gaussian start, dropout": {"r": 2, "lora_alpha": 3, "lora_dropout": 0.5, "init_lora_weights": "gaussian"},
    "head": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "lm_head"]},
}
GLORA = [
    {"config_A_B": "lora", "config_C": "lora", "config_D_E": "constant"},
    {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
    {"config_A_B": "constant", "config_C": "none", "config_D_E": "none"},
    {"config_A_B": "none", "config_C": "lora", "config_D_E": "vector"},
    {"config_A_B": "lora", "config_C": "none", "config_D_E": "none"},
]


def require_same(found: Any, expected: torch.Tensor, base: Path) -> None:
    assert not torch.allclose(logits(load(base)), expected, atol=1e-3)  # the adapter does something
    torch.testing.assert_close(logits(found), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("keys", LORA.values(), ids=LORA)
def test_lora(keys: dict[str, Any], biased: Path, peft_folder: Save, tmp_path: Path) -> None:
    theirs, expected = peft_folder(biased, LoraConfig(**TASK, **{"target_modules": ALL, **keys}))
    require_same(imported(theirs, tmp_path / "own"), expected, biased)


def test_hira(biased: Path, peft_folder: Save, tmp_path: Path) -> None:
    config = HiraConfig(**TASK, target_modules=ALL, r=3, rank_pattern={"up_proj": 2}, hira_dropout=0.1)
    theirs, expected = peft_folder(biased, config)
    require_same(imported(theirs, tmp_path / "own"), expected, biased)


@pytest.mark.parametrize("kind", ["biases", "no biases"])
def test_ia3_on_outputs_and_on_feed_forward_inputs(
    kind: str, biased: Path, tiny: ResolvedModel, peft_folder: Save, tmp_path: Path
) -> None:
    """Gains between 0.5 and 2 lose nothing when 1 is taken off: the difference of two such floats is a float."""
    base = biased if kind == "biases" else tiny.folder
    config = IA3Config(**TASK, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    theirs, expected = peft_folder(base, config, around=1.0)
    require_same(imported(theirs, tmp_path / "own"), expected, base)


@pytest.mark.parametrize("keys", GLORA, ids=lambda keys: "-".join(keys.values()))
@pytest.mark.parametrize("kind", ["biases", "no biases"])
def test_glora_of_peft(
    keys: dict[str, str], kind: str, biased: Path, tiny: ResolvedModel, peft_folder: Save, tmp_path: Path
) -> None:
    if kind == "no biases" and keys["config_A_B"] == "none":
        pytest.skip("nothing is trained there")
    base = biased if kind == "biases" else tiny.folder
    theirs, expected = peft_folder(base, GloraConfig(**TASK, target_modules=ALL, r=3, **keys))
    require_same(imported(theirs, tmp_path / "own"), expected, base)


@pytest.mark.parametrize("keys", [{"bypass_mode": True}, {"use_scalar": True}, {"linear_alpha": 3}], ids=str)
def test_glora_of_lycoris(keys: dict[str, Any], biased: Path, tmp_path: Path) -> None:
    from lycoris import LycorisNetwork, create_lycoris

    LycorisNetwork.apply_preset({"target_module": ["LlamaDecoderLayer"]})
    model = load(biased)
    network = create_lycoris(
        model, 1.0, **{"linear_dim": 2, "linear_alpha": 1, "algo": "glora", "preset": "full", **keys}
    )
    network.apply_to()
    seed_values(network, lambda name: not name.endswith("scalar"))
    for name, parameter in network.named_parameters():
        if name.endswith("scalar"):
            torch.nn.init.constant_(parameter, 0.5)  # it is saved as part of a2 and b2
    network.double().eval()
    expected = logits(model)
    tensors = {name: value.float().contiguous() for name, value in network.state_dict().items()}
    save_file(tensors, tmp_path / "net.safetensors")
    own = imported(tmp_path / "net.safetensors", tmp_path / "own", "--base", str(biased))
    require_same(own, expected, biased)
