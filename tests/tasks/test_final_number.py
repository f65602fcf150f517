"""The final number of a solution, in the forms that GSM8K, MetaMathQA and the arithmetic sets write it."""

import pytest

from glora_llm.errors import UserError
from glora_llm.tasks.final_number import final_number, require_answers, same_answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = <<3+4=7>>7 apples.\n#### 7", 7),
        ("#### 1,234", 1234),
        ("#### -5", -5),
        ("#### $72.50", 72.5),
        ("It costs $1,000,000.", 1000000),
        ("The answer is: 16", 16),
        ("The answer is 16. That is 4 squared, as 4 * 4.", 16),
        ("so $4^2 = \\boxed{16}$.The answer is: \\frac{1}{2}", 1),  # LaTeX is not read: the first number behind
        ("The answer is 20/14", 20 / 14),
        ("The answer is: 50%", 50),
        ("7-4=3", 3),
        ("from 7-4", 4),
        ("it is \u22125 degrees", -5),
        ("8.0", 8),
        ("about .5 of it", 0.5),
        ("#### 3\n#### 4", 4),
        ("#### nothing, though 12 before", 12),
        ("no number", None),
        ("1/0", None),
        ("", None),
        ("1, 2, 3", 3),
        ("12,34", 34),
    ],
)
def test_final_number(text: str, number: float | None) -> None:
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("reference", "generated", "same"),
    [
        ("15.0", "10 + 5 = 15 in all.", True),
        ("She pays.\n#### 1,500", "The answer is $1500", True),
        ("0.5714285714285714", "The answer is 20/35", True),
        ("72", "", False),
        ("72", "no idea", False),
        ("72", "It is 72 and then 73", False),
        ("D", "The difference is $1.23. The answer is (D).", True),
        ("D", "The answer is (A).", False),
        ("(B)", "A is wrong, so B", True),
        ("D", "none", False),
    ],
)
def test_same_answer(reference: str, generated: str, same: bool) -> None:
    assert same_answer(reference, generated) is same


def test_references_without_a_number_are_listed() -> None:
    require_answers("test", ["1", "A"])
    with pytest.raises(UserError) as caught:
        require_answers("test", ["1", "none", *["word"] * 20])
    assert "21 of 22 test answers hold no number; the first 10:\n  'none'\n  'word'" in str(caught.value)
    assert str(caught.value).count("\n  '") == 10
