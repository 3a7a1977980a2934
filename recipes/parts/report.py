"""A report for people: one list of blocks, written as Markdown and as a page that needs no other
file; with pictures as SVG, made of a few lines of text.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from deepzoo.zoo.cli.display import visible

# As in `plot`: they differ in brightness, too, and in the shape of their marks.
SHADES = ("#1a1a1a", "#b34700", "#5b9bd5", "#b0b0b0")
_FAINT, _GREY = "#e4e4e4", "#666666"


class Heading(NamedTuple):
    """A title; `level` from 1, the page's own."""

    text: str
    level: int = 2


class Text(NamedTuple):
    """A paragraph."""

    text: str


class Verbatim(NamedTuple):
    """Text as it is, such as a command or what a model wrote."""

    text: str


class Table(NamedTuple):
    """The first column holds words, all others numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Picture(NamedTuple):
    """An SVG; `file` is where the Markdown looks for it."""

    file: str
    svg: str
    alt: str


type Block = Heading | Text | Verbatim | Table | Picture


class Share(NamedTuple):
    """A share with its 95% interval, all from 0 to 1."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%})"


def markdown(blocks: Iterable[Block]) -> str:
    """The blocks as Markdown."""
    parts = []
    for block in blocks:
        match block:
            case Heading(text, level):
                parts.append(f"{'#' * level} {text}")
            case Text(text):
                parts.append(text)
            case Verbatim(text):
                parts.append("\n".join(f"    {line}" for line in visible(text).split("\n")))
            case Table(header, rows):
                rule = ["---", *["---:"] * (len(header) - 1)]
                lines = [header, rule, *rows]
                parts.append("\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines))
            case Picture(file, _, alt):
                parts.append(f"![{alt}]({file})")
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return visible(text).replace("|", "\\|").replace("\n", " ")


def page(title: str, blocks: Iterable[Block]) -> str:
    """The blocks as HTML with everything inside; nothing in them is taken for markup."""
    body = "\n".join(map(_html, blocks))
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Text(text):
            return f"<p>{html.escape(text)}</p>"
        case Verbatim(text):
            return f"<pre>{html.escape(visible(text))}</pre>"
        case Table(header, rows):
            lines = [_row("th", header), *(_row("td", row) for row in rows)]
            return f"<table>{''.join(lines)}</table>"
        case Picture(_, svg, _):
            return f"<figure>{svg}</figure>"


def _row(tag: str, cells: Sequence[str]) -> str:
    inner = "".join(f"<{tag}>{html.escape(visible(c))}</{tag}>" for c in cells)
    return f"<tr>{inner}</tr>"


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;"
    "color:#1a1a1a;background:#fff}h1,h2,h3{line-height:1.2}h2{margin-top:2.2rem}"
    "table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}"
    "th,td{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #ddd}"
    "th:first-child,td:first-child{text-align:left;padding-left:0}th{font-weight:600}"
    "pre{background:#f5f5f5;padding:.7rem .9rem;white-space:pre-wrap;overflow-wrap:anywhere;"
    "font-size:13px;line-height:1.4}figure{margin:1rem 0}svg{max-width:100%;height:auto}"
)


def ladder(rows: Sequence[tuple[str, Sequence[Share | None]]], series: Sequence[str]) -> str:
    """Shares of several models with their intervals, one line a model; as SVG.

    Args:
        rows: (name of a model, one share for each of `series`, None where there is none).
        series: at most four.
    """
    left, wide, top, step = 230, 470, 44, 46
    high = top + step * len(rows)
    x = lambda share: left + wide * share  # noqa: E731
    parts = []
    for percent in range(0, 101, 20):
        at = x(percent / 100)
        parts.append(_line([(at, top - 8), (at, high)], _FAINT))
        parts.append(_words(at, high + 16, f"{percent}%", _GREY, anchor="middle"))
    at = left
    for i, name in enumerate(series):
        parts.append(_mark(i, at, 14))
        parts.append(_words(at + 10, 18, name, SHADES[i]))
        at += 34 + 7 * len(name)  # a letter of 11 pixels is hardly wider
    for number, (name, shares) in enumerate(rows):
        middle = top + step * number + step / 2 - 4
        parts.append(_words(left - 14, middle + 4, name, SHADES[0], anchor="end", size=12))
        for i, share in enumerate(shares):
            if share is None:
                continue
            y = middle + 12 * (i - (len(shares) - 1) / 2)
            parts.append(_line([(x(share.low), y), (x(share.high), y)], SHADES[i], 1.6))
            parts.append(_mark(i, x(share.value), y))
            parts.append(_words(x(share.high) + 6, y + 3.5, f"{share.value:.1%}", SHADES[i], 10))
    return _svg(left + wide + 60, high + 26, parts)


