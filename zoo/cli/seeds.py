"""`deepzoo seeds`: what the papers and the press say of V2 and R1, and what of it holds here.

The ledger is a package of its own, above the recipes; it is looked for when the command runs.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepzoo.zoo.cli.options import File, Flag, hint
from deepzoo.zoo.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """List public claims about V2 and R1 with what we find, show one in full, or check them.

    list: the table. show: source, computation, command and reason of the claims that are named.
    check: compute our figures again; exits with 1 where one contradicts the ledger.

    Example: deepzoo seeds check v2-parameters
    """

    what: Annotated[Literal["list", "show", "check"], tyro.conf.Positional] = "list"
    """What to do."""
    name: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = ()
    """Claims; all where none is named."""
    evaluate: Flag = False
    """Measure the shipped models again, instead of reading their cards (check); takes minutes."""
    ledger: Annotated[File, hint("the one that ships with deepzoo")] = None
    """Another ledger."""
    write: Flag = False
    """Write the table into seeds/README.md of this checkout (list)."""
    json: Flag = False
    """Print it as JSON."""


def run(command: Seeds) -> int:
    """Prints claims or checks them; returns 1 where one is contradicted.

    Raises:
        LedgerError: the ledger is not complete, or a claim cannot be computed.
        RequestError: no such claim, or options that do not go together.
    """
    if command.evaluate and command.what != "check":
        raise RequestError("--evaluate goes with `seeds check`")
    if command.write and (command.what != "list" or command.name or command.ledger):
        raise RequestError("--write is for `seeds list` without names and without --ledger")
    source = import_module("deepzoo.seeds.claims")
    path = command.ledger or source.LEDGER
    ledger = source.read(path)
    claims = _named(ledger, command.name, path)
    if command.write:
        _write(ledger, path)
    if command.what == "check":
        return _check(command, ledger, claims)
    if command.json:
        print(json.dumps([asdict(claim) for claim in claims], indent=2, default=_plain))
    elif command.what == "show":
        _show(claims)
    else:
        _list(claims)
    return 0


def _named(ledger: Any, names: Sequence[str], path: Path) -> list[Any]:
    known = {claim.name: claim for claim in ledger.claims}
    for name in names:
        if name not in known:
            raise RequestError(f"no claim is called {name!r}; `deepzoo seeds` lists all")
    return [known[name] for name in names] if names else list(known.values())


def _write(ledger: Any, path: Path) -> None:
    table = import_module("deepzoo.seeds.table")
    kernels = import_module("deepzoo.zoo.bench.kernels")
    readme = path.parent / "README.md"
    if not (path.parents[1] / "pyproject.toml").is_file():
        raise RequestError(f"--write needs a checkout; {path.parent} is an installed package")
    kernels.write_between(readme, table.MARKER, table.markdown(ledger))


def _list(claims: list[Any]) -> None:
    table = import_module("deepzoo.seeds.table")
    if sys.stdout.isatty():
        console = Console()
        console.print(table.overview(claims, console.width))
        return
    for claim in claims:
        print("\t".join(table.row(claim)))


def _show(claims: list[Any]) -> None:
    table = import_module("deepzoo.seeds.table")
    for claim in claims:
        if not sys.stdout.isatty():
            print(claim.name)
            for key, value in table.full(claim):
                print(f"  {key}: {value}")
            continue
        grid = Table(title=claim.name, title_justify="left", title_style="bold cyan")
        grid.show_header, grid.box, grid.pad_edge = False, None, False
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column()
        for key, value in table.full(claim):
            grid.add_row(Text(key), Text(value))
        Console().print(grid)


def _check(command: Seeds, ledger: Any, claims: list[Any]) -> int:
    verify, table = (import_module(f"deepzoo.seeds.{name}") for name in ("verify", "table"))

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    rests = any(isinstance(value, dict) for claim in claims for value in claim.inputs.values())
    if command.evaluate and not rests:
        say("nothing to measure: none of these claims rests on the card of a shipped model")
    findings = list(verify.check(ledger, claims, evaluate=command.evaluate, say=say))
    wrong = [line for finding in findings for line in finding.contradictions]
    if command.json:
        rows = [
            {
                "name": finding.claim.name, "verdict": finding.claim.verdict,
                "figure": _plain(finding.claim.figure), "unit": finding.claim.unit,
                "tolerance": _plain(finding.claim.tolerance), "ours": _plain(finding.claim.ours),
                "computed": finding.found._asdict(), "contradictions": finding.contradictions,
            }
            for finding in findings
        ]  # fmt: skip
        print(json.dumps(rows, indent=2))
    else:
        if sys.stdout.isatty():
            Console().print(table.results(findings))
        else:
            for finding in findings:
                print("\t".join(table.result(finding)))
        contradicted = sum(bool(finding.contradictions) for finding in findings)
        total = f"{len(findings)} of {len(claims)} claims computed again"
        print(f"{total}, {contradicted} contradicted")
    for line in wrong:
        print(f"deepzoo: contradiction: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _plain(value: Decimal | None) -> float | None:
    return None if value is None else float(value)
