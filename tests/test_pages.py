"""Pages name what exists: tests of the README's table, links between pages, the version cited."""

import datetime
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/*.md")]


def table(text: str) -> list[list[str]]:
    """Cells of the rows of the README's table of what works."""
    section = text.partition("## What works\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert lines[:2] == ["| feature | test | hardware | date |", "|---|---|---|---|"]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def named(cell: str) -> list[str]:
    """Patterns of files in a cell: `a_{b,c}.py` is two, * is any text."""
    found = []
    for text in re.findall(r"`([^`]+)`", cell):
        before, choices, after = re.fullmatch(r"([^{]*)(?:\{(.*)\})?(.*)", text).groups()  # type: ignore[union-attr]
        found += [before + one + after for one in (choices or "").split(",")]
    return found


def faults(text: str, root: Path = ROOT) -> list[str]:
    """What is wrong with the table."""
    wrong = []
    for feature, test, hardware, date in table(text):
        patterns = named(test)
        if not patterns:
            wrong.append(f"{feature}: names no test")
        for pattern in patterns:
            files = list(root.glob(pattern))
            if not files:
                wrong.append(f"{feature}: there is no {pattern}")
            if any(f.suffix == ".py" and "def test_" not in f.read_text() for f in files):
                wrong.append(f"{feature}: {pattern} holds no test")
        if not hardware:
            wrong.append(f"{feature}: no hardware")
        if datetime.date.fromisoformat(date) > datetime.date.today():
            wrong.append(f"{feature}: {date} is to come")
    return wrong


def test_what_works_names_tests_that_exist():
    assert len(table(README)) >= 20
    assert faults(README) == []


ROW = "| feature | test | hardware | date |\n|---|---|---|---|\n| it works | {} | {} | {} |\n"


@pytest.mark.parametrize(
    ("cells", "fault"),
    [
        (("`tests/test_pages.py`", "CPU", "2026-11-25"), None),
        (("`tests/test_{pages,house}.py`", "CPU", "2026-11-25"), None),
        (("`tests/test_{pages,horse}.py`", "CPU", "2026-11-25"), "no tests/test_horse.py"),
        (("`tests/conftest.py`", "CPU", "2026-11-25"), "holds no test"),
        (("by eye", "CPU", "2026-11-25"), "names no test"),
        (("`tests/test_pages.py`", "", "2026-11-25"), "no hardware"),
        (("`tests/test_pages.py`", "CPU", "9999-01-01"), "is to come"),
    ],
)
def test_a_row_that_lies_is_found(cells: tuple[str, str, str], fault: str | None):
    found = faults("## What works\n" + ROW.format(*cells))
    assert found == [] if fault is None else fault in found[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    gone = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert gone == []


def test_the_version_cited_is_the_packages():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in cited
    assert f"version = {{{version}}}" in README
