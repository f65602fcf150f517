"""The catalogue's data sets of images."""

from typing import Any

from glora_llm.schema.benchmark import Benchmark

KRIZHEVSKY = "https://www.cs.toronto.edu/~kriz/learning-features-2009-TR.pdf"


def _images(title: str, source: str, paper: str, **more: Any) -> Benchmark:
    """Return a data set of images."""
    given: dict[str, Any] = {"kind": "images", "format": "images", "metrics": ("accuracy",), "validation": 0.02}
    return Benchmark(title=title, source=source, paper=paper, **(given | {"test": "test"} | more))


IMAGE_BENCHMARKS: dict[str, Benchmark] = {
    "cifar10": _images("which of 10 things is on a photo of 32 x 32 pixels", "uoft-cs/cifar10", KRIZHEVSKY),
    "cifar100": _images("which of 100 things is on a photo of 32 x 32 pixels", "uoft-cs/cifar100", KRIZHEVSKY),
    "food101": _images(
        "which of 101 dishes is on a photo",
        "ethz/food101",
        "https://doi.org/10.1007/978-3-319-10599-4_29",
        test="validation",
        more={"images": {"size": 224}},
    ),
    "vtab1k": _images(
        "VTAB-1K: one of 19 tasks of 1,000 training images, a folder with its lists (docs/vision.md)",
        "vtab-1k/cifar",
        "arXiv 1910.04867",
        train="train800val200",
        validation=None,
        more={"images": {"size": 224}},
    ),
}
