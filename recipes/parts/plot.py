"""Curves of runs, and pictures for notebooks, in one style: thin lines that differ in brightness
and in dash, bars that differ in brightness and in hatching, maps in greys, so that all of it can
be read in greyscale; no frame, no legend where one line is drawn.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepzoo.recipes.parts.log import METRICS, read_metrics
from deepzoo.zoo.errors import RequestError

# What is drawn unless keys are named, where the rows have it; one panel each.
KEYS = (
    "loss", "nll", "reward", "accuracy", "held_out", "length", "entropy", "truncated",
    "dead_groups", "kl", "clipped", "mismatch", "norm", "load", "tokens_per_second",
)  # fmt: skip

_DASHES = ("-", "--", ":", "-.")
_SHADES = ("#1a1a1a", "#b34700", "#5b9bd5", "#b0b0b0")  # luma 0.10, 0.37, 0.56, 0.69
_HATCHES = ("", "////", "....", "xxxx")
_STYLE = {
    "figure.dpi": 100,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.3,
    "figure.constrained_layout.use": True,
}


def plot(
    runs: Sequence[str | Path], path: str | Path, keys: Sequence[str] = (), smooth: float = 0.0
) -> Path:
    """Draws metrics of runs over steps, one panel a key, into a PNG (or what the suffix says).

    Args:
        runs: their directories.
        path: the file to write.
        keys: of the rows, in this order; by default those of `KEYS` that there are.
        smooth: share of the last value in an exponential mean, 0 for none; the values themselves
            are then drawn faintly.

    Raises:
        RequestError: no such run or key, nothing to draw, or matplotlib is not installed.
    """
    matplotlib = _matplotlib()
    with matplotlib.rc_context(_STYLE):
        # Not through pyplot: a file is written, and nothing is shown or kept.
        figure = matplotlib.figure.Figure()
        _curves(figure, runs, keys, smooth)
        figure.savefig(path, dpi=150)
    return Path(path)


def curves(runs: Sequence[str | Path], keys: Sequence[str] = (), smooth: float = 0.0) -> Any:
    """The picture of `plot` as a figure of pyplot, which a notebook shows behind its cell.

    Raises:
        RequestError: as `plot`.
    """
    figure, _ = axes()
    figure.clear()
    with _matplotlib().rc_context(_STYLE):
        _curves(figure, runs, keys, smooth)
    return figure


def axes(columns: int = 1, rows: int = 1, *, width: float = 4.2, height: float = 2.8) -> Any:
    """(figure, axes): an empty picture in this style, of pyplot; one axis, or an array of them.

    Args:
        columns: of panels.
        rows: of panels.
        width: of a panel, in inches.
        height: of a panel, in inches.

    Raises:
        RequestError: matplotlib is not installed.
    """
    matplotlib = _matplotlib()
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    with matplotlib.rc_context(_STYLE):
        made = pyplot.subplots(rows, columns, figsize=(width * columns, height * rows))
        shown = pyplot.isinteractive()
    # A notebook's backend, loaded by the first picture, says so; the context took it back.
    matplotlib.interactive(shown)
    return made


def lines(
    axis: Any,
    series: Mapping[str, Sequence[float]],
    x: Sequence[float] | None = None,
    **labels: str,
) -> None:
    """Draws one line a name over `x`, by default 0, 1, 2, ...

    `labels` are title, xlabel, ylabel.
    """
    for i, (name, values) in enumerate(series.items()):
        at = [float(i) for i in range(len(values))] if x is None else list(x)
        _line(axis, at, list(values), name, i, 0.0)
    _label(axis, series, labels)


def bars(
    axis: Any, series: Mapping[str, Sequence[float]], names: Sequence[str], **labels: str
) -> None:
    """Draws groups of horizontal bars, the first on top: one group a name, one bar a series."""
    count = len(series)
    for i, (name, values) in enumerate(series.items()):
        places = [row + (i - (count - 1) / 2) * 0.8 / count for row in range(len(names))]
        axis.barh(
            places, values, 0.8 / count, label=name, color=_SHADES[i % 4] if i % 2 == 0 else "w",
            hatch=_HATCHES[i % 4], edgecolor=_SHADES[i % 4], linewidth=0.8,
        )  # fmt: skip
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.set_axisbelow(True)
    _label(axis, series, labels)


def heat(axis: Any, values: Any, *, text: str = "", low: Any = None, high: Any = None,
         scale: str = "", **labels: str) -> None:  # fmt: skip
    """Draws a matrix as a map in greys, dark for large.

    Args:
        axis: of `axes`.
        values: [rows, columns].
        text: format of a number that is written into each cell, such as ".2f".
        low: the value that is white; by default the least.
        high: the value that is black; by default the largest.
        scale: what the values are; draws a bar beside the map.
        labels: title, xlabel, ylabel.
    """
    image = axis.imshow(values, cmap="Greys", vmin=low, vmax=high, aspect="auto")
    axis.grid(visible=False)
    if text:
        low, high = image.get_clim()
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                dark = value > (low + high) / 2
                axis.text(j, i, format(value, text), ha="center", va="center", fontsize=7,
                          color="w" if dark else "k")  # fmt: skip
    if scale:
        bar = axis.figure.colorbar(image, ax=axis, label=scale)
        bar.outline.set_visible(False)
    _label(axis, (), labels)


def _label(axis: Any, series: Any, labels: Mapping[str, str]) -> None:
    if "title" in labels:
        axis.set_title(labels["title"], loc="left", fontsize=10)
    axis.set_xlabel(labels.get("xlabel", ""), fontsize=9)
    axis.set_ylabel(labels.get("ylabel", ""), fontsize=9)
    if len(series) > 1:
        axis.legend(frameon=False, fontsize=8)


def _curves(figure: Any, runs: Sequence[str | Path], keys: Sequence[str], smooth: float) -> None:
    series = {Path(run).resolve().name or str(run): _series(Path(run)) for run in runs}
    if len(series) < len(runs):
        series = {str(run): _series(Path(run)) for run in runs}
    found = {key for held in series.values() for key in held}
    if unknown := [key for key in keys if key not in found]:
        raise RequestError(f"no row has {unknown[0]!r}; there are {', '.join(sorted(found))}")
    chosen = list(keys) or [key for key in KEYS if key in found]
    if not chosen:
        raise RequestError(f"{', '.join(map(str, runs))}: no rows to draw yet")
    columns = min(len(chosen), 3)
    rows = math.ceil(len(chosen) / columns)
    figure.set_size_inches(4.0 * columns, 2.8 * rows)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axis in panels.flat[len(chosen) :]:
        axis.set_visible(False)
    for axis, key in zip(panels.flat, chosen, strict=False):
        for i, (name, held) in enumerate(series.items()):
            if key in held:
                _line(axis, *held[key], name, i, smooth)
        axis.set_title(key.replace("_", " "), loc="left")
        axis.set_xlabel("step")
    if len(series) > 1:
        panels.flat[0].legend()


def _line(
    axis: Any, steps: list[float], values: list[float], name: str, index: int, smooth: float
) -> None:
    shade = _SHADES[index % 4]
    dash = _DASHES[(index + index // 4) % 4]  # beyond four, other pairs of the two
    mark = "o" if len(steps) < 20 else None
    if smooth:
        axis.plot(steps, values, color=shade, alpha=0.25, linewidth=0.8)
        mean, means = values[0], []
        for value in values:
            mean = smooth * mean + (1 - smooth) * value
            means.append(mean)
        values = means
    axis.plot(
        steps, values, dash, color=shade, label=name, marker=mark, markersize=3, linewidth=1.3
    )


def _series(run: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Key -> (steps, values) of the numbers in a run's rows."""
    path = run if run.is_file() else run / METRICS
    if not path.is_file():
        raise RequestError(f"{run}: holds no {METRICS}; give the directory of a run")
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in read_metrics(path):
        for key, value in row.items():
            if key not in ("step", "time") and isinstance(value, int | float):
                steps, values = found.setdefault(key, ([], []))
                steps.append(row["step"])
                values.append(float(value))
    return found


def _matplotlib() -> Any:
    try:
        import matplotlib  # pyright: ignore[reportMissingImports]
        import matplotlib.figure  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise RequestError(
            "drawing needs matplotlib; install it with: pip install 'deepzoo[notebooks]'"
        ) from None
    return matplotlib
