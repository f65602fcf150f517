"""The common base of all figures: no pyplot (so no backend and no global state), colours, plain axes.

The colours are Okabe and Ito's: colour-blind readers tell them apart.
"""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

BLUE, ORANGE, VERMILLION, GREY = "#0072B2", "#E69F00", "#D55E00", "#5F5F5F"


def empty_figure(size: tuple[float, float]) -> Any:
    """Return an empty figure of (width, height) in inches, whose parts keep clear of each other."""
    return Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))


def tidy(axes: Any, grid: str) -> None:
    """Take away the frame's upper and right side, and draw a light grid behind."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color="#DDDDDD", linewidth=0.6)
