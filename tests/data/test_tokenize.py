"""The mask, checked by decoding exactly the target tokens; one BOS; the end token; samples that are too long."""

from typing import Any

import numpy as np
import pytest

from glora_llm.data.formats import FORMATS
from glora_llm.data.report import Report
from glora_llm.data.sample import Sample
from glora_llm.data.tokenize import cut, ends_of, fit_length, tokenize
from glora_llm.errors import UserError
from tests.data.conftest import Settings, learnt

CHAT = {
    "messages": [
        {"role": "user", "content": "hello there"},
        {"role": "assistant", "content": "hello, how are you? ä 😀"},
        {"role": "user", "content": "  what is\n my balance?  "},
        {"role": "assistant", "content": "  a long text \n"},
    ]
}


def sample_of(row: dict[str, Any], tokenizer: Any, settings: Any) -> Sample:
    example = FORMATS.get(settings.format)(row, settings)
    (sample,) = tokenize([example], tokenizer, settings, Report("train"))
    assert not sample.targets[0]
    return sample


ANSWERS = [
    ("alpaca", {"instruction": "add", "input": "2, 3", "output": "5 ä 😀"}, "5 ä 😀"),
    ("alpaca", {"instruction": "add", "input": "", "output": "it is 5\n"}, "it is 5\n"),
    ("prompt_completion", {"prompt": "Question: who? ", "completion": "my  card"}, " my  card"),
    ("prompt_completion", {"prompt": "Q:\n", "completion": "\n x"}, "\n x"),
    ("classification", {"text": "what is my card balance?", "label": "card_arrival"}, " card arrival"),
    ("classification", {"text": "😀 é ", "label": "lost_card"}, " lost card"),
]


@pytest.mark.parametrize(("name", "row", "answer"), ANSWERS)
def test_exactly_the_answer_and_the_end_token_are_learnt(
    name: str, row: dict[str, Any], answer: str, bpe: Any, settings: Settings
) -> None:
    sample = sample_of(row, bpe, settings(format=name))
    assert learnt(sample, bpe) == f"{answer}<eos>"
    assert sample.tokens[-1] == bpe.eos_token_id and sample.targets[-1]
    whole = bpe.decode(sample.tokens.tolist(), clean_up_tokenization_spaces=False)
    assert whole.endswith(f"{answer}<eos>") and "<bos>" not in whole


@pytest.mark.parametrize(("name", "row", "answer"), ANSWERS)
def test_the_same_with_sentencepiece(
    name: str, row: dict[str, Any], answer: str, llama: Any, settings: Settings
) -> None:
    sample = sample_of(row, llama, settings(format=name))
    # The decoder drops the space that the first piece begins with.
    assert learnt(sample, llama) in (f"{answer}</s>", f"{answer.removeprefix(' ')}</s>")
    assert sample.tokens[0] == llama.bos_token_id and (sample.tokens == llama.bos_token_id).sum() == 1
    assert llama.decode(sample.tokens.tolist()[1:]).endswith(f"{answer}</s>")


def test_every_token_of_a_text_but_the_first_is_learnt(plain: Any, llama: Any, settings: Settings) -> None:
    row = {"text": "The quick brown fox"}
    without, with_bos = sample_of(row, plain, settings()), sample_of(row, llama, settings())
    assert without.targets[1:].all() and with_bos.targets[1:].all()
    assert learnt(with_bos, llama) == "The quick brown fox</s>"


def test_an_end_token_in_the_data_is_not_doubled(plain: Any, settings: Settings) -> None:
    sample = sample_of({"prompt": "a:", "completion": " b<eos>"}, plain, settings(format="prompt_completion"))
    assert learnt(sample, plain) == " b<eos>"


