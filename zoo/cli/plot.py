"""`deepzoo plot RUN...`: the curves of runs as a picture."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated

import tyro

from deepzoo.zoo.cli import options
from deepzoo.zoo.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Draw the metrics of one run, or of several in one picture, into a PNG file.

    Example: deepzoo plot runs/v2-nano --keys loss,load
    """

    source: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Directories of runs."""
    out: Annotated[options.File, options.hint("curves.png in the first run")] = None
    """The file to write; its suffix says the format."""
    keys: Annotated[str, options.hint("the usual ones")] = ""
    """What to draw, separated by commas, named as in metrics.jsonl."""
    smooth: float = 0.0
    """From 0 to below 1: how much of an exponential mean is the past."""


def run(command: Plot) -> int:
    """Draws, says where the picture is, and returns the exit status.

    Raises:
        RequestError: no run, no such key, or matplotlib is not installed.
    """
    if not command.source:
        raise RequestError("RUN is missing; name the directory of a run")
    if not 0 <= command.smooth < 1:
        raise RequestError(f"--smooth is {command.smooth}; expected from 0 to below 1")
    plot = import_module("deepzoo.recipes.parts.plot")
    first = command.source[0]
    out = command.out or (first if first.is_dir() else first.parent) / "curves.png"
    keys = [key.strip() for key in command.keys.split(",") if key.strip()]
    print(plot.plot(command.source, out, keys, command.smooth))
    return 0
