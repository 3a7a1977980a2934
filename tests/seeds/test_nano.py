"""Figures of shipped models: as their cards tell them, and measured again."""

import json
from pathlib import Path

import pytest

from deepzoo.seeds import nano, verify
from deepzoo.seeds.checks import Figure
from deepzoo.seeds.claims import Ledger, LedgerError, Line, read
from deepzoo.zoo import catalog, cli
from deepzoo.zoo.generate import Statistics

GREEDY, SAMPLED = "accuracy, greedy", "accuracy, temperature 1"
TEXT = f"""
[[claim]]
name = "greedy"
topic = "Nano"
claim = "v2-nano is better when it does not draw lots."
source = "its card"
certainty = "A"
figure = 6.4
unit = "points"
relation = "sign"
check = "gain"
inputs = {{ later = {{ model = "v2-nano", line = "{GREEDY}" }}, earlier = {{ model = "v2-nano", line = "{SAMPLED}" }} }}
ours = 6.4
interval = [3.8, 9.2]
how = "One share minus the other."
command = "deepzoo seeds check greedy"
verdict = "consistent"

[[line]]
line = "{GREEDY}"
task = "arithmetic"
problems = 24
max_tokens = 128
temperature = 0.0
"""  # noqa: E501

SHARE = f'inputs = {{ of = {{ model = "v2-nano", line = "{GREEDY}" }} }}\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.toml"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def ledger(path: Path) -> Ledger:
    return read(path)


def test_a_card_tells_a_share_and_its_interval():
    assert nano.on_card("v2-nano", GREEDY) == (98.4, 96.9, 99.2)
    assert nano.on_card("v2-nano", SAMPLED) == (92.0, 89.3, 94.1)


def test_a_line_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with pytest.raises(LedgerError, match=r"no line 'accuracy'; there are .*'accuracy, greedy'"):
        nano.on_card("v2-nano", "accuracy")
    with pytest.raises(LedgerError, match=r"card of v2-nano: seed: expected .*, got '0'"):
        nano.on_card("v2-nano", "seed")
    hf = catalog.config("moonlight-16b-a3b").to_hf() | {"num_hidden_layers": 2}
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf))
    monkeypatch.setattr(catalog, "PRETRAINED", tmp_path)
    with pytest.raises(LedgerError, match="the card of tiny has no line 'x'; there are none"):
        nano.on_card("tiny", "x")


def test_a_gain_is_read_from_cards(ledger: Ledger):
    (finding,) = verify.check(ledger, ledger.claims)
    assert finding.contradictions == ()
    # Newcombe's: sqrt(1.5^2 + 2.1^2) below, sqrt(0.8^2 + 2.7^2) above.
    assert finding.found == pytest.approx((6.4, 6.4 - 2.581, 6.4 + 2.816), abs=1e-3)


def test_a_recorded_interval_that_is_not_the_cards_is_a_contradiction(path: Path):
    path.write_text(TEXT.replace("[3.8, 9.2]", "[3.8, 9.1]"), encoding="utf-8")
    ledger = read(path)
    (finding,) = verify.check(ledger, ledger.claims)
    assert finding.contradictions == (
        "greedy: the ledger records 6.4 points (interval 3.8 to 9.1) as ours, computed 6.4 (95%"
        " interval 3.8 to 9.2), tolerance 0.05",
    )


def test_the_table_shows_the_interval(path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["seeds", "--ledger", str(path)]) == 0
    out = capsys.readouterr().out
    assert "\t+6.4 points\t+6.4 (95% interval 3.8 to 9.2)\tconsistent\t" in out


def test_gains_need_an_interval(path: Path):
    path.write_text(TEXT.replace("interval = [3.8, 9.2]\n", ""), encoding="utf-8")
    with pytest.raises(LedgerError, match="'greedy': interval goes with figures of cards"):
        read(path)


