"""The dense twin of equal bytes: the solver against counting modules, and what is refused."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, ViTConfig

from glora_llm import recipe as recipes
from glora_llm.cli import main
from glora_llm.errors import UserError
from glora_llm.models.load import meta_model
from glora_llm.plan.subjects import subject_here
from glora_llm.plan.twin import Shape, count, find_twin

LLAMA = LlamaConfig(
    hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
    vocab_size=500, tie_word_embeddings=True,
)  # fmt: skip
GPT2 = GPT2Config(n_embd=64, n_layer=3, n_head=4, n_positions=32, vocab_size=300)
VIT = ViTConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=8, patch_size=4,
    architectures=["ViTForImageClassification"], num_labels=3,
)  # fmt: skip


@pytest.mark.parametrize("by", ["width", "depth"])
@pytest.mark.parametrize("config", [LLAMA, GPT2, VIT], ids=lambda config: config.model_type)
def test_a_twin_is_as_near_as_one_step_of_its_feed_forward_size(config: object, by: str) -> None:
    wanted = int(0.45 * count(config))
    twin = find_twin(config, wanted, by, multiple=2)
    made = twin.shape.put_into(config)
    assert twin.parameters == count(made)
    shapes = [Shape(**{**vars(twin.shape), "feed_forward": twin.shape.feed_forward + more}) for more in (-2, 2)]
    others = [count(shape.put_into(config)) for shape in shapes]
    assert others[0] < twin.parameters < others[1]
    assert all(abs(twin.parameters - wanted) <= abs(other - wanted) for other in others)
    kept = "hidden" if by == "depth" else "layers"
    assert getattr(twin.shape, kept) == getattr(Shape.of(config), kept)


def test_heads_divide_and_keep_their_grouping_and_the_module_computes() -> None:
    config = find_twin(LLAMA, count(LLAMA) // 3, multiple=8).shape.put_into(LLAMA)
    assert config.hidden_size == config.num_attention_heads * config.head_dim and config.head_dim == 12
    assert config.num_attention_heads == 4 * config.num_key_value_heads
    model = AutoModelForCausalLM.from_config(config)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 500)
    assert sum(parameter.numel() for parameter in model.parameters()) == count(config)


def test_a_model_is_its_own_twin() -> None:
    assert find_twin(LLAMA, count(LLAMA)).settings == {}


@pytest.mark.parametrize("by", ["width", "depth"])
def test_a_size_that_nothing_meets_names_the_nearest(by: str) -> None:
    with pytest.raises(UserError, match=r"has 300 parameters \(1,200 bytes\). The nearest has [\d,]+ \(") as told:
        find_twin(LLAMA, 300, by)
    nearest = int(str(told.value).partition("nearest has ")[2].partition(" ")[0].replace(",", ""))
    assert find_twin(LLAMA, nearest, by).parameters == nearest  # what is offered can be had


@pytest.mark.parametrize("pair", [("vlora_lm", "dense_lm_small"), ("vlora_lm_tiny", "dense_lm_small_tiny"),
                                  ("vlora_1b", "dense_1b_small")])  # fmt: skip
def test_the_recipes_are_of_equal_size(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GLORA_CACHE", str(tmp_path))
    found = []
    for name in pair:
        recipe = recipes.load(name)
        folder, _ = subject_here(recipe, 1, "the data are not asked for")
        found.append(sum(parameter.numel() for parameter in meta_model(recipe.model, folder).parameters()))
    assert found[1] == pytest.approx(found[0], rel=2e-3)
    first, second = (recipes.flat(recipes.load(name)) for name in pair)
    differ = {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)}
    assert all(key.startswith(("model.config", "vlora.", "output.dir")) for key in differ)


def test_the_command_prints_what_to_type(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GLORA_CACHE", str(tmp_path))
    assert main(["vlora", "twin", "vlora_lm"]) == 0
    said = capsys.readouterr().out
    words = said.splitlines()[-1].split()[4:]
    assert words[0] == "vlora=null"
    typed = recipes.load("vlora_lm", words)
    given = AutoConfig.for_model(**{**(typed.model.config or {}), "vocab_size": 16000})
    assert f"dense twin by width          {count(given):>14,} parameters" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["dense_lm"], "dense_lm is dense, so it is its own twin"),
        (["quickstart"], "quickstart starts from embedded:smollm2-135m-instruct"),
        (["vlora_lm", "--bytes", "0"], "--bytes is '0'; expected a whole number above 0."),
        (["vlora_lm", "--multiple", "x"], "--multiple is 'x'; expected a whole number above 0."),
        (["vlora_llm"], "No recipe 'vlora_llm'"),
    ],
)
def test_refused(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vlora", "twin", *words]) == 2
    assert says in capsys.readouterr().err
