"""Pages whose code is run: blocks of Markdown, in order, what they print, and what they only claim.

A block ```python or ```sh is run in the page's own folder and namespace; a ```text below it is what
it prints (`...` stands for anything). Below a paragraph that begins with *Needs or *Takes a block
is not run: its flags and names are checked instead.
"""

import ast
import contextlib
import doctest
import importlib
import inspect
import io
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from deepzoo import zoo
from deepzoo.zoo import cli

_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    """kind: "python" or "sh". line: of the page. marked: not run. printed: None if not told."""

    kind: str
    source: str
    line: int
    marked: bool
    printed: str | None


def blocks(text: str) -> list[Block]:
    """The blocks of a page.

    Raises:
        ValueError: a block of another kind, or a text that follows no block.
    """
    found: list[Block] = []
    end = 0
    for match in _FENCE.finditer(text):
        kind, source = match.groups()
        between = text[end : match.start()].strip()
        end, line = match.end(), text.count("\n", 0, match.start()) + 1
        if kind == "text":
            if between or not found or found[-1].printed is not None:
                raise ValueError(f"line {line}: a text that no block above it prints")
            found[-1] = found[-1]._replace(printed=source)
        elif kind in ("python", "sh"):
            paragraph = between.rpartition("\n\n")[2]
            marked = bool(re.match(r"\*(Needs|Takes) ", paragraph))
            found.append(Block(kind, source, line, marked, None))
        else:
            raise ValueError(f"line {line}: a block of kind {kind!r} is neither run nor compared")
    return found


def commands(source: str) -> list[list[str]]:
    """Words of each command of a block, without the program's name."""
    found = [shlex.split(line, comments=True) for line in source.splitlines() if line.strip()]
    if strange := [words for words in found if words[:1] != ["deepzoo"]]:
        raise ValueError(f"not a command of deepzoo: {strange[0]}")
    return [words[1:] for words in found]


def run(block: Block, namespace: dict[str, Any]) -> str:
    """Runs a block here and now; returns what it printed.

    Raises:
        AssertionError: a command failed, or something else was printed than the page says.
    """
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        if block.kind == "python":
            source = "\n" * block.line + block.source  # tracebacks then tell the page's lines
            exec(compile(source, "page", "exec"), namespace)
        for words in commands(block.source) if block.kind == "sh" else ():
            status = cli.main(words)
            assert status == 0, f"line {block.line}: {words}: {status}: {errors.getvalue()[-500:]}"
    told = out.getvalue()
    if block.printed is not None:
        same = doctest.OutputChecker().check_output(block.printed, told, doctest.ELLIPSIS)
        assert same, f"line {block.line} prints\n{told}\nand not\n{block.printed}"
    return told


def check(block: Block) -> None:
    """Checks a block without running it: flags by their parsers, names and keywords of `zoo`.

    Raises:
        DeepzooError: a command that its parser refuses.
        AssertionError: a name or a keyword that does not exist.
    """
    if block.kind == "sh":
        for words in commands(block.source):
            parse(words)
        return
    for node in ast.walk(ast.parse(block.source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("zoo."):
            function = getattr(zoo, ast.unparse(node.func).removeprefix("zoo."), None)
            assert function, f"line {block.line}: {ast.unparse(node.func)} does not exist"
            given = dict.fromkeys(keyword.arg for keyword in node.keywords if keyword.arg)
            inspect.signature(function).bind(*node.args, **given)


def parse(words: list[str]) -> Any:
    """What a command's own parser makes of its words."""
    name, *rest = words
    assert name in cli.COMMANDS, f"there is no command {name}"
    module = importlib.import_module(f"deepzoo.zoo.cli.{name}")
    if not hasattr(module, "parse"):
        return cli.usage.parse(getattr(module, name.capitalize()), name, rest)
    call = module.parse(rest)
    recipe = importlib.import_module(f"deepzoo.recipes.{getattr(call, 'name', name)}")
    line = importlib.import_module("deepzoo.recipes.parts.main")
    args = call.args if any(a.startswith("--out") for a in call.args) else (*call.args, "--out=x")
    return line.parse(recipe.PRESETS, "", args, name)


def run_all(page: Path) -> int:
    """Runs a page in the current folder, marked blocks left out; returns how many it ran.

    Raises:
        AssertionError: as `run`.
    """
    namespace: dict[str, Any] = {}
    ours = [b for b in blocks(page.read_text(encoding="utf-8")) if not b.marked]
    for block in ours:
        run(block, namespace)
    return len(ours)
