"""Reports: nothing a model wrote becomes markup, pictures say the numbers, times survive a kill."""

import json
import re
import time
from xml.etree import ElementTree

import pytest

from deepzoo.recipes.parts import clock
from deepzoo.recipes.parts.clock import Clock
from deepzoo.recipes.parts.report import (
    Heading,
    Picture,
    Share,
    Table,
    Text,
    Verbatim,
    curves,
    ladder,
    markdown,
    page,
)

WRITTEN = "</pre><script>alert(1)</script> a | b \x1b[31m"
BLOCKS = [
    Heading("R1 & co", 1), Text("1 < 2"), Verbatim(f"one\n{WRITTEN}"),
    Table(["", "right"], [[WRITTEN, "5"]]), Picture("p.svg", "<svg></svg>", "a picture"),
]  # fmt: skip


def test_markdown():
    lines = markdown(BLOCKS).split("\n")
    assert lines[:3] == ["# R1 & co", "", "1 < 2"]
    assert lines[4] == "    one"
    assert lines[5].startswith("    </pre>")  # indented: code
    row = next(line for line in lines if line.endswith("| 5 |"))
    assert "a \\| b" in row
    assert "![a picture](p.svg)" in lines
    assert "\x1b" not in "".join(lines)


def test_a_page_shows_what_was_written_and_obeys_none_of_it():
    text = page("R1", BLOCKS)
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(1)") == 2
    assert "\x1b" not in text
    body = ElementTree.fromstring(re.search("<body>.*</body>", text, re.S)[0])
    assert [child.tag for child in body] == ["h1", "p", "pre", "table", "figure"]
    assert body.find("pre").text.startswith("one\n</pre>")
    assert not re.search(r"(src|href)=", text)  # it needs no other file


def test_a_ladder_puts_every_share_where_it_belongs():
    rows = [("base", [Share(0.25, 0.2, 0.3), None]), ("a<b", [Share(1, 0.9, 1), Share(0, 0, 0.1)])]
    tree = ElementTree.fromstring(ladder(rows, ["greedy", "sampled"]))
    space = "{http://www.w3.org/2000/svg}"
    texts = [node.text for node in tree.iter(f"{space}text")]
    assert [t for t in texts if t.endswith("%") and "." in t] == ["25.0%", "100.0%", "0.0%"]
    assert "a<b" in texts
    grid = {n.text: float(n.get("x")) for n in tree.iter(f"{space}text") if n.text[-1] == "%"}
    discs = [float(n.get("cx")) for n in tree.iter(f"{space}circle")][1:]  # the first: its key
    left, right = grid["0%"], grid["100%"]
    assert discs == pytest.approx([left + 0.25 * (right - left), right], abs=0.1)
    spans = [n.get("points").split() for n in tree.iter(f"{space}polyline")][6:]
    ends = [[float(p.split(",")[0]) for p in span] for span in spans]
    assert (ends[0][1] - ends[0][0]) / (right - left) == pytest.approx(0.1, abs=1e-3)
    assert len(ends) == 3


def test_curves_have_a_scale_that_holds_all_of_a_row():
    svg = curves(
        ["one", "two"], {"length": [[(1, 10), (2, 20), (4, 30)], [(1, 41)]], "none": [[], []]}
    )
    tree = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    texts = [node.text for node in tree.iter(f"{space}text")]
    assert texts.count("50") == 2  # of both panels
    assert "step 4" in texts
    height = {n.text: float(n.get("y")) for n in tree.iter(f"{space}text")}
    lowest, highest = height["0"], height["50"]
    drawn = [n.get("points").split() for n in tree.iter(f"{space}polyline")]
    (curve,) = [points for points in drawn if len(points) == 3]
    last = float(curve[-1].split(",")[1])
    assert lowest > last > highest


def test_times_add_up_over_starts(tmp_path):
    path = tmp_path / "times.json"
    first = Clock(path, every=0.01)
    with first.part("a"):
        time.sleep(0.05)
        killed = json.loads(path.read_text())["parts"]["a"]  # what a kill would leave
    assert 0.02 < killed["wall"] <= first.parts["a"]["wall"]
    with Clock(path).part("b"):
        pass
    again = Clock(path)
    with pytest.raises(KeyError), again.part("a"):
        sum(i * i for i in range(200_000))
        raise KeyError
    found = clock.read(path)["parts"]
    assert found["a"]["starts"] == 2
    assert found["b"]["starts"] == 1
    assert found["a"]["wall"] > first.parts["a"]["wall"]
    assert found["a"]["cpu"] < found["a"]["wall"] + 1
    assert clock.read(tmp_path / "none.json") == {}


def test_a_clock_that_cannot_write_in_between_counts_on(tmp_path):
    there, away = tmp_path / "there", tmp_path / "away"
    there.mkdir()
    times = Clock(there / "times.json", every=0.01)
    with times.part("one"):
        there.rename(away)
        time.sleep(0.1)
        away.rename(there)
    assert clock.read(there / "times.json")["parts"]["one"]["wall"] >= 0.1
    with pytest.raises(OSError), times.part("two"):
        there.rename(away)
