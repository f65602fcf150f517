"""Tasks: options and answers of multiple choice, texts that are generated."""

from tests.bad_input.case import Case, bad, file
from tests.bad_input.data_cases import rows

CHOICE = "data.format=multiple_choice"


def choice(**keys: object) -> dict[str, object]:
    """Return a record with two options and the right one's letter, some keys changed."""
    return {"question": "q", "options": ["a", "b"], "answer": "A", **keys}


CHOICES: dict[str, Case] = {
    "options without an answer": bad("options and no answer: None", CHOICE, change=rows(choice(answer=None))),
    "an answer that is none of the options": bad(
        "Answer 'C' is none of: a, b", CHOICE, change=rows(choice(answer="C"))
    ),
    "one option": bad("needs two options or more, and there is: ['a']", CHOICE, change=rows(choice(options=["a"]))),
    "an empty option": bad("Option 2 should be a text, and is ''", CHOICE, change=rows(choice(options=["a", ""]))),
    "options in a text": bad("a list of texts, or {text: [...],", CHOICE, change=rows(choice(options="a, b"))),
    "an answer that may be two options": bad(
        "the text of one option and the number or letter of",
        CHOICE,
        change=rows(choice(options=["1", "0"], answer="1")),
    ),
    "options of another format": bad("data.options does not go with format prompt_completion", "data.options=[a, b]"),
    "a column of options alone": bad("data.options names 1 column", CHOICE, "data.options=[a]", change=rows(choice())),
    "a column of options that is not there": bad(
        "There is no column 'b'", CHOICE, "data.options=[answer, b]", change=rows(choice())
    ),
    "options in columns of a CSV": bad(
        "",
        CHOICE,
        "data.source=rows.csv",
        "data.options=[one, two]",
        change=file("rows.csv", "question,one,two,answer\n" + "".join(f"q{n},a,b,B\n" for n in range(20))),
    ),
}

SHORT = "evaluation.generate={max_new_tokens: 8}"
ANSWERS: dict[str, Case] = {
    "answers to label words": bad(
        "data.format is classification: label words are scored", SHORT, "data.test=4", "data.format=classification",
        "data.columns={text: prompt, label: completion}",
    ),
    "answers to running text": bad(
        "evaluation.generate answers prompts, and data.format is text:", SHORT, "data.test=4", "data.format=text",
        "data.columns={text: prompt}",
    ),
    "answers without test rows": bad("evaluation.generate answers test prompts: set data.test", SHORT),
    "answers longer than the context": bad(
        "evaluation.generate.max_new_tokens 5000 leaves no room", "evaluation.generate={max_new_tokens: 5000}",
        "data.test=4", change=rows(*({"prompt": f"p{n}", "completion": f" {n}"} for n in range(20)), times=1),
    ),
    "answers without a number": bad(
        "4 of 4 test answers hold no number; the first 4:", SHORT, "data.test=4",
        change=rows(*({"prompt": f"p{n}", "completion": " word"} for n in range(14)), times=1),
    ),
    "an answer of no tokens": bad(
        "evaluation.generate.max_new_tokens: got 0 (integer), expected", "evaluation.generate={max_new_tokens: 0}"
    ),
    "answers that are not scored": bad("", "evaluation.generate={max_new_tokens: 8, score: none}", "data.test=4"),
}  # fmt: skip
