"""Curves of runs in one style: thin lines that differ in brightness and in dash, so that they can
be told apart in greyscale; no frame, no legend where one line is drawn.
"""

import math
from collections.abc import Sequence
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
_STYLE = {
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
    pyplot = _pyplot()
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
    size = (4.0 * columns, 2.8 * math.ceil(len(chosen) / columns))
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(
            math.ceil(len(chosen) / columns), columns, figsize=size, squeeze=False
        )
        for axis in axes.flat[len(chosen) :]:
            axis.set_visible(False)
        for axis, key in zip(axes.flat, chosen, strict=False):
            for i, (name, held) in enumerate(series.items()):
                if key in held:
                    _line(axis, *held[key], name, i, smooth)
            axis.set_title(key.replace("_", " "), loc="left")
            axis.set_xlabel("step")
        if len(series) > 1:
            axes.flat[0].legend()
        figure.savefig(path, dpi=150)
        pyplot.close(figure)
    return Path(path)


def _line(
    axis: Any, steps: list[int], values: list[float], name: str, index: int, smooth: float
) -> None:
    shade, dash = _SHADES[index % len(_SHADES)], _DASHES[index % len(_DASHES)]
    mark = "o" if len(steps) < 20 else None
    if smooth:
        axis.plot(steps, values, color=shade, alpha=0.25, linewidth=0.8)
        mean, means = values[0], []
        for value in values:
            mean = smooth * mean + (1 - smooth) * value
            means.append(mean)
        values = means
    axis.plot(steps, values, dash, color=shade, label=name, marker=mark, markersize=3)


def _series(run: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Key -> (steps, values) of the numbers in a run's rows."""
    path = run if run.is_file() else run / METRICS
    if not path.is_file():
        raise RequestError(f"{run}: holds no {METRICS}; give the directory of a run")
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in read_metrics(path):
        for key, value in row.items():
            if key not in ("step", "time") and isinstance(value, int | float):
                steps, values = found.setdefault(key, ([], []))
                steps.append(row["step"])
                values.append(float(value))
    return found


def _pyplot() -> Any:
    try:
        import matplotlib  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise RequestError(
            "drawing needs matplotlib; install it with: pip install 'deepzoo[notebooks]'"
        ) from None
    matplotlib.use("agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    return pyplot
