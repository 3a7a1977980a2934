"""The ledger: complete as it ships; where it is not, one line names the place."""

import re
import shlex
from collections.abc import Callable
from decimal import Decimal
from importlib import import_module
from pathlib import Path

import pytest

from deepzoo.seeds.checks import CHECKS
from deepzoo.seeds.claims import LEDGER, VERDICTS, LedgerError, half_digit, read
from deepzoo.zoo import cli
from deepzoo.zoo.cli import usage

CLAIMS = read().claims
SAMPLE = """
[[claim]]
name = "sum"
topic = "Sums"
claim = "One and two are three."
source = "own"
certainty = "A"
figure = 3.0
unit = "apples"
tolerance = 0.05
check = "total"
inputs = { parts = [1, 2.0] }
ours = 3.00
how = "Added."
command = "deepzoo seeds check sum"
verdict = "consistent"
"""
OTHER = """
[[claim]]
name = "far"
topic = "Sums"
claim = "The moon is far."
source = "own"
certainty = "C"
unit = "km"
verdict = "not reproducible here"
why = "no ladder is long enough"
"""
LINE = '[[line]]\nline = "accuracy"\ntask = "arithmetic"\n'


def test_every_claim_that_has_to_be_there_is():
    names = {claim.name for claim in CLAIMS}
    assert names >= {
        "v2-parameters", "v2-active", "v2-cache", "v2-cache-latent", "v2-training",
        "v2-throughput", "v3-parameters", "v3-active", "v3-hours", "v3-cost", "press-six-million",
        "v3-left-out", "r1-hours", "r1-cost", "a100-platform", "a100-v2", "a100-v3", "a100-r1",
        "r1-zero-aime", "r1-ladder", "distilled-32b", "mtp-acceptance",
    }  # fmt: skip


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_a_claim_is_checked_or_says_why_not(claim):
    assert claim.verdict in VERDICTS
    assert claim.check in CHECKS or claim.why
    assert (claim.verdict == "not reproducible here") == bool(claim.why)
    assert re.search(r"arXiv \d{4}\.\d{5}|Nature|press article|deepseek-ai/", claim.source)
    assert all(len(text) < 400 for text in (claim.claim, claim.how, claim.why))


@pytest.mark.parametrize(
    "command", sorted({c.command for c in CLAIMS if c.command}), ids=lambda text: text
)
def test_the_command_of_a_claim_parses(command: str):
    program, name, *args = shlex.split(command)
    assert program == "deepzoo"
    module = import_module(f"deepzoo.zoo.cli.{name}")
    if name == "train":
        recipe = import_module(f"deepzoo.recipes.{args[0]}")
        assert args[args.index("--preset") + 1] in recipe.PRESETS
        fields = {"--preset", "--out"} | {f"--{f}" for f in recipe.Recipe.__dataclass_fields__}
        assert {word for word in args if word.startswith("--")} <= fields
    else:
        parsed = usage.parse(getattr(module, name.capitalize()), name, args)
        if name == "seeds":
            assert set(parsed.name) <= {claim.name for claim in CLAIMS}


def test_numbers_keep_their_digits(tmp_path: Path):
    path = tmp_path / "ledger.toml"
    path.write_text(SAMPLE + OTHER + LINE, encoding="utf-8")
    ledger = read(path)
    one, other = ledger.claims
    assert (str(one.figure), str(one.ours), one.tolerance) == ("3.0", "3.00", Decimal("0.05"))
    assert one.ours is not None
    assert half_digit(one.ours) == 0.005
    assert one.inputs == {"parts": [1.0, 2.0]}
    assert (other.figure, other.check) == (None, "")
    assert (ledger.lines["accuracy"].problems, ledger.lines["accuracy"].top_p) == (500, 0.95)


def _without(key: str) -> Callable[[str], str]:
    return lambda text: re.sub(rf"(?m)^{key} = .*\n", "", text, count=1)


def _with(key: str, value: str) -> Callable[[str], str]:
    return lambda text: re.sub(rf"(?m)^{key} = .*$", lambda _: f"{key} = {value}", text, count=1)


