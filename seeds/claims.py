"""The ledger `claims.toml`, read strictly: every claim is complete, or the file is refused.

A claim has a figure as it was published, ours, and a verdict. Numbers are decimals as they are
written: "5.60" says more than "5.6".
"""

import inspect
import re
import tomllib
from dataclasses import MISSING, dataclass, fields, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, get_args

from deepzoo.seeds import checks
from deepzoo.seeds.checks import Figure
from deepzoo.zoo.card import Grade
from deepzoo.zoo.errors import DeepzooError

LEDGER = Path(__file__).parent / "claims.toml"
LIMIT = 1 << 20  # bytes of a ledger

VERDICTS = {
    "reproduced": "our code arrives at the figure from released configs",
    "consistent": "published figures imply it by arithmetic, or it holds for our own small models",
    "not reproducible here": "it can be neither computed nor measured here, or does not come"
    " out; the reason is given",
}
RELATIONS = {
    "equals": "no further from the figure than the tolerance",
    "below": "below the figure",
    "above": "above the figure",
    "sign": "on the same side of 0 as the figure, with the whole interval",
}
GRADES = get_args(Grade.__value__)


def half_digit(number: Decimal) -> float:
    """Half a unit of the last digit of a number as it is written."""
    exponent = number.as_tuple().exponent
    assert isinstance(exponent, int)
    return 0.5 * 10.0**exponent


