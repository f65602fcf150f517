"""What cannot be trained as a whole, or shared, ends with exit code 2 and one message before anything is written."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.run.test_train import refused  # noqa: F401 - a fixture
from tests.run.whole_model.conftest import overrides

Refused = Callable[..., str]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["vlora.layers_per_compound=3"], "layers_per_compound is 3, which does not divide 4 layers. Sizes"),
        (["vlora.gains={qproj: [row]}"], "gains names 'qproj', which is not shared; shared: self_attn.q_proj"),
        (["vlora.gains=[rows]"], "vlora.gains"),
        (["vlora.layers_per_compound={q_proj: 2}"], "layers_per_compound has 0 entries for the linear 'self_attn.k_"),
        (["vlora.increments=all", "vlora.base_gradient=first"], "base_gradient is 'first', and with increments 'all'"),
        (["vlora.lr_factors={bases: 2}"], "vlora.lr_factors"),
        (["training.optimizer=moun"], "training.optimizer: got 'moun'"),
        (["training.optimizer=muon", "training.deepspeed=zero2_offload"], "keeps the optimizer's states on the CPU"),
        (["model.config=null", "model.tokenizer=null", "model.name_or_path=embedded:tiny-llama", "vlora=null",
          "adapter.method=lora", "training.optimizer=muon"], "muon steps the matrices of a model that is trained as a"),
        (["vlora.rank=33"], "rank is 33 for 'self_attn.q_proj', whose smaller side is 32"),
        (["vlora.targets=[q_prj]"], "No layer has a linear 'q_prj'"),
        (["vlora.rank={q_proj: 4}"], "rank has 0 entries for the linear"),
        (["vlora.topology=ring"], "vlora.topology: got 'ring'"),
        (["vlora.rnak=4"], "unknown key 'vlora.rnak'. Did you mean 'rank'?"),
        (["adapter.method=glora"], "model.config makes a model of random weights, and adapter.method glora"),
        (["model.config=null", "model.tokenizer=null", "model.name_or_path=embedded:tiny-llama"],
         "The section vlora is for a new model (model.config)"),
        (["model.config=null", "model.tokenizer=null", "model.name_or_path=embedded:tiny-llama", "adapter.method=lora"],
         "The section vlora shares the weights of a model that is trained as a whole, and adapter.method is lora"),
        (["model.config=null", "model.tokenizer=null", "model.name_or_path=embedded:tiny-llama", "vlora=null",
          "model.quantization=nf4"], "adapter.method full trains the weights, which model.quantization nf4 freezes"),
        (["model.name_or_path=embedded:tiny-llama"], "give exactly one of name_or_path"),
        (["model.config=null", "model.tokenizer=null"], "give exactly one of name_or_path"),
        (["model.quantization=nf4"], "quantization is nf4, and config makes a new model"),
        (["model.tokenizer=null"], "model.config needs model.tokenizer"),
        (["model.tokenizer=train:many"], "model.tokenizer 'train:many' gives no size"),
        (["model.tokenizer=train:99"], "A vocabulary of 99 is too small"),
        (["model.tokenizer=absent"], "there is no folder or file 'absent'"),
        (["model.config.vocab_size=300"], "has 400 pieces, and model.config.vocab_size is 300"),
        (["model.config.model_type=lama"], "model_type 'lama' is no family of models"),
        (["model.config={hidden_size: 4}"], "config needs model_type, such as llama"),
        (["model.config.hidden_sizes=4"], "a llama has no such setting. Did you mean 'hidden_size'?"),
        (["adapter.modules_to_save=[lm_head]"], "method full trains the whole model"),
        (["model.dtype=bfloat16", "training.deepspeed=zero0"], "adapter.method full in bfloat16 needs float32 masters"),
        (["output.resume=must"], "output.resume is must"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)  # fmt: skip
def test_a_mistake_in_the_recipe(more: list[str], said: str, refused: Refused, tmp_path: Path) -> None:  # noqa: F811
    assert said in refused(*overrides(tmp_path / "run"), *more, recipe="vlora_lm_tiny")
    assert not (tmp_path / "run").exists()
