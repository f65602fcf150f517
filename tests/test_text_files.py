"""Every text file is read and written as UTF-8, whatever the locale is."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT_CALLS = {"read_text", "write_text", "open", "fdopen", "NamedTemporaryFile"}
OTHERS = {"safe_open", "urlopen", "Image"}  # no text: PIL's Image.open


def places_without_encoding(source: str) -> Iterator[int]:
    """Yield the lines of calls that read or write text in the encoding of the locale."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        owner = (
            function.value.id if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) else ""
        )
        is_ours = name == "write_text" and isinstance(function, ast.Name)  # glora_llm.atomic.write_text: UTF-8 always
        if name not in TEXT_CALLS or owner in OTHERS or is_ours:
            continue
        words = [*node.args, *(key.value for key in node.keywords)]
        texts = [word.value for word in words if isinstance(word, ast.Constant) and isinstance(word.value, str)]
        is_binary = any(set(text) <= set("rwxab+") and "b" in text for text in texts)
        is_binary = is_binary or (name == "NamedTemporaryFile" and not texts) or owner in ("os", "tarfile", "gzip")
        if not is_binary and "encoding" not in {key.arg for key in node.keywords}:
            yield node.lineno


def test_the_search_finds_what_it_should() -> None:
    bad = "path.read_text()\npath.write_text(x)\nopen(path)\npath.open('w')\nos.fdopen(3)\n"
    good = (
        "path.read_text(encoding='utf-8')\npath.open('rb')\nopen(path, mode='ab')\nsafe_open(path)\nImage.open(path)\n"
    )
    assert list(places_without_encoding(bad)) == [1, 2, 3, 4]
    assert not list(places_without_encoding(good))


def test_no_text_file_depends_on_the_locale() -> None:
    files = [*(ROOT / "glora_llm").rglob("*.py"), *(ROOT / "scripts").rglob("*.py"), ROOT / "train.py"]
    assert len(files) > 100
    found = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in files
        for line in places_without_encoding(file.read_text(encoding="utf-8"))
    ]
    assert not found, "give encoding='utf-8'"
