"""`deepzoo recipes list | show NAME | copy NAME FILE`: the training recipes, to read and fork."""

import ast
import difflib
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import tyro

from deepzoo.zoo.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """List the training recipes, show one, or copy one into a file that runs alone.

    Example: deepzoo recipes copy pretrain my_pretrain.py
    """

    what: Annotated[Literal["list", "show", "copy"], tyro.conf.Positional] = "list"
    """What to do."""
    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = None
    """The recipe to show or to copy."""
    destination: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")] = None
    """Where to copy it; a file that does not exist yet."""


def run(command: Recipes) -> int:
    """Prints or copies, and returns the exit status.

    Raises:
        RequestError: no such recipe, no file named, or one that exists.
    """
    if command.what == "list":
        if command.name is not None:
            raise RequestError(f"`list` takes no name; `show {command.name}` shows that one")
        width = max(map(len, names()))
        for name in names():
            print(f"{name:<{width}}  {summary(name)}")
        return 0
    if command.name is None:
        raise RequestError(f"NAME is missing; there are {', '.join(names())}")
    source = path(command.name).read_text(encoding="utf-8")
    if command.what == "show":
        print(source, end="")
        return 0
    if command.destination is None:
        raise RequestError(f"FILE is missing; such as: copy {command.name} my_{command.name}.py")
    try:
        file = command.destination.open("x", encoding="utf-8")
    except FileExistsError:
        raise RequestError(f"{command.destination}: exists; name another file") from None
    with file:
        file.write(source)
    print(f"{command.destination}: run it with `python {command.destination} --out DIR`")
    return 0


def names() -> list[str]:
    """Every recipe that is installed: one file each, so nothing has to be imported to know them."""
    return sorted(p.stem for p in _folder().glob("*.py") if not p.name.startswith("_"))


def path(name: str) -> Path:
    """The file of a recipe.

    Raises:
        RequestError: there is none of that name.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names())}"
        raise RequestError(f"no recipe is called {name!r}; {hint}")
    return _folder() / f"{name}.py"


def summary(name: str) -> str:
    """The first line of a recipe's head."""
    head = ast.get_docstring(ast.parse(path(name).read_text(encoding="utf-8")))
    return (head or "").partition("\n")[0]


def _folder() -> Path:
    spec = find_spec("deepzoo.recipes")
    if spec is None or not spec.submodule_search_locations:
        raise RequestError("the package deepzoo.recipes is not installed; reinstall deepzoo")
    return Path(os.fspath(next(iter(spec.submodule_search_locations))))
