"""The data sets that the field trains and scores on, by the name that `data.benchmark` takes.

One entry each. It fills the keys of the section `data` that a recipe leaves out; the names of scores are those of
`schema/scores.py`.
"""

from typing import Any

from glora_llm.errors import UserError, nearest
from glora_llm.schema.benchmark import Benchmark, Kind
from glora_llm.schema.image_benchmarks import IMAGE_BENCHMARKS


def _glue(subset: str, title: str, paper: str, *metrics: str, **more: Any) -> Benchmark:
    """Return one of GLUE's tasks: a tenth of the training rows is held out for choices, the validation split judges."""
    given: dict[str, Any] = {"kind": "classification", "format": "classification", "validation": 0.1}
    given |= {"test": "validation"} | more
    return Benchmark(title=title, source="nyu-mll/glue", subset=subset, metrics=metrics, paper=paper, **given)


def _choice(title: str, source: str, paper: str, *metrics: str, **more: Any) -> Benchmark:
    """Return a task of multiple choice; where test labels are withheld, the validation split judges."""
    given: dict[str, Any] = {
        "validation": 0.1,
        "test": "validation",
        "metrics": metrics or ("accuracy", "accuracy_norm"),
    }
    kind: Kind = "multiple_choice"
    return Benchmark(kind=kind, format="multiple_choice", title=title, source=source, paper=paper, **(given | more))


def _arc(subset: str, title: str) -> Benchmark:
    given = {"validation": "validation", "test": "test", "columns": {"options": "choices", "answer": "answerKey"}}
    return _choice(title, "allenai/ai2_arc", "arXiv 1803.05457", subset=subset, prompt=QUESTION, **given)


QUESTION = "Question: {question}\nAnswer:"
PAIR = "Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
MNLI: dict[str, Any] = {
    "prompt": "{premise}\nQuestion: {hypothesis} True, False or Neither?\nAnswer:",
    "labels": ("True", "Neither", "False"),
    "validation": 2000,
}
ENTAILMENT = "{sentence1}\nQuestion: {sentence2} Yes or no?\nAnswer:"

