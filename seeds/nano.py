"""Figures of the models that ship with the package: from their cards, or measured again."""

import re

from deepzoo.recipes.parts import accuracy, problems
from deepzoo.recipes.parts.accuracy import wilson
from deepzoo.seeds.checks import Figure
from deepzoo.seeds.claims import LedgerError, Line
from deepzoo.zoo import catalog
from deepzoo.zoo.generate import Statistics, generate
from deepzoo.zoo.load import load

_PERCENT = r"(\d+(?:\.\d+)?)%"
_SHARE = re.compile(rf"{_PERCENT} \(95% interval {_PERCENT} to {_PERCENT}\)")


def on_card(model: str, line: str) -> Figure:
    """The share that a card tells as "98.4% (95% interval 96.9% to 99.2%)", in percent.

    Raises:
        ConfigError: no model of that name ships with the package.
        LedgerError: the card has no such line, or no share with its interval in it.
    """
    told = dict(catalog.card(model).training)
    if line not in told:
        lines = ", ".join(map(repr, told)) or "none"
        raise LedgerError(f"the card of {model} has no line {line!r}; there are {lines}")
    found = _SHARE.search(told[line])
    if found is None:
        raise LedgerError(
            f"the card of {model}: {line}: expected 98.4% (95% interval 96.9% to 99.2%) or the"
            f" like, got {told[line]!r}"
        )
    return Figure(*map(float, found.groups()))


def measured(model: str, line: Line) -> Figure:
    """The same share, measured now on the line's held-out problems, in percent.

    float32 arithmetic, as for the cards.

    Raises:
        DeepzooError: the model, the task or the sampling cannot be served.
    """
    loaded = load(model, dtype="float32", mtp=line.drafts)
    task = problems.task(line.task)
    how = {"max_tokens": line.max_tokens, "temperature": line.temperature, "top_p": line.top_p}
    if line.drafts:
        asked = accuracy.held_out(task, line.problems, line.seed)
        counts = Statistics()
        generate(
            loaded, [p.prompt for p in asked], raw=asked[0].raw, seed=line.seed, slots=32,
            speculative=True, statistics=counts, **how,
        )  # fmt: skip
        low, high = wilson(counts.accepted, counts.drafted)
        return Figure(*(100 * s for s in (counts.acceptance, low, high)))
    score = accuracy.measure(loaded, task, line.problems, seed=line.seed, **how)
    return Figure(*(100 * s for s in (score.accuracy, *score.interval)))
