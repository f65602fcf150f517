"""What the table of methods says: on a quantised base a method computes what it computes on a dense base of the same
values; it trains language models, those with a head, and image classifiers.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from glora_llm.adapters.inject import inject
from glora_llm.adapters.methods import METHODS, check_quantised
from glora_llm.errors import UserError
from glora_llm.evaluation.trained import _unpack
from glora_llm.models.embedded import embedded_folder
from glora_llm.models.load import load_base
from glora_llm.schema import AdapterSection, ModelSection
from tests.in_process import one_thread  # noqa: F401 - a fixture
from tests.run.methods_walk import NEEDED

TRAINED = {name: method for name, method in METHODS.items() if name != "adapter_fusion"}  # of adapters: test_fusion
IDS = torch.arange(24).reshape(2, 12)
CPU = torch.device("cpu")
OF_TEXT = [name for name, method in TRAINED.items() if "text" in method.kinds]


def section(name: str) -> AdapterSection:
    return AdapterSection(method=name, peft=NEEDED.get(name))


def trained(name: str, quantization: Any, unpacked: bool) -> tuple[Tensor, Tensor]:
    """Return logits and gradients of a method whose parameters have moved by seeded values."""
    base = load_base(ModelSection(name_or_path="-", quantization=quantization, dtype="float32"), base_folder(), CPU)
    if unpacked:
        _unpack(base, torch.float32)
    model = inject(base, section(name), seed=0, steps=10).eval()
    generator = torch.Generator().manual_seed(1)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    return out.logits.detach(), torch.cat([p.grad.flatten() for p in trainable if p.grad is not None])


def base_folder() -> Any:
    return embedded_folder("tiny-llama")


@pytest.mark.parametrize("name", [name for name in OF_TEXT if "nf4" in METHODS[name].quantised])
def test_four_bits(name: str) -> None:
    logits, gradients = trained(name, "nf4", unpacked=False)
    wanted, wanted_gradients = trained(name, "nf4", unpacked=True)
    assert wanted.isfinite().all() and wanted_gradients.abs().max() > 0
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients, wanted_gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in OF_TEXT if "int8" in METHODS[name].quantised])
def test_int8(name: str) -> None:
    """Its linears round their inputs to 8 bits: logits and gradients differ by that."""
    logits, gradients = trained(name, "int8", unpacked=False)
    wanted, wanted_gradients = trained(name, "int8", unpacked=True)
    assert (logits - wanted).norm() < 0.1 * wanted.norm()
    assert (gradients - wanted_gradients).norm() < 0.5 * wanted_gradients.norm()


@pytest.mark.parametrize("name", [name for name, method in TRAINED.items() if "nf4" not in method.quantised])
def test_what_does_not_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"adapter.method {name} does not train on a base in nf4"):
        check_quantised(section(name), "nf4")
    check_quantised(section(name), "none")


@pytest.mark.parametrize("name", TRAINED)
def test_classifiers_train(name: str) -> None:
    """Every trained parameter of a head on a LLaMA, and of a ViT, gets a gradient."""
    from transformers import LlamaConfig, LlamaForSequenceClassification, ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    torch.manual_seed(0)
    vit = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=3, **sizes))
    llama = LlamaForSequenceClassification(LlamaConfig(vocab_size=32, num_labels=3, pad_token_id=0, **sizes))
    inputs: dict[str, tuple[Any, dict[str, Tensor]]] = {
        "images": (vit, {"pixel_values": torch.randn(2, 3, 16, 16)}),
        "classification": (llama, {"input_ids": IDS}),
    }
    for kind, (base, given) in inputs.items():
        if kind not in METHODS[name].kinds:
            with pytest.raises(UserError, match=f"adapter.method {name} puts"):
                inject(base, section(name), seed=0, steps=10)
            continue
        model = inject(base, section(name), seed=0, steps=10)
        model(**given, labels=torch.tensor([0, 1])).loss.backward()
        without = [
            key for key, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
        ]
        assert not without, (type(base), without[:3])