def test_a_gain_whose_interval_reaches_0_is_a_contradiction(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
):
    told = {GREEDY: Figure(98.4, 92.0, 99.9), SAMPLED: Figure(92.0, 89.3, 98.0)}
    monkeypatch.setattr(nano, "on_card", lambda model, line: told[line])
    (finding,) = verify.check(ledger, ledger.claims)
    against, stale = finding.contradictions
    assert against == (
        "greedy: published 6.4 points, computed 6.4 (95% interval -2.4 to 9.5), expected on the"
        " same side of 0, tolerance 0"
    )
    assert stale.startswith("greedy: the ledger records 6.4 points (interval 3.8 to 9.2)")


def test_evaluate_measures_the_lines_that_it_knows(ledger: Ledger, monkeypatch: pytest.MonkeyPatch):
    asked, said = [], []

    def measured(model: str, line: Line) -> Figure:
        asked.append((model, line.line, line.problems))
        return Figure(97.0, 95.0, 98.5)

    monkeypatch.setattr(nano, "measured", measured)
    twice = (*ledger.claims, *ledger.claims)
    findings = list(verify.check(ledger, twice, evaluate=True, say=said.append))
    assert asked == [("v2-nano", GREEDY, 24)]  # once for both, and the other is on its card alone
    assert said == ["measuring v2-nano: accuracy, greedy"]
    assert [f.found.value for f in findings] == [5.0, 5.0]  # not the recorded 6.4, yet no stale one
    assert [f.contradictions for f in findings] == [(), ()]


def test_a_model_that_is_worse_than_its_card_is_a_contradiction(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(nano, "measured", lambda model, line: Figure(95.0, 93.0, 96.5))
    assert cli.main(["seeds", "check", "--evaluate", "--ledger", str(path)]) == 1
    err = capsys.readouterr().err
    assert (
        "contradiction: greedy: the card of v2-nano tells 98.4 (95% interval 96.9 to 99.2) as"
        " 'accuracy, greedy', measured 95.0 (95% interval 93.0 to 96.5), and the intervals are"
        " apart\n"
    ) in err


def test_a_shipped_model_is_measured(path: Path, capsys: pytest.CaptureFixture[str]):
    share = TEXT.replace(TEXT[TEXT.index("inputs") : TEXT.index("ours")], SHARE)
    share = share.replace('relation = "sign"', "tolerance = 0.05").replace("gain", "share")
    path.write_text(share.replace("= 6.4", "= 98.4"), encoding="utf-8")
    assert cli.main(["seeds", "check", "--evaluate", "--json", "--ledger", str(path)]) == 0
    out, err = capsys.readouterr()
    (row,) = json.loads(out)
    assert err == "measuring v2-nano: accuracy, greedy\n"
    # The card's 96.9% make fewer than 22 of 24 right a matter of 3 in 100.
    found = row["computed"]
    assert found["value"] >= 100 * 22 / 24
    assert found["low"] <= 98.4 <= found["high"]
    assert found["high"] - found["low"] > 5.0  # so few problems say little


def test_drafts_are_counted(monkeypatch: pytest.MonkeyPatch):
    def load(name: str, **options: object) -> str:
        assert (name, options) == ("tiny", {"dtype": "float32", "mtp": True})
        return name

    def generate(model: str, prompts: list[str], *, statistics: Statistics, **options: object):
        assert (model, len(prompts), len(set(prompts))) == ("tiny", 4, 4)
        assert options["speculative"] is True
        assert (options["raw"], options["temperature"], options["max_tokens"]) == (True, 0.6, 480)
        statistics.drafted, statistics.accepted = 80, 56

    monkeypatch.setattr(nano, "load", load)
    monkeypatch.setattr(nano, "generate", generate)
    line = Line(line="drafts", task="arithmetic", problems=4, drafts=True)
    # Wilson's interval of 56 of 80.
    assert nano.measured("tiny", line) == pytest.approx((70.0, 59.23, 78.94), abs=0.01)
