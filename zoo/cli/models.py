"""`deepzoo models`: every model the zoo knows by name."""

import json
import sys
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from deepzoo.zoo import catalog
from deepzoo.zoo.card import Card


@dataclass(frozen=True, kw_only=True)
class Models:
    """List the released models and those that ship with the package.

    Example: deepzoo models --find distill
    """

    find: str = ""
    """Only names that contain this text."""
    json: bool = False
    """Print the cards as JSON."""


def run(command: Models) -> int:
    """Prints the list and returns the exit status; an empty result of `--find` is no mistake."""
    cards = [catalog.card(name) for name in catalog.models() if command.find.lower() in name]
    if command.json:
        print(json.dumps([asdict(card) for card in cards], indent=2))
    elif sys.stdout.isatty():
        Console().print(_table(cards))
    else:
        for card in cards:
            print("\t".join(_row(card)))
    return 0


def _row(card: Card) -> tuple[str, ...]:
    size = card.parameters + (f" ({card.active} active)" if card.active else "")
    return card.name, size, f"{card.context:,}", card.chat_format or "unknown", card.summary


def _table(cards: list[Card]) -> Table:
    table = Table("model", "size", "context", "chat", "what it is", title=None, pad_edge=False)
    table.columns[0].no_wrap = True
    table.columns[0].style = "bold"
    table.columns[2].justify = "right"
    for card in cards:
        table.add_row(*_row(card))
    return table
