"""Benchmarks by name, scores, and heads for classes and numbers."""

from tests.bad_input.case import Case, bad, file
from tests.bad_input.data_cases import rows

HEAD = ("task=classification", "data.format=classification", "data.prompt='{text}.'", "data.labels=[no, yes]")
PAIR = file("rows.jsonl", "".join(f'{{"text": "t{n}", "label": {n % 2}}}\n' for n in range(20)))

HEADS: dict[str, Case] = {
    "an unknown benchmark": bad("'sst-2' is no benchmark. Did you mean 'sst2'?", "data.benchmark=sst-2"),
    "a benchmark's split of a file": bad(
        "data.test: 'validation' is no file, and no split either: data.source is the file rows.jsonl",
        "data={benchmark: sst2, source: rows.jsonl, validation: 2, max_tokens: 64}",
    ),
    "a benchmark on other columns": bad(
        "There is no column 'sentence'",
        "data={benchmark: sst2, source: rows.jsonl, validation: 2, test: 2, max_tokens: 64}",
    ),
    "an unknown task": bad("task: got 'clasification' (text), expected 'auto',", "task=clasification"),
    "a head of another format": bad(
        "learns the column `label` of data.format classification or", "task=classification"
    ),
    "an unknown score": bad("'f2' is no score. Did you mean 'f1'?", "evaluation.metrics=[f2]"),
    "a score that the task has not": bad(
        "'f1', which format prompt_completion does not have", "evaluation.metrics=[f1]"
    ),
    "a score of numbers for classes": bad(
        "'pearson', which a head of classification does not have", *HEAD, "evaluation.metrics=[pearson]", change=PAIR
    ),
    "F1 of label words that share tokens": bad(
        "do not all differ at one token: choose words in data.labels",
        *HEAD[1:3],
        "data.labels=[a b, a c, d]",
        "evaluation.metrics=[f1]",
        change=file("rows.jsonl", "".join(f'{{"text": "t{n}", "label": {n % 3}}}\n' for n in range(20))),
    ),
    "a class that has no word": bad(
        "Class number 7 has no word: data.labels has numbers 0 to 1", *HEAD, change=rows({"text": "a", "label": 7})
    ),
    "a number that is none": bad(
        "The label of a regression should be a number, and is 'much'",
        "data.format=regression",
        change=rows({"text": "a", "label": "much"}),
    ),
    "a number that is not finite": bad(
        "The label of a regression should be a number, and is nan",
        "data.format=regression",
        change=file("rows.jsonl", '{"text": "a", "label": NaN}\n' * 20),
    ),
    "a head on packed rows": bad("reads one sample a row, and data.packing", *HEAD, "data.packing=true", change=PAIR),
    "a head that writes": bad(
        "writes no text, which evaluation.generate", *HEAD, "evaluation.generate={}", change=PAIR
    ),
    "a head and a text": bad(
        "is the loss of a language model on a text, and this is a head",
        *HEAD,
        "evaluation.forgetting=embedded:tinyshakespeare",
        change=PAIR,
    ),
    "a head on a conversation": bad(
        "answers a prompt, not a conversation", *HEAD, "data.chat_template=tokenizer", change=PAIR
    ),
    "a head on a new model": bad(
        "task classification puts a head on a model that is there, and model.config",
        *HEAD,
        "model={config: {model_type: llama}, tokenizer: train:300}",
        change=PAIR,
    ),
}
