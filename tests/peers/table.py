"""The table of `results.json`, as it stands in README.md."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, README = HERE / "results.json", HERE / "README.md"
BEGIN, END = "<!-- run.py: begin -->", "<!-- run.py: end -->"
EVEN = 1.05  # a ratio nearer to 1 is no difference on a shared machine

type Row = Mapping[str, Any]
"""One comparison: case, unit ("s" or "MiB"), ours and theirs, a value for each round, and first,
those of the round that compiles and warms up."""


def ratio(row: Row) -> float:
    """The peer's over ours, the median of the rounds': above 1, deepzoo needs less."""
    return statistics.median(b / a for a, b in zip(row["ours"], row["theirs"], strict=True))


def ahead(row: Row, peer: str) -> str:
    """Who needs less."""
    found = ratio(row)
    if 1 / EVEN <= found <= EVEN:
        return "even"
    return "deepzoo" if found > 1 else f"**{peer}**"


def value(numbers: Sequence[float], unit: str) -> str:
    """The median: seconds with three digits, MiB without a fraction."""
    middle = statistics.median(numbers)
    if unit == "MiB":
        return f"{middle / 2**20:.0f} MiB"
    return f"{middle:.3g} s" if middle < 100 else f"{middle:.0f} s"


def line(row: Row, peer: str) -> list[str]:
    """Cells of a row; what only we can do has no peer."""
    ours = value(row["ours"], row["unit"])
    if row["theirs"] is None:
        return [row["case"], ours, "cannot", "", ""]
    theirs = value(row["theirs"], row["unit"])
    return [row["case"], ours, theirs, f"{ratio(row):.2f}", ahead(row, peer)]


def section(found: Mapping[str, Any]) -> str:
    """One peer: what was compared, the table, versions and date."""
    peer = found["peer"]
    rows = [["case", "deepzoo", peer, "ratio", "ahead"]]
    rows += [line(row, peer) for row in found["rows"]]
    cells = ["| " + " | ".join(row) + " |" for row in rows]
    cells.insert(1, "|" + " --- |" * len(rows[0]))
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    told = (
        f"{found['date']}, medians of {found['rounds']} rounds, {found['clock']},"
        f" {found['threads']} thread(s) of {found['cpu']}, load {found['load'][0]} before and"
        f" {found['load'][1]} after; {versions}"
    )
    return "\n".join([f"### {found['title']}", found["about"], "", *cells, "", told])


def starts(results: Mapping[str, Any]) -> list[str]:
    """In how many cases a peer's first round, in which we compile, is the shorter one."""
    told = []
    for found in results.values():
        timed = [row["first"] for row in found["rows"] if row["unit"] == "s" and row["theirs"]]
        won = [theirs for mine, theirs in timed if theirs < mine]
        if won:
            told.append(
                f"* the first round, which is not in the medians ({found['title']}):"
                f" {found['peer']} in {len(won)} of {len(timed)} times"
            )
    return told


def render(results: Mapping[str, Any]) -> str:
    """All of it: where a peer is ahead, then a section for each comparison."""
    if not results:
        return "Nothing is measured yet."
    lost = [
        f"* {row['case']}: {found['peer']} ({ratio(row):.2f})"
        for found in results.values()
        for row in found["rows"]
        if row["theirs"] is not None and ratio(row) < 1 / EVEN
    ]
    head = ["### Where a peer is ahead", *(lost or ["Nowhere in this table."]), *starts(results)]
    return "\n".join(head) + "\n\n" + "\n\n".join(section(s) for s in results.values())


def shown(readme: str) -> str:
    """What stands between the markers of a README."""
    return readme.split(BEGIN)[1].split(END)[0].strip()


def write(results: Mapping[str, Any]) -> None:
    """Writes results.json, and the table into README.md."""
    before, after = README.read_text().split(BEGIN)[0], README.read_text().split(END)[1]
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    README.write_text(f"{before}{BEGIN}\n{render(results)}\n{END}{after}")
