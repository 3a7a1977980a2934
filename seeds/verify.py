"""Computes our figures anew and says where one contradicts the ledger."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from deepzoo.seeds import nano
from deepzoo.seeds.checks import CHECKS, Figure, exactly
from deepzoo.seeds.claims import Claim, Ledger, LedgerError, Line, half_digit
from deepzoo.zoo.errors import DeepzooError


class Finding(NamedTuple):
    """claim: that was checked.
    found: our figure, computed now.
    contradictions: a line each; none where all is well.
    """

    claim: Claim
    found: Figure
    contradictions: tuple[str, ...]


def check(
    ledger: Ledger,
    claims: Iterable[Claim],
    *,
    evaluate: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Finding]:
    """Every claim of `claims` that has a check, in order.

    Args:
        ledger: that they are from; its lines say how a card's figure is measured again.
        claims: all or some of its claims.
        evaluate: measure figures of shipped models again, instead of reading their cards.
        say: is told what takes long.

    Raises:
        LedgerError: a check cannot be computed from its inputs; the message names the claim.
    """
    seen: dict[tuple[str, str], Figure] = {}
    for claim in claims:
        if claim.check:
            try:
                yield _checked(claim, ledger.lines if evaluate else {}, seen, say)
            except ZeroDivisionError:
                raise LedgerError(f"claim {claim.name!r}: division by zero") from None
            except DeepzooError as error:
                raise LedgerError(f"claim {claim.name!r}: {error}") from None


def _checked(
    claim: Claim,
    lines: dict[str, Line],
    seen: dict[tuple[str, str], Figure],
    say: Callable[[str], None],
) -> Finding:
    inputs, contradictions, again = dict(claim.inputs), [], False
    for key, value in claim.inputs.items():
        if not isinstance(value, dict):
            continue
        model, line = value["model"], value["line"]
        figure = told = nano.on_card(model, line)
        if line in lines:
            again = True
            if (model, line) not in seen:
                say(f"measuring {model}: {line}")
                seen[model, line] = nano.measured(model, lines[line])
            figure = seen[model, line]
            if figure.high < told.low or figure.low > told.high:
                contradictions.append(
                    f"{claim.name}: the card of {model} tells {_interval(told)} as {line!r},"
                    f" measured {_interval(figure)}, and the intervals are apart"
                )
        inputs[key] = figure
    found = CHECKS[claim.check](**inputs)
    found = found if isinstance(found, Figure) else exactly(found)
    if (against := disagreement(claim, found)) is not None:
        contradictions.append(against)
    if not again and (stale := _stale(claim, found)) is not None:
        contradictions.append(stale)
    return Finding(claim, found, tuple(contradictions))


def disagreement(claim: Claim, found: Figure) -> str | None:
    """Where our figure contradicts the published one although the verdict says otherwise."""
    if claim.figure is None or claim.verdict == "not reproducible here":
        return None
    figure, slack = float(claim.figure), float(claim.tolerance or 0)
    edge = slack + 1e-12 * abs(figure)  # a figure on the edge is within
    agrees = {
        "equals": found.low <= figure + edge and found.high >= figure - edge,
        "below": found.high < figure,
        "above": found.low > figure,
        "sign": found.low > 0 if figure > 0 else found.high < 0,
    }[claim.relation]
    if agrees:
        return None
    told = {
        "equals": f"tolerance {claim.tolerance}",
        "below": "expected below it, tolerance 0",
        "above": "expected above it, tolerance 0",
        "sign": "expected on the same side of 0, tolerance 0",
    }[claim.relation]
    return (
        f"{claim.name}: published {claim.figure} {claim.unit}, computed {_interval(found)}, {told}"
    )


def _stale(claim: Claim, found: Figure) -> str | None:
    """Where our figure is not the one that the ledger records."""
    slack = half_digit(claim.recorded[0])
    told = zip(claim.recorded, found, strict=False)
    if all(abs(now - float(one)) <= half_digit(one) * (1 + 1e-9) for one, now in told):
        return None
    recorded = " to ".join(map(str, claim.recorded[1:]))
    recorded = f"{claim.ours} {claim.unit}" + (f" (interval {recorded})" if recorded else "")
    return (
        f"{claim.name}: the ledger records {recorded} as ours, computed {_interval(found)},"
        f" tolerance {slack:g}"
    )


def _interval(figure: Figure) -> str:
    if figure.low == figure.high:
        return f"{figure.value:.6g}"
    return f"{figure.value:.1f} (95% interval {figure.low:.1f} to {figure.high:.1f})"
