"""`deepzoo train RECIPE ...`: a recipe's own command line, under one name.

The recipe is looked for by name when the command runs; nothing here depends on one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from deepzoo.zoo.cli import recipes, usage


@dataclass(frozen=True, kw_only=True)
class Train:
    """Run a training recipe; the same command goes on with a run that was interrupted.

    Every setting of the recipe is a flag: `deepzoo train RECIPE --help` tells them.

    Example: deepzoo train pretrain --preset nano --out runs/v2-nano
    """

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """`deepzoo recipes list` tells all."""
    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Named settings; other flags change single ones."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """The directory of the run."""


class Call(NamedTuple):
    """A recipe, and the words for it."""

    name: str
    args: tuple[str, ...]


def parse(args: Sequence[str]) -> Call:
    """Takes the recipe's name; the rest is for its own parser.

    Raises:
        SystemExit: 0, after help.
        UsageError: no recipe is named.
    """
    if not args or args[0].startswith("-"):
        name = usage.parse(Train, "train", args).name
        at = args.index(name)
    else:
        name, at = args[0], 0
    recipes.path(name)
    return Call(name, (*args[:at], *args[at + 1 :]))


def run(command: Call) -> int:
    """Trains and returns the exit status.

    Raises:
        DeepzooError: a flag or a setting is wrong, or the run cannot go on.
    """
    name = command.name
    recipe = import_module(f"deepzoo.recipes.{name}")
    line = import_module("deepzoo.recipes.parts.main")
    return line.run(
        recipe.train, recipe.PRESETS, recipe.__doc__, command.args, f"deepzoo train {name}"
    )