class LedgerError(DeepzooError):
    """A ledger that cannot be read, or a claim in it that is not complete."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """One claim.

    Attributes:
        name: what commands call it.
        topic: heading of its part of the table.
        claim: what is claimed, in our words.
        source: paper, section and table; or a press article with its month.
        certainty: A read in the source, B told by another, C recalled.
        figure: as published; None where no figure was.
        written: how the source writes it, where that is not a single number.
        unit: of the figures.
        relation: what the figure says about ours: a key of `RELATIONS`.
        tolerance: in `unit`, how far ours may be from the figure.
        check: name of the function in `CHECKS` that computes ours; empty for none.
        inputs: its arguments.
        ours: what it computed, rounded as written.
        interval: 95% interval of ours, where it is measured on shipped models.
        how: how ours is computed, or why it cannot be compared as it stands.
        command: what prints or checks it, or would on another machine; empty for nothing.
        verdict: a key of `VERDICTS`.
        why: the reason, where it is not reproducible here.
    """

    name: str
    topic: str
    claim: str
    source: str
    certainty: Grade
    figure: Decimal | None = None
    written: str = ""
    unit: str
    relation: str = "equals"
    tolerance: Decimal | None = None
    check: str = ""
    inputs: dict[str, Any]
    ours: Decimal | None = None
    interval: tuple[Decimal, Decimal] | None = None
    how: str = ""
    command: str = ""
    verdict: str
    why: str = ""

    @property
    def recorded(self) -> tuple[Decimal, ...]:
        """`ours` and the ends of its interval, where it has one."""
        return () if self.ours is None else (self.ours, *(self.interval or ()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """How a figure of a shipped model's card is measured again.

    Attributes:
        line: its key in the card's `training`.
        task: whose held-out problems are answered, see recipes/parts/problems.py.
        problems, max_tokens, temperature, top_p, seed: see recipes/parts/accuracy.py.
        drafts: measure the share of the MTP layer's drafts that stand, not that of right answers.
    """

    line: str
    task: str
    problems: int = 500
    max_tokens: int = 480
    temperature: float = 0.6
    top_p: float = 0.95
    seed: int = 0
    drafts: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """claims: in the order of the file. lines: by their key in a card."""

    claims: tuple[Claim, ...]
    lines: dict[str, Line]


def read(path: Path = LEDGER) -> Ledger:
    """The ledger of a file.

    Raises:
        LedgerError: the file cannot be read, or a claim is not complete; one line says which.
    """
    tables = _tables(path)
    _need(not (set(tables) - {"claim", "line"}), f"{path}: expected [[claim]] and [[line]] only")
    claims, lines = [], {}
    for number, table in enumerate(_list(path, tables, "claim"), 1):
        where = f"{path}: claim {table.get('name', number)!r}"
        claim = _claim(where, table)
        _need(all(claim.name != c.name for c in claims), f"{where}: there are two of that name")
        claims.append(claim)
    for number, table in enumerate(_list(path, tables, "line"), 1):
        where = f"{path}: line {table.get('line', number)!r}"
        line = Line(**_values(where, Line, table))
        _need(line.line not in lines, f"{where}: there are two of that name")
        _need(line.problems > 0 and line.max_tokens > 0, f"{where}: counts start at 1")
        lines[line.line] = line
    _need(bool(claims), f"{path}: there is no [[claim]]")
    return Ledger(claims=tuple(claims), lines=lines)


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise LedgerError(message)


def _tables(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        data = file.read(LIMIT + 1)
    _need(len(data) <= LIMIT, f"{path}: larger than {LIMIT:,} bytes; not a ledger")
    try:
        return tomllib.loads(data.decode("utf-8"), parse_float=Decimal)
    except UnicodeDecodeError:
        raise LedgerError(f"{path}: not UTF-8 text; expected TOML") from None
    except tomllib.TOMLDecodeError as error:
        raise LedgerError(f"{path}: not TOML: {error}") from None
    except RecursionError:
        raise LedgerError(f"{path}: nested too deeply") from None


def _list(path: Path, tables: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = tables.get(key, [])
    whole = isinstance(found, list) and all(isinstance(table, dict) for table in found)
    _need(whole, f"{path}: {key} must be a list of tables, written [[{key}]]")
    return found


def _values(where: str, kind: type, table: dict[str, Any]) -> dict[str, Any]:
    """The values of a table by the fields of a dataclass, each of the right type."""
    known = {field.name: field for field in fields(kind)}
    for key in table:
        _need(key in known, f"{where}: unknown key {key!r}; expected {', '.join(known)}")
    for key, field in known.items():
        needed = field.default is MISSING and key not in table
        _need(not needed, f"{where}: {key} is missing")
    return {key: _value(f"{where}: {key}", known[key].type, v) for key, v in table.items()}


def _value(where: str, kind: Any, value: Any) -> Any:
    """`value` as `kind`; a whole number and a decimal are one kind, a truth value is neither."""
    number = isinstance(value, int | Decimal) and not isinstance(value, bool)
    if kind in (str, Grade):
        clean = isinstance(value, str) and value and value == value.strip() and value.isprintable()
        _need(bool(clean), f"{where}: expected a text of one line, got {value!r}")
        return value
    if kind is bool:
        _need(isinstance(value, bool), f"{where}: expected true or false, got {value!r}")
        return value
    if kind is int:
        _need(number and not isinstance(value, Decimal), f"{where}: expected a whole number")
        return value
    if kind == dict[str, Any]:
        _need(isinstance(value, dict), f"{where}: expected a table, got {value!r}")
        return value
    if kind == tuple[Decimal, Decimal] | None:
        if not isinstance(value, list) or len(value) != 2:
            raise LedgerError(f"{where}: expected a list of two numbers")
        return tuple(_value(where, Decimal, one) for one in value)
    if kind == list[float]:
        if not isinstance(value, list) or not value:
            raise LedgerError(f"{where}: expected a list of numbers")
        return [_value(where, float, one) for one in value]
    _need(number and Decimal(value).is_finite(), f"{where}: expected a number, got {value!r}")
    return float(value) if kind is float else Decimal(value)


def _claim(where: str, table: dict[str, Any]) -> Claim:
    claim = Claim(**_values(where, Claim, {"inputs": {}} | table))
    known = {"certainty": GRADES, "relation": RELATIONS, "verdict": VERDICTS}
    for key, values in known.items():
        value = getattr(claim, key)
        _need(value in values, f"{where}: {key} {value!r}; expected one of {', '.join(values)}")
    _need(bool(re.fullmatch(r"[a-z0-9-]+", claim.name)), f"{where}: name: expected a-z, 0-9 and -")
    unable = claim.verdict == "not reproducible here"
    _need(unable == bool(claim.why), f"{where}: why goes with 'not reproducible here', and only so")
    _need(unable or bool(claim.check), f"{where}: {claim.verdict}, but there is no check")
    if claim.check:
        whole = claim.ours is not None and claim.how and claim.command
        _need(bool(whole), f"{where}: a check needs ours, how and command")
        inputs = _inputs(where, claim.check, claim.inputs)
        compared = not unable and claim.figure is not None and claim.relation == "equals"
    else:
        bare = not claim.recorded and not claim.inputs
        _need(bare and not claim.interval, f"{where}: ours and inputs need a check")
        inputs, compared = {}, False
    bare = claim.relation == "equals" and not claim.written
    _need(claim.figure is not None or bare, f"{where}: figure is missing")
    measured = any(isinstance(value, dict) for value in inputs.values())
    _need(measured == bool(claim.interval), f"{where}: interval goes with figures of cards")
    given = claim.tolerance is not None
    _need(given == compared, f"{where}: tolerance goes with a figure that ours shall equal")
    _need((claim.tolerance or 0) >= 0, f"{where}: tolerance is negative")
    _need(claim.relation != "sign" or bool(claim.figure), f"{where}: figure 0 has no sign")
    return replace(claim, inputs=inputs)


def _inputs(where: str, check: str, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments for a check, as its signature says; a figure of a card stays {model, line}."""
    known = ", ".join(checks.CHECKS)
    _need(check in checks.CHECKS, f"{where}: no check is called {check!r}; there are {known}")
    parameters = inspect.signature(checks.CHECKS[check]).parameters
    for key in given:
        _need(key in parameters, f"{where}: {check} has no input {key!r}")
    for key, parameter in parameters.items():
        needed = parameter.default is parameter.empty and key not in given
        _need(not needed, f"{where}: {check} needs the input {key}")
    out = {}
    for key, value in given.items():
        kind, place = parameters[key].annotation, f"{where}: input {key}"
        if kind is Figure:
            table = isinstance(value, dict) and set(value) == {"model", "line"}
            _need(table, f"{place}: expected a table of model and line")
            out[key] = {name: _value(place, str, text) for name, text in value.items()}
        else:
            out[key] = _value(place, kind, value)
    return out
