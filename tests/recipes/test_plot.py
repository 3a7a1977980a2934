"""Pictures for notebooks: everything in them can be told apart without colours."""

import itertools
import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="an extra: notebooks")
import matplotlib
from matplotlib import colors, pyplot

from deepzoo.recipes.parts import plot
from deepzoo.zoo.errors import RequestError


@pytest.fixture(autouse=True)
def closed():
    matplotlib.use("agg")
    yield
    pyplot.close("all")


def luma(colour) -> float:
    red, green, blue = colors.to_rgb(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_lines_differ_in_dash_or_brightness():
    _, axis = plot.axes()
    plot.lines(axis, {f"run {i}": [0.0, i, 2.0 * i] for i in range(8)}, title="loss")
    drawn = [(line.get_linestyle(), luma(line.get_color())) for line in axis.get_lines()]
    for (dash, shade), (other_dash, other) in itertools.combinations(drawn, 2):
        assert dash != other_dash or abs(shade - other) > 0.1
    assert axis.get_title(loc="left") == "loss"
    assert len(axis.get_legend().get_texts()) == 8


def test_one_line_needs_no_legend_and_keeps_its_places():
    _, axis = plot.axes()
    plot.lines(axis, {"": [3.0, 2.0]}, [10, 20], xlabel="step")
    assert axis.get_legend() is None
    assert axis.get_lines()[0].get_xydata().tolist() == [[10, 3], [20, 2]]
    assert axis.get_xlabel() == "step"


def test_bars_differ_in_hatching_and_stand_in_order():
    _, axis = plot.axes()
    plot.bars(axis, {"a": [1, 2], "b": [3, 4], "c": [5, 6]}, ["first", "second"])
    groups = [container.patches for container in axis.containers]
    assert len({(bar.get_hatch(), bar.get_facecolor()) for bar, _ in groups}) == 3
    assert [bar.get_width() for bars in groups for bar in bars] == [1, 2, 3, 4, 5, 6]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["first", "second"]
    assert axis.yaxis_inverted()


def test_numbers_in_a_map_are_light_on_dark_cells():
    _, axis = plot.axes()
    plot.heat(axis, [[0.0, 1.0]], text=".1f")
    assert [(t.get_text(), t.get_color()) for t in axis.texts] == [("0.0", "k"), ("1.0", "w")]
    assert axis.images[0].get_cmap().name == "Greys"  # dark is large


def test_curves_of_a_run(tmp_path: Path):
    rows = [{"step": step, "loss": 3.0 / step, "load": 1.0} for step in range(1, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figure = plot.curves([tmp_path], ["loss", "load"])
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["loss", "load"]
    assert figure.axes[0].get_lines()[0].get_xydata().tolist() == [[1, 3.0], [2, 1.5], [3, 1.0]]
    with pytest.raises(RequestError, match="no row has 'lost'"):
        plot.curves([tmp_path], ["lost"])
