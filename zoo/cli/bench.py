"""`deepzoo bench cpu`: speed on this machine, alone or against a peer."""

import json
import sys
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from deepzoo.zoo.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure decode and prefill of a 135M-parameter V2 model with random weights, in float32.

    Example: deepzoo bench cpu --against transformers --peer-python peer/bin/python
    """

    what: Annotated[Literal["cpu"], tyro.conf.Positional]
    """What to measure."""
    against: Annotated[str | None, tyro.conf.arg(metavar="PEER")] = None
    """A peer to measure in turn with us: transformers."""
    peer_python: Annotated[str | None, tyro.conf.arg(metavar="PYTHON")] = None
    """The Python of an environment in which the peer is installed."""
    rounds: int = 5
    """Measured rounds of each case; medians are printed."""
    json: bool = False
    """Print the figures as JSON."""


def run(command: Bench) -> int:
    """Prints the table and returns the exit status."""
    from deepzoo.zoo.bench import cpu

    if command.rounds < 1:
        raise RequestError(f"--rounds is {command.rounds}; expected at least 1")
    with Console(stderr=True).status("starting") as status:
        rows, facts = cpu.bench(
            command.against, command.peer_python, command.rounds, lambda text: status.update(text)
        )
    if command.json:
        print(json.dumps(facts | {"rows": [row._asdict() for row in rows]}, indent=2))
        return 0
    table = _table(rows, command.against)
    if sys.stdout.isatty():
        shown = Table(*table[0])
        for line in table[1:]:
            shown.add_row(*line)
        Console().print(shown)
    else:
        for n, line in enumerate(table):
            print("| " + " | ".join(line) + " |")
            if n == 0:
                print("|" + " --- |" * len(line))
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    print(
        f"{facts['parameters'] / 1e6:.0f}M parameters, {facts['dtype']}, {facts['threads']}"
        " threads of"
        f" {facts['cpu']}, medians of {facts['rounds']} rounds, {facts['date']}; {versions}"
    )
    return 0


def _table(rows: list[Any], against: str | None) -> list[list[str]]:
    peer = [] if against is None else [f"{against}, tokens/s", "ratio"]
    lines = [["case", "deepzoo, tokens/s", *peer]]
    for row in rows:
        other = [] if against is None else [f"{row.peer_rate:.1f}", f"{row.ratio:.2f}"]
        lines.append([row.name, f"{row.rate:.1f}", *other])
    return lines
