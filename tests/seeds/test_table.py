"""The ledger for people, and the README's table that is printed from it."""

import json
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from deepzoo.seeds import claims, table
from deepzoo.zoo import cli

SHIPPED = claims.read()
README = claims.LEDGER.parent / "README.md"


def _part() -> str:
    text = README.read_text(encoding="utf-8")
    found = re.search(r"<!-- claims: begin -->\n(.*?)\n<!-- claims: end -->", text, re.S)
    assert found is not None
    return found[1]


def test_the_readme_is_fresh():
    assert _part() == table.markdown(SHIPPED), "`deepzoo seeds --write` writes it anew"


def test_the_readme_tells_the_verdicts_as_the_code_does():
    text = README.read_text(encoding="utf-8")
    for verdict, meaning in claims.VERDICTS.items():
        assert f"* **{verdict}**: {meaning.split(',')[0]}" in text


def test_write_writes_that_part_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "seeds"
    folder.mkdir()
    shutil.copy(claims.LEDGER, folder)
    (folder / "README.md").write_text("a\n<!-- claims: begin -->\nold\n<!-- claims: end -->\nb\n")
    monkeypatch.setattr(claims, "LEDGER", folder / "claims.toml")
    assert cli.main(["seeds", "--write"]) == 2
    assert "--write needs a checkout" in capsys.readouterr().err
    (tmp_path / "pyproject.toml").touch()
    assert cli.main(["seeds", "--write"]) == 0
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text == f"a\n<!-- claims: begin -->\n{_part()}\n<!-- claims: end -->\nb\n"


@pytest.mark.parametrize("args", [["--write", "v2-cache"], ["check", "--write"]])
def test_write_goes_with_the_whole_list(args: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.main(["seeds", "list", *args] if args[0] != "check" else ["seeds", *args]) == 2
    assert capsys.readouterr().err.startswith("deepzoo: --write is for `seeds list`")


@pytest.mark.parametrize("width", [80, 120])
def test_the_overview_fits_and_loses_nothing(width: int):
    console = Console(width=width, force_terminal=False, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(table.overview(SHIPPED.claims, width))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= width
    text = "".join("".join(lines).split())
    assert "…" not in text
    head = lines[1]
    assert ("source" in head) == (width == 120)
    start = head.index("source") if width == 120 else head.index("published")
    told = " ".join(" ".join(line[:start] for line in lines).split())
    for claim in SHIPPED.claims:
        assert f"{claim.claim} {claim.name}" in told
    verdicts = head.index("verdict")
    said = " ".join(" ".join(line[verdicts:] for line in lines[3:]).split())
    for verdict in claims.VERDICTS:
        count = sum(claim.verdict == verdict for claim in SHIPPED.claims)
        assert said.count(verdict) == count


def test_the_commands_draw_tables_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["seeds", "check", "v2-parameters", "v3-cost"]) == 0
    checked = capsys.readouterr().out
    assert "235.741" in checked
    assert checked.endswith("2 of 2 claims computed again, 0 contradicted\n")
    assert cli.main(["seeds", "list", "v2-parameters"]) == 0
    listed = capsys.readouterr().out
    assert cli.main(["seeds", "show", "v2-cache-latent"]) == 0
    shown = capsys.readouterr().out
    assert "V2 has 236 billion parameters." in listed
    assert "11.1 points" in shown
    for text in (re.sub(r"\x1b\[[\d;]*m", "", drawn) for drawn in (checked, listed, shown)):
        assert "\t" not in text
        assert max(map(len, text.splitlines())) <= 80


def test_list_and_show_through_a_pipe(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["seeds"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == [claim.name for claim in SHIPPED.claims]
    assert {len(row) for row in rows} == {6}
    told = ["V2 has 236 billion parameters.", "236 billion", "235.741", "reproduced"]
    assert rows[0][1:5] == told
    assert cli.main(["seeds", "show", "v2-cache", "v3-left-out"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("v2-cache\n  claim: V2 needs 93.3% less")
    assert "  published: 93.3% less\n  tolerance: 0.05\n  ours: 93.34\n" in out
    assert "6 bits" in out
    assert "v3-left-out\n" in out and "  published: no figure\n" in out


def test_json_holds_numbers(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["seeds", "list", "press-six-million", "--json"]) == 0
    (claim,) = json.loads(capsys.readouterr().out)
    assert (claim["figure"], claim["ours"], claim["relation"]) == (6, 5.576, "below")
    assert claim["inputs"] == {"product": [2788, 2], "over": [1000]}


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["show", "v2"], "no claim is called 'v2'; `deepzoo seeds` lists all"),
        (["list", "--evaluate"], "--evaluate goes with `seeds check`"),
        (["prove"], "expected one of list, show, check, got 'prove'"),
    ],
)
def test_a_mistake_is_one_line(args: list[str], told: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["seeds", *args]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert told in err
