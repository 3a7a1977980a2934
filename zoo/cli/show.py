"""`deepzoo show NAME`: what a model is, how large it is, and what bites in it."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepzoo.zoo import catalog
from deepzoo.zoo.card import GRADES, Card
from deepzoo.zoo.config import Config
from deepzoo.zoo.count import CacheBytes, Count, cache_bytes, count
from deepzoo.zoo.traps import traps

_CONFIG = {
    "A": "from the model's own file",
    "B": "from a sibling's file",
    "C": "assembled from its siblings",
}
_DTYPES = {"float8_e4m3fn": "FP8 (e4m3)", "bfloat16": "bfloat16", "float32": "float32"}


@dataclass(frozen=True, kw_only=True)
class Show:
    """Show a model's parameters, bytes of weights and cache, and its traps.

    Example: deepzoo show deepseek-r1
    """

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """A name that `deepzoo models` lists, or a local directory with a config.json."""
    json: bool = False
    """Print everything as JSON, the config included."""


def run(command: Show) -> int:
    """Prints one model and returns the exit status.

    Raises:
        ConfigError: no such model, or a config.json that is not of these families.
    """
    if (Path(command.name) / "config.json").is_file():
        config, card = catalog.read_config(Path(command.name)), None
    else:
        config, card = catalog.config(command.name), catalog.card(command.name)
    counted = count(config)
    if command.json:
        print(json.dumps(_as_json(config, card, counted), indent=2))
        return 0
    title = card.name if card else command.name
    sections = _sections(config, card, counted)
    if sys.stdout.isatty():
        _print_rich(title, sections)
    else:
        _print_plain(title, sections)
    return 0


def _as_json(config: Config, card: Card | None, counted: Count) -> dict[str, Any]:
    return {
        "card": asdict(card) if card else None,
        "config": config.to_hf(),
        "parameters": asdict(counted) | {"total_bytes": counted.total_bytes},
        "cache_bytes_per_token": asdict(cache_bytes(config)),
        "cache_bytes_per_token_with_mtp": asdict(cache_bytes(config, mtp=True)),
        "traps": traps(config, card),
    }


type _Sections = list[tuple[str, list[tuple[str, str]]]]


def _sections(config: Config, card: Card | None, counted: Count) -> _Sections:
    sections = [("Card", _card_rows(card))] if card else []
    sections.append(("Parameters", _parameter_rows(config, counted)))
    names = [(_DTYPES.get(name, name), _bytes(size)) for name, size in counted.bytes.items()]
    sections.append(("Weights on disk", [*names, ("all", _bytes(counted.total_bytes))]))
    sections.append(("Cache per token", _cache_rows(config)))
    sections.append(("Traps", [("", text) for text in traps(config, card)]))
    return sections


def _card_rows(card: Card) -> list[tuple[str, str]]:
    sure = card.certainty
    known = {"temperature": card.temperature, "top-p": card.top_p}
    sampling = ", ".join(f"{key} {value:g}" for key, value in known.items() if value is not None)
    chat = (card.chat_format or "unknown") + (", opens with <think>" if card.forced_think else "")
    rows = [
        ("what", card.summary),
        ("hub", card.repo or "ships with deepzoo"),
        ("published", card.parameters + (f", {card.active} active" if card.active else "")),
        ("context", f"{card.context:,} tokens [{sure.size}]"),
        ("licence", f"{card.licence} [{sure.licence}]"),
        ("sampling", f"{sampling or 'not known'} [{sure.sampling}]"),
        ("chat format", f"{chat} [{sure.chat}]"),
        ("config", f"{_CONFIG[sure.config]} [{sure.config}]"),
    ]
    rows += [("unconfirmed", text) for text in card.open]
    rows += [(key, value) for key, value in card.training]
    rows += [("source", text) for text in card.sources]
    letters = {sure.size, sure.licence, sure.sampling, sure.chat, sure.config}
    rows += [(f"[{letter}]", GRADES[letter]) for letter in sorted(letters)]
    return [(key, value) for key, value in rows if value]


def _parameter_rows(config: Config, counted: Count) -> list[tuple[str, str]]:
    rows = [("total", _parameters(counted.main))]
    if counted.routed:
        rows += [
            ("routed experts", _parameters(counted.routed)),
            ("active per token", _parameters(counted.active)),
            ("without input embedding", _parameters(counted.active_without_embedding)),
        ]
    else:
        rows.append(("without input embedding", _parameters(counted.active_without_embedding)))
    if counted.mtp:
        rows += [
            ("MTP, as published", _parameters(counted.mtp)),
            ("MTP, copies left out", _parameters(counted.mtp_unique)),
            ("MTP, active per step", _parameters(counted.mtp_active)),
        ]
    if counted.elements != counted.main:
        rows.append(("numbers on disk", f"{counted.elements:,} (MTP, copies, scales)"))
    return rows


def _cache_rows(config: Config) -> list[tuple[str, str]]:
    def text(cached: CacheBytes) -> str:
        if cached.stored == cached.expanded:
            return f"{cached.stored:,} bytes"
        ratio = cached.expanded / cached.stored
        return f"{cached.stored:,} bytes (expanded: {cached.expanded:,}, {ratio:.1f} times)"

    kind = "latent" if config.is_mla else "keys and values"
    rows = [(f"{kind}, bfloat16", text(cache_bytes(config)))]
    if config.num_nextn_predict_layers:
        rows.append(("with the MTP layer", text(cache_bytes(config, mtp=True))))
    return rows


def _parameters(number: int) -> str:
    unit = 1e9 if number >= 1e9 else 1e6
    return f"{number:,} ({number / unit:.2f}{'B' if unit == 1e9 else 'M'})"


def _bytes(number: int) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= unit:
            return f"{number:,} bytes ({number / unit:.2f} {name})"
    return f"{number} bytes"


def _print_plain(title: str, sections: _Sections) -> None:
    print(title)
    for heading, rows in sections:
        print(f"\n{heading}")
        for key, value in rows:
            print(f"  {key}: {value}" if key else f"  - {value}")


def _print_rich(title: str, sections: _Sections) -> None:
    console = Console()
    console.print(f"[bold]{title}[/bold]")
    for heading, rows in sections:
        table = Table(title=heading, title_justify="left", title_style="bold cyan")
        table.show_header, table.box, table.pad_edge = False, None, False
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        for key, value in rows:
            table.add_row(Text(key or "-"), Text(value))
        console.print()
        console.print(table)
