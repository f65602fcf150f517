"""A batch whose rows go through different adapters (`adapter_names`): as PEFT's LoRA does it, and refuses it."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from tests.glora.conftest import IDS, logits
from tests.glora.peft_behaviour.conftest import TUNERS, Two, config, said

NAMES = ["first", "other", "__base__"]


def alone(model: Any) -> Tensor:
    """Return rows 0, 1, 2 computed with adapter a, adapter b and the base, each alone."""
    rows = []
    for row, name in enumerate(("first", "other")):
        model.set_adapter(name)
        rows.append(logits(model)[row])
    with model.disable_adapter():
        rows.append(logits(model)[2])
    assert not torch.allclose(rows[0], rows[1], atol=1e-2)
    return torch.stack(rows)


@pytest.mark.parametrize("tuner", TUNERS)
def test_every_row_gets_its_own_copy_of_a_saved_module(tuner: str, two: Two) -> None:
    model = two(tuner, modules_to_save=["lm_head"])
    heads = model.get_base_model().lm_head.modules_to_save
    assert not torch.allclose(heads["first"].weight, heads["other"].weight, atol=1e-2)
    expected = alone(model)
    for active in ("first", "other"):
        model.set_adapter(active)
        torch.testing.assert_close(logits(model, adapter_names=NAMES), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tuner", TUNERS)
def test_disabled_adapters_win(tuner: str, two: Two) -> None:
    model = two(tuner, modules_to_save=["lm_head"])
    with model.disable_adapter():
        base = logits(model)
        assert torch.equal(logits(model, adapter_names=NAMES), base)
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model, adapter_names=NAMES), base)
    model.base_model.enable_adapter_layers()
    assert not torch.allclose(logits(model, adapter_names=NAMES), base, atol=1e-2)


@pytest.mark.parametrize("tuner", TUNERS)
def test_beam_search_repeats_the_names(tuner: str, two: Two) -> None:
    model = two(tuner)
    keys = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        mixed = model.generate(input_ids=IDS, adapter_names=NAMES, **keys)
        rows = []
        for row, name in enumerate(("first", "other")):
            model.set_adapter(name)
            rows.append(model.generate(input_ids=IDS, **keys)[row])
        with model.disable_adapter():
            rows.append(model.generate(input_ids=IDS, **keys)[2])
    assert torch.equal(mixed, torch.stack(rows))
    assert len({tuple(row[6:].tolist()) for row in rows}) > 1
    layer = next(module for module in model.modules() if hasattr(module, "base_layer"))
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize("tuner", TUNERS)
def test_beam_search_of_an_encoder_decoder(tuner: str) -> None:
    """The encoder sees every row once: it gets the names as they were given."""
    from peft import get_peft_model

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4, "vocab_size": 32}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, initializer_factor=3.0)).eval()
    keys = {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "v"]}
    model: Any = get_peft_model(base, config(tuner, **keys), adapter_name="first")
    model.add_adapter("other", config(tuner, **keys))
    model.eval()
    generate = {"num_beams": 3, "max_new_tokens": 5, "eos_token_id": None}
    with torch.no_grad():
        mixed = model.generate(input_ids=IDS, adapter_names=NAMES, **generate)
        model.set_adapter("other")
        assert torch.equal(mixed[1], model.generate(input_ids=IDS, **generate)[1])


def refusals(model: Any) -> list[tuple[type[BaseException], str]]:
    def mixed(names: Any) -> Any:
        return lambda: logits(model, adapter_names=names)

    found = [said(mixed(["first"])), said(mixed(["first", "nobody", "no one"]))]
    found.append(said(lambda: model.generate(input_ids=IDS, num_beams=2, adapter_names=np.array(NAMES))))
    model.merge_adapter(["first"])
    found += [said(mixed(NAMES)), said(mixed(["first"]))]
    model.unmerge_adapter()
    model.train()
    found.append(said(mixed(NAMES)))
    return found


def test_refusals_are_those_of_lora(two: Two) -> None:
    expected = refusals(two("lora"))
    assert refusals(two("glora")) == expected
    assert "please call `unmerge_adapter` first" in expected[3][1]