@pytest.mark.parametrize("policy", ["auto", "always", "never"])
@pytest.mark.parametrize("family", ["plain", "llama", "adds_bos"])
def test_one_bos_or_none(family: str, policy: str, request: pytest.FixtureRequest, settings: Settings) -> None:
    tokenizer = request.getfixturevalue(family)
    sample = sample_of({"text": "hello"}, tokenizer, settings(bos=policy))
    uses = policy == "always" or (policy == "auto" and family != "plain")
    assert (sample.tokens == tokenizer.bos_token_id).sum() == uses
    assert (sample.tokens[0] == tokenizer.bos_token_id) == uses


def test_a_bos_that_the_template_writes_is_not_doubled(adds_bos: Any, settings: Settings) -> None:
    import copy

    tokenizer = copy.deepcopy(adds_bos)
    tokenizer.chat_template = (
        "<bos>{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %} "
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    for policy, count in (("auto", 1), ("always", 1), ("never", 0)):
        sample = sample_of(CHAT, tokenizer, settings(format="chat", bos=policy))
        assert (sample.tokens == tokenizer.bos_token_id).sum() == count
        assert learnt(sample, tokenizer).endswith("  a long text \n<eos>")


def test_always_needs_a_bos_token(chatml: Any, settings: Settings) -> None:
    with pytest.raises(UserError, match="has no bos_token"):
        ends_of(chatml, settings(bos="always"))


def test_a_tokenizer_without_an_end_token(settings: Settings) -> None:
    from transformers import PreTrainedTokenizerFast

    from tests.data.conftest import byte_level

    with pytest.raises(UserError, match="no eos_token"):
        ends_of(PreTrainedTokenizerFast(tokenizer_object=byte_level([])), settings())


def test_chat_learns_the_turns_of_the_assistant_and_their_end(chatml: Any, settings: Settings) -> None:
    sample = sample_of(CHAT, chatml, settings(format="chat"))
    expected = "hello, how are you? ä 😀<|im_end|>  a long text \n<|im_end|>"
    assert learnt(sample, chatml) == expected
    last = np.flatnonzero(sample.targets)[-1]
    assert sample.tokens[last] == chatml.convert_tokens_to_ids("<|im_end|>") and last == len(sample.tokens) - 2


def test_system_message(chatml: Any, settings: Settings) -> None:
    sample = sample_of(CHAT, chatml, settings(format="chat", system="Be brief."))
    assert chatml.decode(sample.tokens).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    own = {"messages": [{"role": "system", "content": "Own."}, *CHAT["messages"]]}
    assert "Be brief" not in chatml.decode(sample_of(own, chatml, settings(format="chat", system="Be brief.")).tokens)


def test_other_formats_as_a_conversation(chatml: Any, settings: Settings) -> None:
    chosen = settings(format="classification", chat_template="tokenizer", system="Sort.")
    sample = sample_of({"text": "who?", "label": "lost_card"}, chatml, chosen)
    assert learnt(sample, chatml) == "lost card<|im_end|>"
    assert "<|im_start|>user\nwho?\nLabel:<|im_end|>" in chatml.decode(sample.tokens)


def test_chat_without_a_template(plain: Any, llama: Any, settings: Settings) -> None:
    chosen = settings(format="chat", chat_template="none")
    sample = sample_of(CHAT, plain, chosen)
    assert learnt(sample, plain) == " hello, how are you? ä 😀<eos>   a long text \n<eos>"
    assert plain.decode(sample.tokens).startswith("User: hello there\nAssistant: hello, how")
    sample = sample_of(CHAT, llama, chosen)
    assert sample.tokens[0] == llama.bos_token_id and sample.tokens[-1] == llama.eos_token_id
    with pytest.raises(UserError, match=r"no chat template: set data\.chat_template=none"):
        sample_of(CHAT, plain, settings(format="chat"))


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (
            "{% for m in messages %}{% if loop.last %}!{% endif %}{{ m.content }}<eos>{% endfor %}",
            "written|differently",
        ),
        ("{{ raise_exception('no way') }}", "refuses this conversation .*no way"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "instead of an end token"),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<eos>{% endif %}{% endfor %}",
            "no token to l",
        ),
    ],
    ids=["not prefix consistent", "refuses", "no end token", "drops the answers"],
)
def test_templates_that_cannot_be_used(template: str, told: str, plain: Any, settings: Settings) -> None:
    import copy

    tokenizer = copy.deepcopy(plain)
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=told):
        sample_of(CHAT, tokenizer, settings(format="chat"))


