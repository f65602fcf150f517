"""scripts/peft_suite.py: what it makes of outcomes, and which of PEFT's cases become GLoRA's. It is not run here."""

from typing import Any

import pytest
from peft import GloraConfig, LoraConfig

from glora_llm.glora import GLoRAConfig
from scripts.peft_suite import report
from scripts.peft_tests.cases import CUSTOM, converted, is_ours

LISTED = {
    "case": "tests/test_config.py::TestPeftConfig::test_save_pretrained_with_runtime_config[GLoRAConfig]",
    "message": "AttributeError: 'GLoRAConfig' object has no attribute 'runtime_config'",
}


@pytest.mark.parametrize(
    ("results", "code", "said"),
    [
        ([LISTED | {"outcome": "failed"}], 0, "expected, 1: the test leaves out"),
        ([LISTED | {"outcome": "passed"}], 0, "expected to fail, passed: test_config"),
        ([LISTED | {"outcome": "failed", "message": "another"}], 1, "NOT EXPECTED: tests/test_config.py"),
        (
            [{"case": "tests/test_x.py::test_y", "outcome": "failed", "message": "z"}],
            1,
            "NOT EXPECTED: tests/test_x.py",
        ),
        ([{"case": "tests/test_x.py::test_y", "outcome": "passed", "message": ""}], 0, "1 passed     0 failed"),
        ([], 1, "0 cases"),
    ],
)
def test_what_was_not_expected_fails(
    results: list[dict[str, str]], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(results, 60.0, partial=False) == code
    assert said in capsys.readouterr().out


def test_cases_of_peft_s_glora_become_ours() -> None:
    language: list[Any] = [(LoraConfig, {"r": 2}), (GloraConfig, {"task_type": "CAUSAL_LM", "target_modules": None})]
    found = converted("config_cls,config_kwargs", language, "test_decoder_models")
    assert found and len(found) == 4 and all(map(is_ours, found))
    rows = converted("test_name, model_id, config_cls, config_kwargs", [("x", "MLP", GloraConfig, {})], "test")
    assert rows is not None and [row[0] for row in rows] == list(CUSTOM)
    [pair] = converted("name, config", [("x", GloraConfig(target_modules=["lin0"], r=3))], "test") or []
    assert isinstance(pair[1], GLoRAConfig) and pair[1].rank == 3 and list(pair[1].target_modules or ()) == ["lin0"]
    assert converted("config_cls,config_kwargs", [(LoraConfig, {})], "test_lora_variants") is None
    assert not is_ours(LoraConfig) and not is_ours([1, "x"])
