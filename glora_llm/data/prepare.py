"""From the data section of a recipe to token sets, once for each content of the data, recipe and tokenizer."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from glora_llm.data.bad_rows import BadRows, require_usable
from glora_llm.data.cache import cached, key_of
from glora_llm.data.columns import check_columns
from glora_llm.data.formats import Example, check_settings
from glora_llm.data.label_trie import label_sequences
from glora_llm.data.label_words import readable
from glora_llm.data.option_samples import tokenize_options
from glora_llm.data.pack import pack
from glora_llm.data.preview import preview
from glora_llm.data.prompts import tokenize_prompts
from glora_llm.data.report import Report
from glora_llm.data.sample import Sample
from glora_llm.data.sources import Role, Sources, commits_of, locate, locate_roles
from glora_llm.data.splits import Split, make_splits, require_known_classes, to_split
from glora_llm.data.store import TokenSet, write_set
from glora_llm.data.tokenize import ends_of, fill_rows, fit_length, tokenize
from glora_llm.errors import UserError
from glora_llm.schema import DataSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREVIEWS = 3
# What plays a part only after there is a tokenizer.
AFTER_TEXT = {"revisions", "max_tokens", "packing", "bos", "chat_template", "max_test_rows"}


@dataclass(frozen=True)
class Prepared:
    """The prepared token sets of a run.

    Attributes:
        tests: the test sets by role: `test`, or `test/NAME` of several.
        reports: by role: what was read, kept, dropped, and so on.
        previews: three training samples as text, shortened, with the targets between « and ».
        classes: classification: the label words, by class number; else none.
        label_sequences: classification by label words: the token sequences of all of them that occur, each with its end
            token; else none.
        label_classes: the class number of each sequence.
        folder: where the arrays lie.
        commits: hub data set -> commit that was loaded.
    """

    train: TokenSet
    validation: TokenSet | None
    tests: dict[str, TokenSet]
    reports: dict[str, Report]
    previews: list[str]
    classes: list[str] | None
    label_sequences: list[list[int]] | None
    label_classes: list[int] | None
    folder: Path
    commits: dict[str, str] = field(default_factory=dict)

    @property
    def test(self) -> TokenSet | None:
        """The test set, the first one of several."""
        return next(iter(self.tests.values()), None)


def prepare(
    settings: DataSection, tokenizer: "PreTrainedTokenizerBase", cache: Path, seed: int, head: bool = False
) -> Prepared:
    """Return the token sets of a recipe, from the cache if they were made before.

    Every process may call this, before torch.distributed starts: one process works, the others wait.

    Args:
        tokenizer: a fast tokenizer of transformers.
        cache: folder of prepared data; a subfolder is made for each combination of settings, content and tokenizer.
        seed: of the choice of held-out rows, data.max_rows and data.max_test_rows.
        head: samples are prompts alone, which a head answers: no token is learnt.

    Raises:
        UserError: for settings that do not fit together, and data that do not fit the settings.
    """
    check_settings(settings)
    if not head:
        ends_of(tokenizer, settings)
    sources = _locate(settings)
    key = cache_key(settings, {role: s.fingerprint() for role, s in sources.items()}, tokenizer, seed, head)
    folder = cached(cache, key, lambda partial: _build(partial, settings, tokenizer, sources, seed, head))
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    reports = {role: Report(**counts) for role, counts in meta["reports"].items()}
    return Prepared(
        train=TokenSet(folder / "train", "train", "train"),
        validation=TokenSet(folder / "validation", "validation", "validation") if "validation" in reports else None,
        tests={role: TokenSet(folder / role, "test", role) for role in reports if role.partition("/")[0] == "test"},
        reports=reports,
        previews=meta["previews"],
        classes=meta["classes"],
        label_sequences=meta["label_sequences"],
        label_classes=meta["label_classes"],
        folder=folder,
        commits=commits_of(sources.values()),
    )


def cache_key(
    settings: DataSection,
    fingerprints: dict[Role, str],
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
    head: bool = False,
) -> str:
    """Return a SHA-256 over everything that the token sets depend on, this package's own code included."""
    return key_of(
        {
            "settings": settings.model_dump(mode="json", exclude={"revisions"}),  # the content is what they give
            "content": fingerprints,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "seed": seed,
            "head": head,
        }
    )


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a SHA-256 over what decides how text becomes tokens; padding and truncation of earlier calls do not."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = [
        type(tokenizer).__name__,
        {name: part for name, part in backend.items() if name not in ("padding", "truncation")},
        tokenizer.chat_template,
        [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _build(
    folder: Path,
    settings: DataSection,
    tokenizer: "PreTrainedTokenizerBase",
    sources: dict[Role, Sources],
    seed: int,
    head: bool,
) -> None:
    reports = {}
    previews: list[str] = []
    splits, names = _tokenized(settings, tokenizer, sources, seed, head)
    classes = None
    if settings.format == "classification":
        classes = names or sorted({str(sample.label) for _, _, whole in splits for sample in whole})
    for split, report, whole in splits:
        is_packed = settings.packing and split.role == "train"
        bos = None if head else ends_of(tokenizer, settings).bos
        samples, rows = _rows(whole, settings, bos, is_packed, report)
        lengths = [len(sample.tokens) for sample in samples]
        write_set(folder / split.role, samples, rows, classes)
        report.kept, report.rows, report.tokens = len(samples), len(rows), sum(lengths)
        report.target_tokens = sum(int(sample.targets.sum()) for sample in samples)
        report.fill = report.tokens / (len(rows) * settings.max_tokens) if is_packed else 0.0
        reports[split.role] = asdict(report)
        previews = previews or [_preview(sample, tokenizer, head) for sample in samples[:PREVIEWS]]
    words = {}
    if classes is not None and not head:
        words = label_sequences([sample for _, _, whole in splits for sample in whole], classes, tokenizer, settings)
    meta = {
        "reports": reports,
        "previews": previews,
        "classes": classes,
        "label_sequences": list(words) or None,
        "label_classes": list(words.values()) or None,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False), encoding="utf-8")


