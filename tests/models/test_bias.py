import pytest
from transformers import (
    AutoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from glora_llm.errors import UserError
from glora_llm.models.bias import bias_support, bias_switch
from glora_llm.models.resolve import ResolvedModel

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 64}
SMALL = {**TINY, "num_key_value_heads": 2}
QKV, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("family", "qkv", "o", "mlp"),
    [
        (LlamaConfig, "switch", "switch", "switch"),
        (MistralConfig, "never", "never", "never"),
        (Qwen2Config, "has", "never", "never"),
        (Qwen3Config, "switch", "switch", "never"),
    ],
)
def test_families(family: type[PretrainedConfig], qkv: str, o: str, mlp: str) -> None:
    config = family(**SMALL, num_hidden_layers=3)
    before = config.to_dict()
    assert {suffix: bias_support(config, suffix) for suffix in (*QKV, "o_proj", *MLP)} == {
        **dict.fromkeys(QKV, qkv),
        "o_proj": o,
        **dict.fromkeys(MLP, mlp),
    }
    assert config.to_dict() == before


def test_the_answer_is_about_the_family_and_not_this_configuration() -> None:
    config = LlamaConfig(**SMALL, attention_bias=True)
    assert bias_support(config, "q_proj") == "switch"


def test_switches() -> None:
    config = LlamaConfig(**SMALL)
    assert (bias_switch(config, "o_proj"), bias_switch(config, "up_proj")) == ("attention_bias", "mlp_bias")
    assert bias_switch(Qwen2Config(**SMALL), "q_proj") is None


def test_a_family_with_other_names() -> None:
    config = GPTNeoXConfig(**TINY)
    assert bias_support(config, "query_key_value") == "switch"
    assert bias_support(config, "dense_h_to_4h") == "has"


def test_a_family_whose_kinds_of_layers_follow_from_their_number() -> None:
    config = MambaConfig(hidden_size=32, vocab_size=64, state_size=4, num_hidden_layers=3)
    found = {suffix: bias_support(config, suffix) for suffix in ("in_proj", "x_proj", "dt_proj")}
    assert found == {"in_proj": "switch", "x_proj": "never", "dt_proj": "has"}


def test_unknown_linear() -> None:
    with pytest.raises(UserError, match=r"'llama' has no linear 'c_attn'; there is: down_proj"):
        bias_support(LlamaConfig(**SMALL), "c_attn")


def test_works_from_a_folder(tiny: ResolvedModel) -> None:
    assert bias_support(AutoConfig.from_pretrained(tiny.folder), "v_proj") == "switch"
