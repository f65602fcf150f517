"""The figures of a search: what is drawn is what was found, and nothing stands in anything's way."""

import ast
import itertools
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from glora_llm.glora.path import Genome, LayerPath, SlotSpec
from glora_llm.report import search_figures
from glora_llm.report.search_figures import generations, modes, pareto, sizes
from glora_llm.search.archive import Scored, pareto_front
from glora_llm.search.driver import Progress

LINEARS = tuple(f"self_attn.{name}_proj" for name in "qkvo") + tuple(f"mlp.{n}_proj" for n in ("gate", "up", "down"))
SPECS = {
    "A": (SlotSpec("none"), SlotSpec("lora", 2), SlotSpec("lora", 4), SlotSpec("vector")),
    "B": (SlotSpec("lora", 8), SlotSpec("lora", 4), SlotSpec("scalar")),
    "C": (SlotSpec("none"), SlotSpec("vector")),
    "E": (SlotSpec("none"), SlotSpec("vector"), SlotSpec("scalar")),
}


def some_candidates(count: int, smallest: int, largest: int, last: int) -> list[Scored]:
    rng = np.random.default_rng(0)
    parameters = np.geomspace(smallest, largest, count).astype(int)
    scores = -1.5 + 0.05 * np.log(parameters) - rng.random(count) * 0.3
    return [
        Scored(np.array([number % 256], np.uint8), float(score), int(size), float(size), number * (last + 1) // count)
        for number, (score, size) in enumerate(zip(scores, parameters, strict=True))
    ]


def some_genome(layers: int) -> Genome:
    rng = np.random.default_rng(0)

    def path() -> LayerPath:
        return LayerPath(tuple((slot, specs[rng.integers(len(specs))]) for slot, specs in SPECS.items()))

    return {f"model.layers.{layer}.{linear}": path() for layer in range(layers) for linear in LINEARS}


def some_shares(layers: int) -> dict[str, int]:
    return {name: 1000 * (number % 11) + 7 for number, name in enumerate(some_genome(layers))}


def evolution_history(count: int) -> list[Progress]:
    return [Progress(g, -1.2 + 0.004 * g, -1.4 + 0.006 * g, 12800 * (g + 1), 50 * (g + 1)) for g in range(count)]


def additive_history() -> list[Progress]:
    means = (-1.5, -1.48, -1.46, -1.44, -1.4, -1.38, -1.36, -1.34)
    fitted = [Progress(number // 4, -math.inf, mean, 16 * (number + 1), 0) for number, mean in enumerate(means)]
    return [*fitted, Progress(2, -math.inf, -1.25, 200, 0), Progress(2, -1.15, -1.2, 300, 2)]


def limits(*texts: str) -> list[tuple[str, float]]:
    return [(text, float(text.replace("k", "e3").replace("M", "e6").replace("unlimited", "inf"))) for text in texts]


def a_pareto(smallest: int, largest: int, last: int, *texts: str) -> Any:
    candidates = some_candidates(60, smallest, largest, last)
    return pareto(candidates, pareto_front(candidates), limits(*texts), "loss")


FIGURES: dict[str, Callable[[], Any]] = {
    "pareto, wide": lambda: a_pareto(50_000, 4_000_000, 20, "250k", "0.5M", "1M", "4M"),
    "pareto, narrow": lambda: a_pareto(600_000, 1_000_000, 0, "1M", "unlimited"),
    "pareto, from 0": lambda: a_pareto(1, 1_000_000, 3, "100k", "120k", "125k"),
    "generations, evolution": lambda: generations(evolution_history(21), "loss"),
    "generations, additive": lambda: generations(additive_history(), "exact_match"),
    "generations, one": lambda: generations(evolution_history(1)),
    **{f"modes, {layers} layers": partial(modes, some_genome(layers)) for layers in (2, 12, 30, 80)},
    **{f"sizes, {layers} layers": partial(sizes, some_shares(layers)) for layers in (2, 30, 80)},
    "modes, no numbers": lambda: modes({"fc1": LayerPath((("B", SlotSpec("lora", 4)),)), "lm_head": LayerPath(())}),
    "modes, with a head": lambda: modes(some_genome(2) | {"lm_head": LayerPath((("E", SlotSpec("vector")),))}),
    "sizes, with a head": lambda: sizes(some_shares(2) | {"lm_head": 5000}),
    "nothing, pareto": lambda: pareto([], [], [], "loss"),
    "nothing, generations": lambda: generations([]),
    "nothing, modes": lambda: modes({}),
    "nothing, sizes": lambda: sizes({}),
}


def legend_texts(figure: Any) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_saved_and_no_text_is_cut_off_or_written_over(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a layout that does not fit is a warning
        figure = FIGURES[name]()
        figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")

    boxes: list[tuple[str, Any]] = []
    draw = Text.draw

    def note(text: Text, renderer: Any) -> None:  # only what is drawn: ticks outside of an axis exist too
        if text.get_visible() and text.get_text().strip():
            boxes.append((text.get_text(), text.get_window_extent(renderer)))
        draw(text, renderer)

    monkeypatch.setattr(Text, "draw", note)
    FigureCanvasAgg(figure).draw()
    width, height = figure.bbox.size
    assert boxes or name.startswith("nothing")
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, f"'{text}' is cut off"
    for (one, box), (other, place) in itertools.combinations(boxes, 2):
        apart = box.x1 <= place.x0 or place.x1 <= box.x0 or box.y1 <= place.y0 or place.y1 <= box.y0
        assert apart, f"'{one}' is written over '{other}'"


def test_pareto_shows_every_candidate_the_front_and_the_limits() -> None:
    candidates = some_candidates(60, 50_000, 4_000_000, 20)
    front = pareto_front(candidates)
    figure: Any = pareto(candidates, front, limits("250k", "4M", "unlimited"), "loss")
    axes = figure.axes[0]
    dots = axes.collections[0]
    np.testing.assert_array_equal(dots.get_offsets(), [(one.parameters, one.score) for one in candidates])
    np.testing.assert_array_equal(dots.get_array(), [one.generation for one in candidates])
    step, *lines = axes.lines
    np.testing.assert_array_equal(step.get_xydata(), [(one.parameters, one.score) for one in front])
    assert step.get_drawstyle() == "steps-post"
    assert [line.get_xdata()[0] for line in lines] == [250e3, 4e6]
    assert [text.get_text() for text in axes.texts] == ["≤ 250k", "≤ 4M"]
    assert legend_texts(figure) == ["candidate", "Pareto front", "limit"]
    assert axes.get_ylabel() == "Minus validation loss (nats/token)"
    assert figure.axes[1].get_ylabel() == "Generation"


@pytest.mark.parametrize(
    ("smallest", "largest", "scale"), [(1000, 9000, "linear"), (1000, 11_000, "log"), (0, 11_000, "symlog")]
)
def test_parameters_are_logarithmic_where_they_differ_much(smallest: int, largest: int, scale: str) -> None:
    candidates = [Scored(np.zeros(1, np.uint8), 0.1, size, size, 0) for size in (smallest, 5000, largest)]
    axes: Any = pareto(candidates, candidates, [], "exact_match").axes[0]
    assert axes.get_xscale() == scale
    assert axes.get_xlim()[0] < smallest < largest < axes.get_xlim()[1]


def test_one_generation_needs_no_colours() -> None:
    candidates = some_candidates(5, 1000, 2000, 0)
    figure: Any = pareto(candidates, pareto_front(candidates), [], "loss")
    assert len(figure.axes) == 1
    assert legend_texts(figure) == ["candidate (all of generation 0)", "Pareto front"]


def test_generations_take_the_mean_of_means_and_the_last_best() -> None:
    figure: Any = generations(additive_history(), "loss")
    axes = figure.axes[0]
    mean, best = axes.lines
    np.testing.assert_allclose(mean.get_xydata(), [(0, -1.47), (1, -1.37), (2, -1.225)])
    np.testing.assert_allclose(best.get_xydata(), [(2, -1.15)])
    figure.draw_without_rendering()
    [top] = axes.child_axes
    assert [label.get_text() for label in top.get_xticklabels()] == ["64", "128", "300"]
    assert list(top.get_xticks()) == list(axes.get_xticks()) == [0, 1, 2]


def test_a_search_without_a_best_has_its_means_alone() -> None:
    figure: Any = generations(additive_history()[:8])
    assert len(figure.axes[0].lines) == 1
    assert legend_texts(figure) == ["mean of what was scored in the generation"]


@pytest.mark.parametrize("layers", [2, 30])
def test_modes_colour_every_slot_by_its_mode(layers: int) -> None:
    genome = some_genome(layers)
    figure: Any = modes(genome)
    names = ["lora, rank 2", "lora, rank 4", "lora, rank 8", "vector", "scalar", "none"]
    assert legend_texts(figure) == names
    colours = {text: patch.get_facecolor() for text, patch in zip(names, figure.legends[0].get_patches(), strict=True)}
    assert len(set(colours.values())) == len(names)
    FigureCanvasAgg(figure).draw()
    assert [panel.get_title("left") for panel in figure.axes] == [linear.split(".")[1] for linear in LINEARS]
    for linear, panel in zip(LINEARS, figure.axes, strict=True):
        found = panel.collections[0].get_facecolors().reshape(5, layers, 4)
        for row, slot in enumerate("ABCDE"):
            specs = [genome[f"model.layers.{layer}.{linear}"][slot] for layer in range(layers)]
            expected = [colours[f"lora, rank {s.rank}" if s.mode == "lora" else s.mode] for s in specs]
            np.testing.assert_allclose(found[row], expected)


def test_kinds_are_called_apart_and_missing_linears_stay_white() -> None:
    path = LayerPath((("B", SlotSpec("vector")),))
    names = [f"{name}_proj" for name in ("encoder.layers.0.q", "decoder.layers.0.q", "decoder.layers.2.q")]
    figure: Any = modes(dict.fromkeys([*names, "decoder.layers.2.fc", "head"], path))
    titles = [panel.get_title("left") for panel in figure.axes]
    assert titles == ["encoder.layers.*.q_proj", "decoder.layers.*.q_proj", "fc", "head"]
    missing = [np.ma.getmaskarray(panel.collections[0].get_array()).reshape(5, 3)[1].tolist() for panel in figure.axes]
    assert missing == [[False, True, True], [False, False, True], [True, False, True], [True, True, False]]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0", "2", "–"]
    assert legend_texts(figure) == ["vector", "none"]


@pytest.mark.parametrize("layers", [2, 30])
def test_sizes_add_up(layers: int) -> None:
    shares = some_shares(layers) | {"lm_head": 5000}
    figure: Any = sizes(shares)
    by_layer, by_kind = figure.axes
    heights = np.array([[bar.get_height() for bar in kind] for kind in by_layer.containers])
    assert heights.shape == (8, layers + 1)
    expected = [sum(shares[f"model.layers.{layer}.{linear}"] for linear in LINEARS) for layer in range(layers)]
    assert heights.sum(0).tolist() == [*expected, 5000]
    lengths = [bar.get_width() for kind in by_kind.containers for bar in kind]
    assert lengths == heights.sum(1).tolist()
    assert sum(lengths) == sum(shares.values())
    assert by_layer.get_ylim()[1] > heights.sum(0).max()
    assert [label.get_text() for label in by_kind.get_yticklabels()][0::7] == ["q_proj", "lm_head"]
    colours = [[kind[0].get_facecolor() for kind in axes.containers] for axes in (by_layer, by_kind)]
    assert colours[0] == colours[1] and len(set(colours[0])) == 8
    assert f"{sum(shares.values()):,}" in figure.get_suptitle()


def test_pyplot_is_never_imported() -> None:
    source = Path(search_figures.__file__).read_text(encoding="utf-8")
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    imports = [ast.unparse(node) for node in nodes]
    assert any("matplotlib.figure" in line for line in imports)
    assert not any("pyplot" in line for line in imports)