type Curve = Sequence[tuple[float, float]]
"""(step, value) pairs."""


def curves(columns: Sequence[str], rows: Mapping[str, Sequence[Curve]]) -> str:
    """Small panels with one curve each: a row for every value, a column for every run; as SVG.

    Panels of a row have one scale, from 0 on.

    Args:
        columns: names of the runs.
        rows: name of a value -> its curve in each run; empty where it has none.
    """
    wide, tall, gap, left, top = 180, 92, 44, 44, 40
    parts = [
        _words(left + i * (wide + gap), 16, name, SHADES[0], 12) for i, name in enumerate(columns)
    ]
    for r, (name, found) in enumerate(rows.items()):
        y0 = top + r * (tall + 48) + tall
        most = _nice(max((v for curve in found for _, v in curve), default=1.0))
        for c, curve in enumerate(found):
            x0 = left + c * (wide + gap)
            parts.append(_words(x0, y0 - tall - 6, name, _GREY, 10))
            for share in (0.0, 0.5, 1.0):
                y = y0 - tall * share
                parts.append(_line([(x0, y), (x0 + wide, y)], _FAINT))
                parts.append(_words(x0 - 5, y + 3.5, _short(most * share), _GREY, 9, "end"))
            if not curve:
                continue
            last = max(step for step, _ in curve)
            points = [(x0 + wide * s / last, y0 - tall * v / most) for s, v in curve]
            parts.append(_line(points, SHADES[0], 1.4))
            if len(points) < 20:
                parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in points]
            parts.append(_words(x0 + wide, y0 + 13, f"step {last:g}", _GREY, 9, "end"))
    count = len(columns)
    return _svg(left + count * wide + (count - 1) * gap + 16, top + len(rows) * (tall + 48), parts)


def _nice(most: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below `most`."""
    if not most > 0 or not math.isfinite(most):
        return 1.0
    power = 10.0 ** math.floor(math.log10(most))
    return next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= most * (1 - 1e-9))


def _short(value: float) -> str:
    return f"{value:.3g}"


def _svg(wide: float, high: float, parts: Sequence[str]) -> str:
    font = 'font-family="system-ui,sans-serif"'
    box = f'width="{wide:g}" height="{high:g}" viewBox="0 0 {wide:g} {high:g}"'
    back = f'<rect width="{wide:g}" height="{high:g}" fill="#fff"/>'
    lines = "\n".join([back, *parts])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box} {font} role="img">\n{lines}\n</svg>'


def _line(points: Sequence[tuple[float, float]], colour: str, thick: float = 1.0) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{thick:g}"/>'


def _mark(kind: int, x: float, y: float) -> str:
    """A disc, a square, a diamond, a ring."""
    fill = f'fill="{SHADES[kind]}"'
    if kind == 1:
        return f'<rect x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7" {fill}/>'
    if kind == 2:
        path = f"{x - 5:.1f},{y:.1f} {x:.1f},{y - 5:.1f} {x + 5:.1f},{y:.1f} {x:.1f},{y + 5:.1f}"
        return f'<polygon points="{path}" {fill}/>'
    ring = f'fill="#fff" stroke="{SHADES[3]}" stroke-width="2"' if kind == 3 else fill
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {ring}/>'


def _words(
    x: float, y: float, text: str, colour: str, size: float = 11, anchor: str = "start"
) -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" text-anchor="{anchor}"'
    return f'<text {where} fill="{colour}">{html.escape(visible(text))}</text>'
