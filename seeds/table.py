"""The ledger for people: a table for terminals, Markdown for the README, and a claim in full."""

from collections.abc import Iterator, Sequence
from decimal import Decimal
from itertools import groupby

from rich import box
from rich.table import Table
from rich.text import Text

from deepzoo.seeds.claims import VERDICTS, Claim, Ledger
from deepzoo.seeds.verify import Finding

_SIGNS = {"equals": "", "below": "below ", "above": "above ", "sign": ""}
_STYLES = {"reproduced": "green", "consistent": "cyan", "not reproducible here": "yellow"}
MARKER = "claims"  # of the part of README.md that `deepzoo seeds --write` writes


def number(value: Decimal | None) -> str:
    """A figure as it is written, with commas; empty for none."""
    return "" if value is None else f"{value:,}"


def published(claim: Claim) -> str:
    """The figure as it was published, with its unit."""
    sign = "+" if claim.relation == "sign" and claim.figure and claim.figure > 0 else ""
    if claim.figure is None:
        return ""
    figure = claim.written or number(claim.figure)
    return f"{_SIGNS[claim.relation]}{sign}{_with_unit(figure, claim.unit)}"


def ours(claim: Claim) -> str:
    """Our figure, with its interval if it has one, and with its unit where none was published."""
    if claim.ours is None:
        return ""
    sign = "+" if claim.relation == "sign" and claim.ours > 0 else ""
    figure = f"{sign}{number(claim.ours)}"
    if claim.figure is None:
        figure = _with_unit(figure, claim.unit)
    ends = " to ".join(map(number, claim.interval or ()))
    return figure + (f" (95% interval {ends})" if ends else "")


def _with_unit(figure: str, unit: str) -> str:
    return f"{figure}{'' if unit.startswith('%') else ' '}{unit}"


def row(claim: Claim) -> tuple[str, ...]:
    """What a program reads from a line: name, claim, published, ours, verdict, source."""
    shown = claim.name, claim.claim, published(claim), ours(claim), claim.verdict, claim.source
    return tuple(text or "-" for text in shown)


def overview(claims: Sequence[Claim], width: int) -> Table:
    """All claims, in sections; with their sources where there is room.

    Args:
        claims: in the order of their topics.
        width: columns of the terminal.
    """
    wide = width >= 110
    headings = ["claim", *(["source"] if wide else []), "published", "ours", "verdict"]
    table = Table(*headings, box=box.SIMPLE_HEAD, pad_edge=False)
    for column, most in zip(table.columns[-3:], (16, 13, 16), strict=True):
        column.max_width = most
    for topic, some in groupby(claims, key=lambda claim: claim.topic):
        table.add_section()
        table.add_row(Text(topic, style="bold"))
        for claim in some:
            told = Text.assemble(claim.claim, " ", (claim.name, "dim italic"))
            verdict = Text(claim.verdict, style=_STYLES[claim.verdict])
            source = [claim.source] if wide else []
            table.add_row(told, *source, published(claim) or "-", ours(claim) or "-", verdict)
    return table


def results(findings: Sequence[Finding]) -> Table:
    """What was computed anew."""
    table = Table(
        "claim", "published", "tolerance", "computed", "", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for column in table.columns[1:4]:
        column.justify = "right"
    for finding in findings:
        *cells, verdict = result(finding)
        style = "bold red" if finding.contradictions else _STYLES[finding.claim.verdict]
        table.add_row(*cells, Text(verdict, style=style))
    return table


def result(finding: Finding) -> tuple[str, ...]:
    """Name, published figure, tolerance, computed figure, and the verdict that stands or falls."""
    claim, found = finding.claim, finding.found
    computed = f"{found.value:.6g}"
    if found.low != found.high:
        computed = f"{found.value:.1f} ({found.low:.1f} to {found.high:.1f})"
    verdict = "CONTRADICTION" if finding.contradictions else claim.verdict
    figure = f"{_SIGNS[claim.relation]}{number(claim.figure)}" if claim.figure is not None else "-"
    return claim.name, figure, number(claim.tolerance) or "-", computed, verdict


def full(claim: Claim) -> Iterator[tuple[str, str]]:
    """Everything that the ledger says of a claim."""
    yield "claim", claim.claim
    yield "source", f"{claim.source} [{claim.certainty}]"
    yield "published", published(claim) or "no figure"
    if claim.tolerance is not None:
        yield "tolerance", number(claim.tolerance)
    yield "ours", ours(claim) or "none"
    if claim.how:
        yield "how", claim.how
    yield "verdict", claim.verdict + (f": {claim.why}" if claim.why else "")
    if claim.command:
        yield "command", claim.command


def markdown(ledger: Ledger) -> str:
    """The table of README.md, and the reasons below it."""
    lines = ["| claim | source | published | ours | verdict |", "|---|---|---|---|---|"]
    for topic, some in groupby(ledger.claims, key=lambda claim: claim.topic):
        lines.append(f"| **{topic}** | | | | |")
        for claim in some:
            cells = [
                f"{claim.claim} `{claim.name}`", f"{claim.source} [{claim.certainty}]",
                published(claim), ours(claim), claim.verdict,
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    counts = {v: sum(claim.verdict == v for claim in ledger.claims) for v in VERDICTS}
    told = ", ".join(f"{counts[v]} {v}" for v in VERDICTS)
    lines += ["", f"{len(ledger.claims)} claims: {told}.", ""]
    lines += ["Not reproducible here, and why:", ""]
    lines += [f"* `{claim.name}`: {claim.why}" for claim in ledger.claims if claim.why]
    return "\n".join(lines)