BAD = [
    *((_without(key), f"'sum': {key} is missing") for key in ("claim", "source", "unit")),
    (_without("name"), "claim 1: name is missing"),
    (_without("certainty"), "certainty is missing"),
    (_without("verdict"), "verdict is missing"),
    (_without("ours"), "a check needs ours, how and command"),
    (_without("how"), "a check needs ours, how and command"),
    (_without("command"), "a check needs ours, how and command"),
    (_without("tolerance"), "tolerance goes with a figure that ours shall equal"),
    (_without("figure"), "tolerance goes with a figure that ours shall equal"),
    (_without("check"), "consistent, but there is no check"),
    (_without("inputs"), "total needs the input parts"),
    (_without("why"), "'far': why goes with 'not reproducible here'"),
    (_with("verdict", '"proved"'), "verdict 'proved'; expected one of reproduced, consistent"),
    (_with("verdict", '"not reproducible here"'), "why goes with 'not reproducible here'"),
    (_with("certainty", '"D"'), "certainty 'D'; expected one of A, B, C"),
    (_with("check", '"add"'), "no check is called 'add'; there are parameters"),
    (_with("inputs", '{ parts = "1" }'), "input parts: expected a list of numbers"),
    (_with("inputs", "{ parts = [true] }"), "input parts: expected a number, got True"),
    (_with("inputs", "{ parts = [1], all = 2 }"), "total has no input 'all'"),
    (_with("figure", "nan"), "figure: expected a number"),
    (_with("ours", "3.00\ninterval = [2, 4]"), "interval goes with figures of cards"),
    (_with("ours", "3.00\ninterval = [2]"), "interval: expected a list of two numbers"),
    (_with("figure", '"3"'), "figure: expected a number, got '3'"),
    (_with("tolerance", "-1"), "tolerance is negative"),
    (_with("claim", '" "'), "claim: expected a text of one line"),
    (_with("claim", '"a\\nb"'), "claim: expected a text of one line"),
    (_with("name", '"The Sum"'), "name: expected a-z, 0-9 and -"),
    (_with("name", '"far"'), "claim 'far': there are two of that name"),
    (lambda text: text + "colour = 1\n", "unknown key 'colour'"),
    (lambda text: text + LINE + "problems = 0\n", "line 'accuracy': counts start at 1"),
    (lambda text: text + LINE + LINE, "line 'accuracy': there are two of that name"),
    (lambda text: text + LINE + "task = 3\n", "not TOML"),
    (lambda text: text + "[[claim]\n", "not TOML: "),
    (lambda text: text + "[other]\n", "expected [[claim]] and [[line]] only"),
    (lambda text: "claim = 3\n", "claim must be a list of tables"),
    (lambda text: "", "there is no [[claim]]"),
    (lambda text: "#" * (1 << 20) + text, "larger than 1,048,576 bytes"),
]


@pytest.mark.parametrize(("damage", "told"), BAD)
def test_a_ledger_that_is_not_complete_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[str], str], told: str
):
    path = tmp_path / "ledger.toml"
    path.write_text(damage(SAMPLE + OTHER), encoding="utf-8")
    with pytest.raises(LedgerError) as error:
        read(path)
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert cli.main(["seeds", "check", "--ledger", str(path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"deepzoo: {path}: ")
    assert told in err


def test_a_ledger_that_is_no_text_or_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "ledger.toml"
    assert cli.main(["seeds", "--ledger", str(path)]) == 2
    assert capsys.readouterr().err == f"deepzoo: {path}: No such file or directory\n"
    path.write_bytes(b"\xff\xfe")
    assert cli.main(["seeds", "--ledger", str(path)]) == 2
    assert "not UTF-8 text" in capsys.readouterr().err
    path.write_text("x = " + "[" * 100_000, encoding="utf-8")
    assert cli.main(["seeds", "--ledger", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_ledger_ships_beside_its_reader():
    assert LEDGER.name == "claims.toml"
    assert LEDGER.is_file()
