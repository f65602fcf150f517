"""The tokens that may follow each prefix of a label word, as a tree and as a table for a row of targets."""

from glora_llm.data.label_trie import NO_TOKEN, LabelTrie

WORDS = [[5, 6, 1], [5, 7, 1], [8, 1], [8, 9, 1], [8, 9, 4, 1], [30, 1]]


def test_the_trie_knows_what_may_follow() -> None:
    assert LabelTrie.build([*WORDS, WORDS[0]]).next_tokens == {
        (): [5, 8, 30], (5,): [6, 7], (5, 6): [1], (5, 7): [1],
        (8,): [1, 9], (8, 9): [1, 4], (8, 9, 4): [1], (30,): [1],
    }  # fmt: skip


def test_choices_are_as_wide_as_the_widest_and_none_where_no_word_goes_on() -> None:
    trie = LabelTrie.build(WORDS)
    assert trie.choices([8, 9, 4, 1]).tolist() == [[5, 8, 30], [1, 9, 1], [1, 4, 1], [1, 1, 1]]
    assert trie.choices([5, 2, 1]).tolist() == [[5, 8, 30], [6, 7, 6], [NO_TOKEN] * 3]
