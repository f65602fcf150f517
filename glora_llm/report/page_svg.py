"""Figures as SVG inside a page: text stays text, and the colours are the page's, so that they follow dark and light."""

import contextlib
import io
import re
from typing import Any

import matplotlib
from markupsafe import Markup, escape

from glora_llm.report.drawing import BLUE, GREY, ORANGE, VERMILLION

GREEN, PINK, SKY, GRID = "#009E73", "#CC79A7", "#56B4E9", "#DDDDDD"
# Colour of a figure -> variable of templates/report.css, which has a value for light and one for dark.
VARIABLES = {
    BLUE: "blue", VERMILLION: "vermillion", GREEN: "green", ORANGE: "orange", PINK: "pink", SKY: "sky",
    GREY: "muted", GRID: "grid", "#000000": "ink",
}  # fmt: skip
SETTINGS = {
    "svg.fonttype": "none",  # text as text: to be read aloud, found and copied
    "text.parse_math": False,  # a `$` in the name of a run is a dollar
    "font.size": 9.5,
    "axes.titlesize": 10.0,
    "axes.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
}
FONT = re.compile(r"font: ([\d.]+px) [^;\"]*")
LONG = re.compile(r"(\d\.\d\d)\d+")
PATH = re.compile(r' d="[^"]*"')
GROUP = re.compile(r'<g id="[^"]*"')


def drawn_for_pages() -> contextlib.AbstractContextManager[None]:
    """Return the context in which the figures of a page are made and written."""
    return matplotlib.rc_context(SETTINGS)  # type: ignore[no-any-return]


def inline_svg(figure: Any, title: str, name: str) -> Markup:
    """Return a figure as an <svg> element for the middle of an HTML page; call it inside `drawn_for_pages`.

    Args:
        title: says what it shows; screen readers read it out.
        name: of letters, digits and hyphens, unique in the page: the element's identifiers begin with it.
    """
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style type=.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = GROUP.sub("<g", text)
    text = FONT.sub(r"font-size: \1", text)
    text = PATH.sub(lambda found: LONG.sub(r"\1", found[0].replace("\n", "")), text)
    for colour, variable in VARIABLES.items():
        text = re.sub(colour, f"var(--{variable})", text, flags=re.IGNORECASE)
    text = re.sub(r"\n\s*", "\n", text)
    width, height = figure.get_size_inches() * 72
    head = (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="{name}-title" fill="currentColor" '
        f'style="max-width: {width * 1.45:.0f}px"><title id="{name}-title">{escape(title)}</title>'
    )
    return Markup(head + text[text.index(">") + 1 :].strip())
