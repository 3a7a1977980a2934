"""What is committed in notebooks/: whole, small, clean, and its prose says no number that no cell
printed. Needs no Jupyter; test_run.py runs them."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
BOOKS = sorted(FOLDER.glob("[0-9]*.ipynb"))
LARGEST = 400 * 1024

# What is no measurement: code, formulas, links, papers, names of notebooks, numbered headings.
_ASIDE = re.compile(
    r"`[^`]*`|\$[^$]*\$|\[[^]]*\]\([^)]*\)|arXiv [0-9.]+|(?:sections?|eq\.|equations?) [0-9.,\- ]+"
    r"|^#+ .*$|^\d+\. ",
    re.M,
)
_NUMBER = re.compile(r"(?<![\w.,])-?\d[\d,]*(?:\.\d+)?%?(?![\w])")


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def text_of(cell: dict[str, Any]) -> str:
    """All the text that a cell's outputs hold."""
    parts = []
    for output in cell.get("outputs", ()):
        parts += [output.get("text", ""), output.get("data", {}).get("text/plain", "")]
    return "\n".join("".join(part) for part in parts)


def unprinted(cells: list[dict[str, Any]]) -> list[str]:
    """Numbers in the prose that neither the cell before it nor the one behind it printed."""
    found = []
    for at, cell in enumerate(cells):
        if cell["cell_type"] != "markdown":
            continue
        code = [i for i, c in enumerate(cells) if c["cell_type"] == "code"]
        near = [
            max((i for i in code if i < at), default=-1),
            min((i for i in code if i > at), default=-1),
        ]
        shown = " ".join(text_of(cells[i]) for i in near if i >= 0)
        printed = set(_NUMBER.findall(shown))
        prose = _ASIDE.sub(" ", "".join(cell["source"]))
        found += [number for number in _NUMBER.findall(prose) if number not in printed]
    return found


def test_there_are_notebooks():
    assert len(BOOKS) >= 2


@pytest.mark.parametrize("path", BOOKS, ids=lambda p: p.stem)
def test_it_was_run_from_top_to_bottom_without_a_fault(path: Path):
    cells = load(path)["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    outputs = [o for c in code for o in c["outputs"]]
    assert [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"] == []
    assert path.stat().st_size < LARGEST


@pytest.mark.parametrize("path", BOOKS, ids=lambda p: p.stem)
def test_it_says_what_it_is_for_and_goes_on(path: Path):
    prose = ["".join(c["source"]) for c in load(path)["cells"] if c["cell_type"] == "markdown"]
    assert prose[0].startswith("# ")
    assert "**Goal.**" in prose[0]
    assert "**You need**" in prose[0]
    assert "## What to try next" in prose[-1]


@pytest.mark.parametrize("path", BOOKS, ids=lambda p: p.stem)
def test_every_number_of_its_prose_is_printed_beside_it(path: Path):
    assert unprinted(load(path)["cells"]) == []


@pytest.mark.parametrize("path", BOOKS, ids=lambda p: p.stem)
def test_its_pictures_are_pictures(path: Path):
    cells = load(path)["cells"]
    held = [o["data"] for c in cells for o in c.get("outputs", ()) if "data" in o]
    pictures = [base64.b64decode("".join(d["image/png"])) for d in held if "image/png" in d]
    assert pictures
    assert all(p.startswith(b"\x89PNG") and len(p) > 2000 for p in pictures)
    drawn = sum("plot." in "".join(c["source"]) for c in cells if c["cell_type"] == "code")
    assert drawn >= 1


def test_a_number_that_nobody_printed_is_found():
    def cells(prose: str, printed: str) -> list[dict[str, Any]]:
        output = {"output_type": "stream", "name": "stdout", "text": [printed]}
        return [
            {"cell_type": "code", "source": "", "outputs": [output]},
            {"cell_type": "markdown", "source": [prose]},
        ]

    assert unprinted(cells("It is 3.4 times as fast.", "3.40")) == ["3.4"]
    assert unprinted(cells("It takes 93% less, 71.1 times.", "71.1, 93% of")) == []
    assert unprinted(cells("`x = 5`, $n^2$, section 2.1, arXiv 2405.04434, FP8 of V3", "")) == []
