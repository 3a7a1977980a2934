"""`deepzoo seeds check`: passes on the ledger as it ships, and finds every changed figure."""

import dataclasses
import json
import re
from decimal import Decimal
from pathlib import Path

import pytest

from deepzoo.seeds import verify
from deepzoo.seeds.checks import Figure
from deepzoo.seeds.claims import LEDGER, Claim, read
from deepzoo.zoo import catalog, cli

SHIPPED = read()
FINDINGS = {finding.claim.name: finding for finding in verify.check(SHIPPED, SHIPPED.claims)}
COMPARED = [
    claim
    for claim in SHIPPED.claims
    if claim.check and claim.figure is not None and claim.verdict != "not reproducible here"
]


def test_nothing_contradicts_and_everything_that_has_a_check_was_computed():
    assert [line for finding in FINDINGS.values() for line in finding.contradictions] == []
    assert list(FINDINGS) == [claim.name for claim in SHIPPED.claims if claim.check]
    assert len(FINDINGS) > 35
    assert len(COMPARED) > 30


@pytest.mark.parametrize("claim", COMPARED, ids=lambda claim: claim.name)
def test_a_changed_figure_is_found(claim: Claim):
    assert claim.figure is not None
    found, figure = FINDINGS[claim.name].found, float(claim.figure)
    step = max(2 * float(claim.tolerance or 0), 1e-3 * abs(figure))
    wrong = {
        "equals": [found.high + step, found.low - step],
        "below": [found.high - step],
        "above": [found.low + step],
        "sign": [-figure],
    }
    for changed in map(repr, wrong[claim.relation]):
        line = verify.disagreement(dataclasses.replace(claim, figure=Decimal(changed)), found)
        assert line is not None
        assert line.startswith(f"{claim.name}: published {changed} {claim.unit}, computed ")
        assert f"{found.value:{'.6g' if found.low == found.high else '.1f'}}" in line
        assert "tolerance" in line


@pytest.mark.parametrize(
    ("relation", "figure", "found", "agrees"),
    [
        ("equals", "3", Figure(3.5, 3.5, 3.5), True),
        ("equals", "3", Figure(3.6, 3.6, 3.6), False),
        ("equals", "3", Figure(3.6, 3.4, 3.8), True),
        ("equals", "3", Figure(2.0, 1.0, 2.4), False),
        ("below", "6", Figure(5.9, 5.9, 5.9), True),
        ("below", "6", Figure(5.9, 5.0, 6.1), False),
        ("above", "6", Figure(6.0, 6.0, 6.0), False),
        ("above", "6", Figure(7.0, 6.1, 8.0), True),
        ("sign", "62.3", Figure(9.0, 0.1, 18.0), True),
        ("sign", "62.3", Figure(9.0, -0.1, 18.0), False),
        ("sign", "-2", Figure(-9.0, -18.0, -0.1), True),
        ("sign", "-2", Figure(9.0, 0.1, 18.0), False),
    ],
)
def test_what_a_relation_asks_for(relation: str, figure: str, found: Figure, agrees: bool):
    claim = dataclasses.replace(
        COMPARED[0], relation=relation, figure=Decimal(figure),
        tolerance=Decimal("0.5") if relation == "equals" else None,
    )  # fmt: skip
    assert (verify.disagreement(claim, found) is None) == agrees
    unable = dataclasses.replace(claim, verdict="not reproducible here")
    assert verify.disagreement(unable, found) is None


def _changed(tmp_path: Path, name: str, key: str, value: str) -> Path:
    """The shipped ledger with one value of one claim changed."""
    head, table, tail = re.split(
        rf'(\[\[claim\]\]\nname = "{name}"\n(?:.+\n)+)', LEDGER.read_text(encoding="utf-8")
    )
    table, count = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", table)
    assert count == 1
    path = tmp_path / "claims.toml"
    path.write_text(head + table + tail, encoding="utf-8")
    return path


def test_a_contradiction_ends_with_1_and_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = _changed(tmp_path, "v2-parameters", "figure", "230")
    assert cli.main(["seeds", "check", "--ledger", str(path)]) == 1
    out, err = capsys.readouterr()
    assert err == (
        "deepzoo: contradiction: v2-parameters: published 230 billion, computed 235.741,"
        " tolerance 0.5\n"
    )
    assert "v2-parameters\t230\t0.5\t235.741\tCONTRADICTION\n" in out
    assert out.endswith("computed again, 1 contradicted\n")
    # Another claim of the same ledger is as right as before.
    assert cli.main(["seeds", "check", "v2-active", "--ledger", str(path)]) == 0
    assert cli.main(["seeds", "check", "v2-parameters", "--json", "--ledger", str(path)]) == 1
    (row,) = json.loads(capsys.readouterr().out.split("contradicted\n")[-1])
    assert (row["figure"], row["tolerance"], row["verdict"]) == (230, 0.5, "reproduced")
    assert row["computed"]["value"] == pytest.approx(235.74143488)
    assert len(row["contradictions"]) == 1


def test_a_recorded_figure_that_is_not_what_is_computed_is_a_contradiction_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = _changed(tmp_path, "a100-v3", "ours", "40.3")
    assert cli.main(["seeds", "check", "a100-v3", "--ledger", str(path)]) == 1
    assert capsys.readouterr().err == (
        "deepzoo: contradiction: a100-v3: the ledger records 40.3 days as ours, computed 40.2169,"
        " tolerance 0.05\n"
    )


def test_the_shipped_ledger_passes(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["seeds", "check"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    count = f"{len(FINDINGS)} of {len(SHIPPED.claims)}"
    assert out.splitlines()[-1] == f"{count} claims computed again, 0 contradicted"
    assert cli.main(["seeds", "check", "v2-throughput"]) == 0
    assert capsys.readouterr().out == "0 of 1 claims computed again, 0 contradicted\n"


def test_evaluate_says_where_there_is_nothing_to_measure(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["seeds", "check", "v3-hours", "--evaluate"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("1 of 1 claims computed again, 0 contradicted\n")
    assert err == (
        "nothing to measure: none of these claims rests on the card of a shipped model\n"
    )


def test_what_cannot_be_computed_names_the_claim(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = _changed(tmp_path, "v3-hours-per-trillion", "inputs", "{ product = [1], over = [0] }")
    assert cli.main(["seeds", "check", "--ledger", str(path)]) == 2
    told = "deepzoo: claim 'v3-hours-per-trillion': division by zero\n"
    assert capsys.readouterr() == ("", told)
    path = _changed(tmp_path, "v2-active", "inputs", '{ model = "deepseek-v2x" }')
    assert cli.main(["seeds", "check", "--ledger", str(path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "claim 'v2-active': no model is called 'deepseek-v2x'; did you mean" in err


def test_a_changed_config_is_found(monkeypatch: pytest.MonkeyPatch):
    config = dataclasses.replace(catalog.config("deepseek-v2"), num_hidden_layers=59)
    monkeypatch.setattr(catalog, "config", lambda name: config)
    claims = [claim for claim in SHIPPED.claims if claim.name in ("v2-parameters", "v2-cache")]
    lines = [line for f in verify.check(SHIPPED, claims) for line in f.contradictions]
    assert [line.split(":")[0] for line in lines] == ["v2-parameters"] * 2 + ["v2-cache"] * 2
    assert "computed 231.769, tolerance 0.5" in lines[0]  # a layer has 3.97 billion
