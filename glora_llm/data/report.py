"""The counts of one split: records read, dropped, kept; rows, tokens."""

from dataclasses import dataclass, field

from glora_llm.data.bad_rows import counted


@dataclass
class Report:
    """Counts of one split.

    Attributes:
        rows_read: rows of the source (or drawn, or left after drawing).
        bad: records left out because they cannot be used, by reason; drawn splits count them with the training rows.
        first_bad: by reason, place and fault of the first.
        empty: rows left out because what is to be learnt is blank.
        duplicates_removed: training rows left out because a held-out row reads the same.
        also_in_train: held-out rows that read the same as a training row, from a source of their own: kept.
        dropped: samples left out because they are too long, or lost every target by truncation.
        truncated: samples that lost their end.
        split: samples that were cut into several.
        kept: samples.
        rows: rows; with packing, several samples in one.
        tokens, target_tokens: of all samples.
        longest: tokens of the longest sample, before anything was cut.
        boundary_tokens: tokens that hold both prompt and answer, and so are no targets.
        fill: share of the rows' room (data.max_tokens each) that is filled; 0 without packing.
    """

    role: str
    rows_read: int = 0
    empty: int = 0
    duplicates_removed: int = 0
    also_in_train: int = 0
    dropped: int = 0
    truncated: int = 0
    split: int = 0
    kept: int = 0
    rows: int = 0
    tokens: int = 0
    target_tokens: int = 0
    longest: int = 0
    boundary_tokens: int = 0
    fill: float = 0.0
    bad: dict[str, int] = field(default_factory=dict)
    first_bad: dict[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        """Return the counts as one line, and one for each reason of bad records; zeros are left out."""
        news = [
            (sum(self.bad.values()), "bad ones left out"),
            (self.empty, "without an answer left out"),
            (self.duplicates_removed, "removed: the same as a held-out row"),
            (self.also_in_train, "the same as a training row (kept)"),
            (self.dropped, "dropped as too long"),
            (self.truncated, "truncated"),
            (self.split, "split"),
            (self.boundary_tokens, "tokens hold both prompt and answer and are not learnt"),
        ]
        parts = [f"{self.rows_read:,} rows read", *(f"{count:,} {text}" for count, text in news if count)]
        parts.append(f"{self.kept:,} samples of {self.tokens:,} tokens, {self.target_tokens:,} of them label tokens")
        parts.append(f"longest {self.longest:,}")
        if self.fill:
            parts.append(f"packed into {self.rows:,} rows, {self.fill:.1%} full")
        lines = [f"{self.role}: " + "; ".join(parts), *counted(self.bad, self.first_bad)]
        return "\n           left out: ".join(lines)


@dataclass
class ImageReport:
    """Counts of one split of images.

    Attributes:
        rows_read: rows of the source (or drawn, or left after drawing).
        duplicates_removed: training images left out because a held-out one has the same pixels.
        also_in_train: held-out images with the pixels of a training image, from a source of their own: kept.
        kept: images.
        size: side of the square images, in pixels.
        classes: of the whole task.
        fewest, most: images of the smallest and of the largest class.
    """

    role: str
    rows_read: int = 0
    duplicates_removed: int = 0
    also_in_train: int = 0
    kept: int = 0
    size: int = 0
    classes: int = 0
    fewest: int = 0
    most: int = 0

    def describe(self) -> str:
        """Return the counts as one line; those that are zero and would be no news are left out."""
        news = [
            (self.duplicates_removed, "removed: the same as a held-out image"),
            (self.also_in_train, "the same as a training image (kept)"),
        ]
        parts = [f"{self.rows_read:,} rows read", *(f"{count:,} {text}" for count, text in news if count)]
        parts.append(f"{self.kept:,} images of {self.size} x {self.size} pixels")
        parts.append(f"{self.classes} classes of {self.fewest:,} to {self.most:,} images")
        return f"{self.role}: " + "; ".join(parts)