def test_samples_without_a_target(chatml: Any, settings: Settings) -> None:
    with pytest.raises(UserError, match=r"No turn of the assistant .*hello there"):
        sample_of({"messages": CHAT["messages"][:1]}, chatml, settings(format="chat"))
    with pytest.raises(UserError, match="begins with the assistant"):
        sample_of({"messages": CHAT["messages"][1:]}, chatml, settings(format="chat"))


def test_a_token_that_holds_prompt_and_answer_is_counted_and_not_learnt(plain: Any, settings: Settings) -> None:
    chosen = settings(format="prompt_completion")
    example = FORMATS.get("prompt_completion")({"prompt": "bal", "completion": "ance card"}, chosen)
    report = Report("train")
    (sample,) = tokenize([example], plain, chosen, report)
    assert report.boundary_tokens == 1 and learnt(sample, plain) == " card<eos>"


def lines(*lengths: int) -> list[Sample]:
    """Samples of these lengths whose second half is learnt."""
    return [Sample(np.arange(n, dtype=np.int32), np.arange(n) >= n // 2) for n in lengths]


def test_overlong_error_says_how_many_how_long_and_what_to_do(settings: Settings) -> None:
    with pytest.raises(UserError, match=r"2 of 3 train samples are longer than data.max_tokens=8; .* 20 .*overlong"):
        fit_length(lines(8, 9, 20), settings(max_tokens=8), None, Report("train"))


def test_overlong_drop(settings: Settings) -> None:
    report = Report("train")
    kept = fit_length(lines(8, 9, 20), settings(max_tokens=8, overlong="drop"), None, report)
    assert ([len(s.tokens) for s in kept], report.dropped, report.longest) == ([8], 2, 20)
    with pytest.raises(UserError, match="No train sample is left"):
        fit_length(lines(9, 20), settings(max_tokens=8, overlong="drop"), None, Report("train"))


def test_overlong_truncate_drops_what_lost_all_targets(settings: Settings) -> None:
    report = Report("train")
    kept = fit_length(lines(8, 9, 20), settings(max_tokens=8, overlong="truncate"), None, report)
    assert [s.tokens.tolist() for s in kept] == [list(range(8))] * 2
    assert (report.truncated, report.dropped) == (1, 1)
    assert all(s.targets.any() for s in kept)


@pytest.mark.parametrize("bos", [None, 99])
@pytest.mark.parametrize("length", [9, 15, 16, 22, 23])
def test_overlong_split_learns_every_token_once(length: int, bos: int | None) -> None:
    tokens = np.arange(length, dtype=np.int32)
    pieces = cut(Sample(tokens, np.arange(length) > 0), 8, bos)
    assert all(2 <= len(piece.tokens) <= 8 and not piece.targets[0] for piece in pieces)
    assert np.concatenate([piece.tokens[piece.targets] for piece in pieces]).tolist() == list(range(1, length))
    firsts = [int(piece.tokens[0]) for piece in pieces]
    assert firsts == [0, *([bos] * (len(pieces) - 1) if bos else range(7, length - 1, 7))]


def test_overlong_split_of_a_text(llama: Any, settings: Settings) -> None:
    chosen = settings(max_tokens=12, overlong="split")
    whole = sample_of({"text": "The quick brown fox jumps over the lazy dog. " * 5}, llama, chosen)
    report = Report("train")
    pieces = fit_length([whole], chosen, llama.bos_token_id, report)
    assert report.split == 1 and len(pieces) > 3
    assert all(p.tokens[0] == llama.bos_token_id for p in pieces) and pieces[-1].tokens[-1] == llama.eos_token_id
