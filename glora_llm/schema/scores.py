"""Every score that a task reports: which way is better, and what it is. Names are without `validation/` or `test/`."""

from dataclasses import dataclass

from glora_llm.errors import UserError, nearest


@dataclass(frozen=True)
class Score:
    """A score of a split.

    Args:
        higher: True where more is better.
        meaning: what it is, and its unit.
    """

    higher: bool
    meaning: str


SCORES: dict[str, Score] = {
    "loss": Score(
        False, "mean cross entropy of the label tokens or classes, nats; of a regression the mean squared error"
    ),
    "perplexity": Score(False, "exp(loss)"),
    "bits_per_byte": Score(
        False, "loss of running text in bits for each UTF-8 byte of the raw text: tokenizers compare by it"
    ),
    "token_accuracy": Score(True, "share of label tokens that are the most likely ones"),
    "exact_match": Score(True, "share of samples whose label tokens are all the most likely ones"),
    "label_accuracy": Score(True, "share of samples whose label word is the most likely of the label words"),
    "accuracy": Score(True, "share of samples whose class or option is right"),
    "f1": Score(True, "F1 of class 1 where there are two classes, else the mean of the classes' F1 (macro)"),
    "matthews_correlation": Score(True, "Matthews correlation of classes, -1 to 1"),
    "pearson": Score(True, "Pearson correlation of numbers, -1 to 1"),
    "spearman": Score(True, "Spearman rank correlation of numbers, -1 to 1"),
    "mean_squared_error": Score(False, "mean squared error of numbers"),
    "accuracy_norm": Score(
        True, "share of samples whose right option has the highest log-likelihood a character (lm-eval's acc_norm)"
    ),
    "number_match": Score(True, "share of generated answers whose final number (or letter) is the reference's"),
    "top5_accuracy": Score(True, "share of images whose class is among the five most likely"),
}


def score_of(name: str) -> Score:
    """Return the score of a name; of one of several test sets, the name may stand before it (`sketch/accuracy`).

    Raises:
        UserError: for a name that no task reports.
    """
    name = name.rpartition("/")[2]
    if name not in SCORES:
        raise UserError(f"'{name}' is no score.{nearest(name, SCORES)} There is: {', '.join(SCORES)}.")
    return SCORES[name]
