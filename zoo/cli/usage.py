"""Words of the command line to a command, and what is wrong with them in one line."""

import contextlib
import dataclasses
import io
import itertools
import re
from collections.abc import Sequence
from typing import Any

from deepzoo.zoo.errors import DeepzooError

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_ROW = re.compile(r"^│ (.*?) *│$")


class UsageError(DeepzooError):
    """A command line that names no command, or that its command cannot take."""


def parse(kind: type, name: str, args: Sequence[str], *, program: str | None = None) -> Any:
    """An instance of the command's dataclass `kind` from its arguments.

    Args:
        kind: the dataclass.
        name: of the command.
        args: what was written behind it.
        program: what help calls the command, `deepzoo <name>` by default.

    Raises:
        SystemExit: 0, after help.
        UsageError: what is wrong with the arguments.
    """
    import tyro

    program = program or f"deepzoo {name}"
    _refuse_values_of_switches(kind, args)
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            markers = (tyro.conf.FlagCreatePairsOff, tyro.conf.AvoidSubcommands)
            return tyro.cli(kind, prog=program, args=list(args), config=markers)
    except SystemExit as end:
        if not end.code:
            raise
        what = condense(told.getvalue())
        end = " " if what.endswith("?") else "; "
        raise UsageError(f"{what}{end}`{program} --help` tells the options") from None


def _refuse_values_of_switches(kind: type, args: Sequence[str]) -> None:
    """`--json=no` would be read as `--json` and a word; say that it means nothing."""
    switches = {
        f"--{field.name.replace('_', '-')}"
        for field in dataclasses.fields(kind)
        if field.default is False
    }
    for word in itertools.takewhile(lambda word: word != "--", args):
        name, equals, _ = word.partition("=")
        if equals and name.replace("_", "-") in switches:
            raise UsageError(f"{name} takes no value, so {word} means nothing; give {name} or not")


def condense(text: str) -> str:
    """The argument parser's framed complaint as one line; what it is not known to say is kept."""
    lines = [_ANSI.sub("", line) for line in text.splitlines()]
    rows = [found[1] for line in lines if (found := _ROW.match(line))]
    if len(lines) > 1 and set(lines[1].strip()) == {"-"}:  # where stdout is not UTF-8: no frame
        rows = [line[2:].rstrip() for line in lines[2:]]
    parts: list[list[str]] = [[]]
    for row in rows:
        if set(row) in ({"─"}, {"-"}):
            parts.append([])
        else:
            parts[-1].append(row)
    body = " ".join(" ".join(parts[0]).split())
    if body.startswith("Missing from "):
        # Names are indented by four, their explanations by eight.
        names = [row.strip() for row in parts[0] if re.match(r" {4}\S", row)]
        return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing"
    if found := re.match(r"Missing value for argument '(.+?)'", body):
        what = found[1]
        return f"{what} needs a value" if what.startswith("-") else f"{what.upper()} is missing"
    if body.startswith("Unrecognized options: "):
        word = body.removeprefix("Unrecognized options: ").split(",")[0]
        near = parts[1] if len(parts) > 2 and parts[1][0].startswith("Perhaps") else []
        flags = [found[1] for row in near if (found := re.match(r" {4}(--?[\w-]+)", row))]
        known = f", did you mean {flags[0]}?" if flags else ""
        return f"there is no option {word}{known}" if word[:1] == "-" else f"{word} is too much"
    if found := re.match(
        r"invalid choice (.+) for argument '(.+)'. Expected one of \((.+)\)", body
    ):
        return f"{found[2]}: expected one of {found[3].replace(chr(39), '')}, got {found[1]}"
    if found := re.match(r"Error parsing (\S+): (.+)", body):
        return f"{found[1]}: {found[2]}"
    return body or " ".join(" ".join(lines).split())
