"""Class labels and conversations."""

from tests.bad_input.case import Case, Change, bad, file

CLASSES = ("data.format=classification", "data.prompt={text}", "data.labels=[no, yes]", "data.validation=2")


def label(value: str) -> Change:
    good = '{"text": "a", "label": 1}\n' * 20
    return file("rows.jsonl", good + f'{{"text": "b", "label": {value}}}\n')


def turn(value: str) -> Change:
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 20
    return file("rows.jsonl", good + f'{{"messages": {value}}}\n')


LABELS: dict[str, Case] = {
    f"label {name}": bad(says, *CLASSES, change=label(value))
    for name, (says, value) in {
        "NaN": ("data.prompt: got {'text': None} (mapping), expected text. Put quotes", "NaN"),
        "Infinity": ("data.prompt: got {'text': None} (mapping), expected text. Put quotes", "Infinity"),
        "1e400": ("data.prompt: got {'text': None} (mapping), expected text. Put quotes", "1e400"),
        "1.5": ("data.prompt: got {'text': None} (mapping), expected text. Put quotes", "1.5"),
        "null": ("data.prompt: got {'text': None} (mapping), expected text. Put quotes", "null"),
        "a list": ("data.prompt: got {'text': None} (mapping), expected text. Put quotes", "[1]"),
        "²": ("data.prompt: got {'text': None} (mapping), expected text. Put quotes", '"²"'),
        "in Arabic digits": ("data.prompt: got {'text': None} (mapping), expected text. Put quotes", '"١"'),
        "an unknown word": ("data.prompt: got {'text': None} (mapping), expected text. Put quotes", '"maybe"'),
        "out of range": ("data.prompt: got {'text': None} (mapping), expected text. Put quotes", "7"),
        "-1": ("data.prompt: got {'text': None} (mapping), expected text. Put quotes", "-1"),
        "of 5,000 digits": ("data.prompt: got {'text': None} (mapping), expected text. Put quotes", "9" * 5000),
        "blank": ("data.prompt: got {'text': None} (mapping), expected text. Put quotes", '" "'),
    }.items()
} | {
    "a label word twice": bad(
        "data.prompt: got {'text': None} (mapping), expected text. Put quotes",
        *CLASSES[:2],
        "data.labels=[a, a]",
        change=label("1"),
    )
}
CHATS: dict[str, Case] = {
    f"a chat's {name}": bad(says, "data.format=chat", change=turn(value))
    for name, (says, value) in {
        "role a list": (
            "Unknown role \"['user']\" in a turn; there is: human, user, gpt,",
            '[{"role": ["user"], "content": "a"}, {"role": "assistant", "content": "b"}]',
        ),
        "role a mapping": (
            "Unknown role \"{'a': 1}\" in a turn; there is: human, user, gpt,",
            '[{"role": {"a": 1}, "content": "a"}, {"role": "assistant", "content": "b"}]',
        ),
        "role null": (
            "Unknown role 'None' in a turn; there is: human, user, gpt, assistant,",
            '[{"role": null, "content": "a"}, {"role": "assistant", "content": "b"}]',
        ),
        "role unknown": (
            "Unknown role 'usr' in a turn; there is: human, user, gpt, assistant,",
            '[{"role": "usr", "content": "a"}, {"role": "assistant", "content": "b"}]',
        ),
        "content a number": (
            "The content of a turn should be text, and the user's is (a int): 5",
            '[{"role": "user", "content": 5}, {"role": "assistant", "content": "b"}]',
        ),
        "content null": (
            "The content of a turn should be text, and the user's is (null): None",
            '[{"role": "user", "content": null}, {"role": "assistant", "content": "b"}]',
        ),
        "content half a surrogate": (
            "character 1 is half of a surrogate pair",
            '[{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "b"}]',
        ),
        "content pictures": (
            "parts that are no text, such as images",
            '[{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "b"}]',
        ),
        "turns a text": ("A conversation should be a list of turns, and is: hello", '"hello"'),
        "turns none": ("A conversation should be a list of turns, and is: []", "[]"),
        "turn a text": ("A turn should be {role, content} (OpenAI) or {from, value} (ShareGPT),", '["hello"]'),
        "turn without content": (
            "A turn should be {role, content} (OpenAI) or {from, value} (ShareGPT),",
            '[{"role": "user"}]',
        ),
        "turns without an assistant": (
            "No turn of the assistant is to be learnt (user): [{'role': 'user',",
            '[{"role": "user", "content": "a"}]',
        ),
    }.items()
}
