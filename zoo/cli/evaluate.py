"""`deepzoo evaluate MODEL ...`: the recipe `evaluate` for one model, its table on stdout.

Without `--out` nothing is kept. The recipe is looked for when the command runs.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, NamedTuple

import tyro

from deepzoo.zoo import catalog
from deepzoo.zoo.cli import usage


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure how often a model is right, with the interval that so few problems allow.

    `deepzoo evaluate MODEL --help` tells all options: task, number of problems and answers,
    sampling, text for the perplexity. A shipped model is asked what its card says it can do.

    Example: deepzoo evaluate r1-nano
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A shipped model or a directory."""


class Call(NamedTuple):
    """The words for the recipe."""

    args: tuple[str, ...]


def parse(args: Sequence[str]) -> Call:
    """Takes the model; the rest is for the recipe's parser.

    Raises:
        SystemExit: 0, after help.
        UsageError: no model is named.
    """
    if not args or args[0].startswith("-"):
        usage.parse(Evaluate, "evaluate", args[:1])
    model, words = args[0], (*args[1:], "--model", args[0])
    if catalog.shipped_directory(model) is not None and not _given("--task", words):
        task = catalog.card(model).task
        words += ("--task", task) if task else ()
    return Call(words)


def _given(flag: str, args: Sequence[str]) -> bool:
    return any(a == flag or a.startswith(f"{flag}=") for a in args)


def run(command: Call) -> int:
    """Measures and returns the exit status.

    Raises:
        DeepzooError: an option is wrong, or the model cannot be measured.
    """
    recipe = import_module("deepzoo.recipes.evaluate")
    line = import_module("deepzoo.recipes.parts.main")
    args, name = command.args, "deepzoo evaluate MODEL"
    with tempfile.TemporaryDirectory(prefix="deepzoo-") as scratch:
        if not _given("--out", args):
            args = (*args, "--out", scratch, "--no-tensorboard")
        try:
            settings, out, options = line.parse(recipe.PRESETS, recipe.__doc__, args, name)
        except SystemExit:  # after help
            return 0
        recipe.train(settings, out, options)
    return 0
