"""Every notebook runs from a clean kernel in an empty folder, and prints what is committed.

Needs the extras `notebooks` and `aot`: `.ci/run` runs it in an environment of its own.
"""

import importlib.util
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbclient", reason="an extra: notebooks")
pytestmark = pytest.mark.filterwarnings("default")  # Jupyter's own; a notebook's fail it in run.py

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
_PART = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?|[^\s\d]+")


def _tool() -> Any:
    spec = importlib.util.spec_from_file_location("notebooks_run", FOLDER / "run.py")
    assert spec is not None and spec.loader is not None
    sys.modules["notebooks_run"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run = _tool()


def differing(committed: str, printed: str) -> list[tuple[str, str]]:
    """Words that differ, and numbers that do by more than a fiftieth; rounding errors (below 1e-2)
    by more than ten times."""
    old, new = _PART.findall(committed), _PART.findall(printed)
    if len(old) != len(new):
        return [(committed, printed)]
    return [(a, b) for a, b in zip(old, new, strict=True) if a != b and not _near(a, b)]


def _near(a: str, b: str) -> bool:
    try:
        x, y = (float(text.replace(",", "")) for text in (a, b))
    except ValueError:
        return False
    if 0 < abs(x) < 1e-2 and 0 < abs(y) < 1e-2:
        return 0.1 <= x / y <= 10
    return math.isclose(x, y, rel_tol=0.02)


@pytest.mark.parametrize("path", run.names([]), ids=lambda p: p.stem)
def test_it_runs_and_prints_what_is_committed(path: Path):
    before = run.read(path)
    after = run.executed(path, limit=1200)  # a cell, on however busy a machine
    for old, new in zip(before.cells, after.cells, strict=True):
        if old.cell_type == "code" and "varies" not in old.metadata.get("tags", ()):
            assert differing(run.printed(old), run.printed(new)) == [], old.source
            kinds = [[sorted(o.get("data", ())) for o in cell.outputs] for cell in (old, new)]
            assert kinds[0] == kinds[1], old.source


def test_other_words_and_numbers_are_found():
    assert differing("a 1.00 b 3e-06", "a 1.01 b 9e-06") == []
    assert differing("a 1.00", "a 1.10") == [("1.00", "1.10")]
    assert differing("a 3e-06", "a 3e-04") == [("3e-06", "3e-04")]
    assert differing("True", "False") == [("True", "False")]


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import warnings; warnings.warn('careful')", "careful"),
        ("import sys; print(sys.prefix)", "its output names"),
    ],
)
def test_what_must_not_be_committed_is_refused(tmp_path: Path, source: str, told: str):
    import nbformat

    path = tmp_path / "01_bad.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), path)
    with pytest.raises(run.NotebookError, match=told):
        run.executed(path)
