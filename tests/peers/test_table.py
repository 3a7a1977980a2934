"""README.md's table is what results.json says, and the arithmetic behind it."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"peers_{name}", HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


table, wire = _module("table"), _module("wire")
RESULTS = json.loads((HERE / "results.json").read_text())


def row(ours, theirs, unit="s", first=(1.0, 1.0)):
    return {"case": "c", "unit": unit, "ours": ours, "theirs": theirs, "first": first}


def test_the_readme_shows_the_results():
    assert table.shown((HERE / "README.md").read_text()) == table.render(RESULTS)


def test_the_results_are_whole():
    for name, found in RESULTS.items():
        assert found["rounds"] >= 5 and found["threads"] in (1, 2), name
        assert {"deepzoo", "jax", "jaxlib"} < found["versions"].keys()
        for at in found["rows"]:
            for side in (at["ours"], at["theirs"] or at["ours"]):
                assert len(side) == found["rounds"] and min(side) > 0, (name, at["case"])


def test_without_results_it_says_so():
    assert table.render({}) == "Nothing is measured yet."


def test_a_ratio_is_that_of_neighbours():
    # A slow third round hits both sides; medians of the columns would make it 3.
    assert table.ratio(row([1, 1, 10], [2, 3, 20])) == 2
    assert table.line(row([1, 1, 10], [2, 3, 20]), "P") == ["c", "1 s", "3 s", "2.00", "deepzoo"]


@pytest.mark.parametrize(
    ("theirs", "told"),
    [(1.06, "deepzoo"), (1.04, "even"), (0.96, "even"), (0.94, "**P**")],
)
def test_who_is_ahead(theirs: float, told: str):
    assert table.ahead(row([1.0], [theirs]), "P") == told


def test_values_and_what_only_we_can_do():
    assert table.value([0.01234, 0.5, 0.001], "s") == "0.0123 s"
    assert table.value([123.4], "s") == "123 s"
    assert table.value([3 << 20, 5 << 20], "MiB") == "4 MiB"
    assert table.line(row([1.0], None), "P") == ["c", "1 s", "cannot", "", ""]


def test_losses_are_told_first():
    facts = {"peer": "P", "title": "T", "about": "A", "versions": {"P": "1"}, "date": "D"}
    facts |= {"rounds": 1, "threads": 2, "cpu": "C", "clock": "W", "load": [0.1, 2.0]}
    lost = {"s": facts | {"rows": [row([2.0], [1.0]), row([1.0], [2.0])]}}
    assert table.render(lost).splitlines()[:4] == [
        "### Where a peer is ahead",
        "* c: P (0.50)",
        "",
        "### T",
    ]
    won = {"s": facts | {"rows": [row([1.0], [2.0]), row([1.0], None)]}}
    assert table.render(won).splitlines()[1:3] == ["Nowhere in this table.", ""]
    slow = {"s": facts | {"rows": [row([1.0], [2.0], first=(5.0, 4.0)), row([1.0], [2.0])]}}
    assert table.render(slow).splitlines()[2].endswith("(T): P in 1 of 2 times")


def test_what_is_measured_as_memory():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux")
    before = wire.forget()
    block = bytearray(b"x" * (64 << 20))
    found = wire.memory()
    assert 60 << 20 < found["peak"] - before < 300 << 20
    held = found["resident"]
    del block
    assert wire.memory()["peak"] >= held
    assert wire.forget() < held - (50 << 20)
