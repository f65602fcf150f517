"""The report in a real browser: at the widths of a phone and of a desktop, in the dark, and printed.

Runs where Chromium (or Chrome) is found; `apt-get install chromium` puts it on Debian and Ubuntu.
"""

from pathlib import Path

import pytest
from PIL import Image

from glora_llm.report.page import write_report
from tests.report.chromium import chromium, find_chromium
from tests.report.made_runs import write_comparison, write_run

PROGRAM = find_chromium()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium: apt-get install chromium")
OVERFLOW = "document.documentElement.scrollWidth - window.innerWidth"
SMALLEST = """Math.min(...[...document.querySelectorAll('figure:not(.wide) svg text')].map(
  text => parseFloat(getComputedStyle(text).fontSize) * Math.hypot(text.getScreenCTM().a, text.getScreenCTM().b)))"""
OUTSIDE = """[...document.querySelectorAll('figure svg')].flatMap(svg => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter(text => {
    const one = text.getBoundingClientRect();
    return one.left < box.left - 2 || one.right > box.right + 2 || one.bottom > box.bottom + 2; })
  }).map(text => text.textContent)"""


def test_it_is_readable_on_a_phone_on_a_desktop_in_the_dark_and_in_print(tmp_path: Path) -> None:
    assert PROGRAM is not None
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", "training.lr=0.5", steps=1000)]
    write_report([*runs, write_comparison(tmp_path / "c")], tmp_path / "report.html")
    papers: dict[tuple[int, bool], int] = {}
    with chromium(PROGRAM, tmp_path) as page:
        for width, dark in ((390, False), (1280, False), (1280, True)):
            page.open(tmp_path / "report.html", width, dark)
            assert page.value("window.innerWidth") == width and page.value(OVERFLOW) <= 0
            assert "Settings that differ" in page.value("document.body.innerText")
            assert page.value(SMALLEST) >= 8.5, "no text of a figure is smaller than 8.5 pixels"
            assert page.value(OUTSIDE) == [], "no text of a figure is cut off"
            page.screenshot(tmp_path / "page.png")
            with Image.open(tmp_path / "page.png") as picture:
                papers[width, dark] = picture.convert("L").tobytes()[0]
                assert picture.width in (width, 2 * width) and picture.height > 3000
        page.pdf(tmp_path / "page.pdf")
        assert not page.told, "nothing is written to the console"
        assert all(address.startswith(("file:", "data:")) for address in page.asked)
    assert papers[1280, False] > 250 and papers[1280, True] < 50, "dark where the system is dark"
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