def _preview(sample: Sample, tokenizer: "PreTrainedTokenizerBase", head: bool) -> str:
    """Return a sample as text; of a head's with the answer behind it."""
    text = preview(sample, tokenizer)
    return f"{text} -> {sample.label}" if head else text


def _tokenized(
    settings: DataSection, tokenizer: "PreTrainedTokenizerBase", sources: dict[Role, Sources], seed: int, head: bool
) -> tuple[list[tuple[Split[Example], Report, list[Sample]]], list[str] | None]:
    """Return the splits with their samples, training first, and the label words by class number, if they are named.

    All that makes a record bad is known then.
    """
    own, labels = _read(settings, sources)
    bad = [split.bad for split in own.values()]
    if settings.bad_rows == "error" and any(one.count for one in bad):
        splits = list(own.values())  # nothing is drawn: tokenising only finds what else is bad
    else:
        require_usable(bad, settings)
        splits = make_splits(settings, seed, own.__getitem__)
    reports = [_report(split) for split in splits]
    samples = [
        _tokenizer_of(settings, split.role, head)(split.examples, tokenizer, settings, report, split.bad)
        for split, report in zip(splits, reports, strict=True)
    ]
    require_usable(bad, settings)
    for split, report, whole in zip(splits, reports, samples, strict=True):
        if not whole:
            raise UserError(f"No {split.role} record is left: {'; '.join(split.bad.first.values())}")
        if split.role in own:
            report.bad, report.first_bad = split.bad.reasons, split.bad.first
    return list(zip(splits, reports, samples, strict=True)), labels


def _tokenizer_of(settings: DataSection, role: Role, head: bool) -> Callable[..., list[Sample]]:
    """Return what makes the samples of a split."""
    if head:
        return tokenize_prompts
    return tokenize_options if settings.format == "multiple_choice" and role != "train" else tokenize


def _rows(
    whole: list[Sample], settings: DataSection, bos: int | None, is_packed: bool, report: Report
) -> tuple[list[Sample], list[list[int]]]:
    """Return the samples as they are learnt, and which of them make up each row."""
    if is_packed and settings.overlong == "split":  # running text: every row is full
        return fill_rows(whole, settings.max_tokens, bos, report)
    samples = fit_length(whole, settings, bos, report)
    lengths = [len(sample.tokens) for sample in samples]
    return samples, pack(lengths, settings.max_tokens) if is_packed else [[n] for n in range(len(samples))]


def _locate(settings: DataSection) -> dict[Role, Sources]:
    """Return the sources of all roles; running text, which is split into rows, is read in long pieces."""
    return locate_roles(settings, partial(locate, documents=settings.overlong == "split"))


def _read(settings: DataSection, sources: dict[Role, Sources]) -> tuple[dict[Role, Split[Example]], list[str] | None]:
    """Return the examples of every role that has a source of its own, with their bad records; and the label words."""
    bad = {role: BadRows() for role in sources}
    tables = {role: source.read(bad[role]) for role, source in sources.items()}
    check_columns(tables["train"].rows, settings)
    if settings.format == "classification" and settings.labels is None:
        column = (settings.columns or {}).get("label", "label")
        names = next((t.label_names[column] for t in tables.values() if column in t.label_names), None)
        settings = settings.model_copy(update={"labels": names and [readable(name) for name in names]})
    splits = {role: to_split(role, table, settings, bad[role]) for role, table in tables.items()}
    if settings.format == "classification":
        require_known_classes(splits)
    return splits, settings.labels


def training_texts(settings: DataSection, seed: int) -> tuple[str, Callable[[], Iterator[str]]]:
    """Return a SHA-256 of the training text of a recipe, and what reads it: a tokenizer is trained on nothing else.

    Args:
        seed: of the choice of held-out rows, as in `prepare`.

    Raises:
        UserError: as `prepare`; the function that is returned may raise it too.
    """
    check_settings(settings)
    sources = _locate(settings)
    parts = {
        "settings": settings.model_dump(mode="json", exclude=AFTER_TEXT),
        "content": {role: source.fingerprint() for role, source in sources.items()},
        "seed": seed if any(isinstance(n, int | float) for n in (settings.validation, settings.test)) else None,
        "chosen_by": None if settings.max_rows is None and settings.shots is None else seed,
    }
    identity = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def read() -> Iterator[str]:
        own, _ = _read(settings, sources)
        require_usable((split.bad for split in own.values()), settings)
        return (example.text() for example in make_splits(settings, seed, own.__getitem__)[0].examples)

    return identity, read


def _report(split: Split[Example]) -> Report:
    return Report(
        split.role,
        rows_read=split.rows_read,
        empty=split.empty,
        duplicates_removed=split.duplicates,
        also_in_train=split.also_in_train,
    )