BENCHMARKS: dict[str, Benchmark] = {
    # GLUE (Wang et al. 2018, arXiv 1804.07461)
    "cola": _glue(
        "cola",
        "is a sentence acceptable English",
        "arXiv 1805.12471",
        "matthews_correlation",
        "accuracy",
        prompt="Sentence: {sentence}\nAcceptable:",
        labels=("no", "yes"),
    ),
    "sst2": _glue(
        "sst2",
        "mood of a sentence from a film review",
        "https://aclanthology.org/D13-1170",
        "accuracy",
        prompt="Review: {sentence}\nSentiment:",
        labels=("negative", "positive"),
        validation=1000,
    ),
    "mrpc": _glue(
        "mrpc",
        "do two sentences from the news say the same",
        "https://aclanthology.org/I05-5002",
        "f1",
        "accuracy",
        prompt=PAIR + "Same meaning:",
        labels=("no", "yes"),
    ),
    "qqp": _glue(
        "qqp",
        "do two questions on Quora ask the same",
        "arXiv 1804.07461",
        "f1",
        "accuracy",
        prompt="Question 1: {question1}\nQuestion 2: {question2}\nSame question:",
        labels=("no", "yes"),
        validation=2000,
    ),
    "stsb": _glue(
        "stsb",
        "how alike two sentences are, 0 to 5",
        "arXiv 1708.00055",
        "pearson",
        "spearman",
        kind="regression",
        format="regression",
        prompt=PAIR + "Similarity:",
    ),
    "mnli": _glue(
        "mnli",
        "does a premise entail a hypothesis; test rows of the same genres",
        "arXiv 1704.05426",
        "accuracy",
        test="validation_matched",
        **MNLI,
    ),
    "mnli_mismatched": _glue(
        "mnli",
        "does a premise entail a hypothesis; test rows of other genres",
        "arXiv 1704.05426",
        "accuracy",
        test="validation_mismatched",
        **MNLI,
    ),
    "qnli": _glue(
        "qnli",
        "does a sentence answer a question",
        "arXiv 1606.05250",
        "accuracy",
        prompt="Question: {question}\nSentence: {sentence}\nAnswered:",
        labels=("yes", "no"),
        validation=2000,
    ),
    "rte": _glue(
        "rte",
        "does a text entail a sentence",
        "arXiv 1804.07461",
        "accuracy",
        prompt=ENTAILMENT,
        labels=("yes", "no"),
    ),
    "wnli": _glue(
        "wnli",
        "to what does a pronoun refer",
        "https://cdn.aaai.org/ocs/4492/4492-21843-1-PB.pdf",
        "accuracy",
        prompt=ENTAILMENT,
        labels=("no", "yes"),
    ),
    # other classification
    "banking77": Benchmark(
        kind="classification",
        title="which of 77 intents a question to a bank has",
        format="classification",
        source="embedded:banking77",
        metrics=("label_accuracy",),
        paper="arXiv 2003.04807",
        validation=0.05,
        test="test",
        prompt="Question: {text}\nIntent:",
    ),
    # multiple choice by likelihood; prompts are those of lm-eval's tasks
    "arc_easy": _arc("ARC-Easy", "questions of science at school, the easier ones"),
    "arc_challenge": _arc("ARC-Challenge", "questions of science at school, the harder ones"),
    "openbookqa": _choice(
        "questions of science that need a fact and common sense",
        "allenai/openbookqa",
        "arXiv 1809.02789",
        subset="main",
        test="test",
        validation="validation",
        columns={"options": "choices", "answer": "answerKey"},
        prompt="{question_stem}",
    ),
    "piqa": _choice(
        "which of two ways reaches a goal in the physical world",
        "baber/piqa",
        "arXiv 1911.11641",
        columns={"answer": "label"},
        prompt="Question: {goal}\nAnswer:",
        more={"options": ["sol1", "sol2"]},
    ),
    "siqa": _choice(
        "what people do, feel and mean",
        "lighteval/siqa",
        "arXiv 1904.09728",
        "accuracy",
        columns={"answer": "label"},
        prompt="Q: {context} {question}\nA:",
        labels=("1", "2", "3"),
        more={"options": ["answerA", "answerB", "answerC"]},
    ),
    "winogrande": _choice(
        "to which of two nouns a sentence refers; scored by what follows the blank",
        "allenai/winogrande",
        "arXiv 1907.10641",
        "accuracy",
        subset="winogrande_xl",
        columns={"blank": "sentence"},
        labels=("1", "2"),
        more={"options": ["option1", "option2"]},
    ),
    "hellaswag": _choice(
        "which ending of a story makes sense",
        "Rowan/hellaswag",
        "arXiv 1905.07830",
        "accuracy_norm",
        "accuracy",
        columns={"options": "endings", "answer": "label"},
        prompt="{activity_label}: {ctx}",
    ),
    "boolq": Benchmark(
        kind="classification",
        title="yes or no to a question on a passage",
        format="classification",
        source="google/boolq",
        metrics=("accuracy",),
        paper="arXiv 1905.10044",
        validation=0.1,
        test="validation",
        columns={"label": "answer"},
        prompt="{passage}\nQuestion: {question}?\nAnswer:",
        labels=("no", "yes"),
    ),
    **IMAGE_BENCHMARKS,
    # worked solutions, scored by their final number (evaluation.generate)
    "gsm8k": Benchmark(
        kind="number_answer",
        title="problems of arithmetic at school, with worked solutions",
        format="prompt_completion",
        source="openai/gsm8k",
        subset="main",
        metrics=("number_match", "loss"),
        paper="arXiv 2110.14168",
        validation=200,
        test="test",
        columns={"completion": "answer"},
        prompt="Question: {question}\nAnswer: ",
    ),
    "metamathqa": Benchmark(
        kind="number_answer",
        title="395,000 rewritten problems with solutions; judged by GSM8K's test problems",
        format="prompt_completion",
        source="meta-math/MetaMathQA",
        metrics=("number_match", "loss"),
        paper="arXiv 2309.12284",
        validation=200,
        test="openai/gsm8k:main:test",
        columns={"query": "query|question", "completion": "response|answer"},
        prompt="Question: {query} Think step by step.\nAnswer:",
    ),
    # instructions
    "alpaca": Benchmark(
        kind="instruction",
        title="52,000 instructions and answers of a language model, cleaned",
        format="alpaca",
        source="yahma/alpaca-cleaned",
        metrics=("loss",),
        paper="https://github.com/tatsu-lab/stanford_alpaca",
        validation=0.02,
    ),
    "sharegpt": Benchmark(
        kind="instruction",
        title="conversations of several turns that users shared",
        format="chat",
        source="anon8231489123/ShareGPT_Vicuna_unfiltered",
        metrics=("loss",),
        paper="https://lmsys.org/blog/2023-03-30-vicuna",
        validation=0.02,
        columns={"conversations": "conversations"},
    ),
}


def benchmark_of(name: str) -> Benchmark:
    """Return the benchmark of a name.

    Raises:
        UserError: for a name that is not in the table.
    """
    if name not in BENCHMARKS:
        raise UserError(
            f"'{name}' is no benchmark.{nearest(name, BENCHMARKS)} There is: {', '.join(BENCHMARKS)}. Data of your own "
            "need none: leave data.benchmark out, and set data.format and data.source."
        )
    return BENCHMARKS[name]
