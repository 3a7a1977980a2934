"""Searches for Countdown's answers, written out, and what follows from them.

A line of a search takes two values and writes down their sum, difference and product:

    4, 6: 10 2 24
    10 = 4 + 6, 9: 19 1 90
    2 = 6 - 4, 9: 11 7 18 yes
    18 = (6 - 4) * 9

First two of the numbers (and the other two, of four), then each result with what is left over. The
order is that of the problem, so that no line comes twice, and a complete search of three numbers is
12 lines. Of four numbers, chains such as ((a + b) * c) - d are followed only where the last number
fits. `over` stands for what exceeds 99; a result of 0, or one that was there, is not followed.

Where two pairs make the target, what the answer needs is looked up line by line, for a small model
does not find two values' origins at once:

    2, 16: 18 14 32
    10, 16: 26 6 over
    18 = 2 + 16, 10: 28 8 over; 16: 34 2 over; 26: 44 8 over; 6: 24 12 yes
    12 = 18 - 6
    18 = 2 + 16
    6 = 16 - 10
    12 = (2 + 16) - (16 - 10)

Careless searches, which a base model learns, leave out where a value comes from (`2, 9: 11 7 18`).
A small model that has to look it up in the end often takes another of the same value.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from deepzoo.recipes.parts.countdown import (
    LIMIT,
    NONE,
    Node,
    Unreadable,
    combined,
    formula,
    parse,
    read,
)
from deepzoo.recipes.parts.rewards import ANSWER, ANSWER_END, THINK, THINK_END

GIVE_UP = "Give up."


class Line(NamedTuple):
    """text: one line of a search. found: the target, where the line ends with it."""

    text: str
    found: Node | None


def search(
    target: int, numbers: Sequence[int], order: Sequence[int] = (0, 1, 2), *, named: bool = True
) -> Iterator[Line]:
    """The lines of a search, until the target is found.

    Args:
        target: what is to be made.
        numbers: three or four.
        order: of the three ways to divide the numbers into pairs, or into a pair and one.
        named: whether lines say where their first value comes from.
    """
    written = set()
    for first, rest in (_divided(numbers)[i] for i in order):
        for line in _of_division(target, first, rest):
            text = line.text if named else _ORIGIN.sub("", line.text, 1)
            if text not in written:
                yield line._replace(text=text)
            written.add(text)
            if line.found is not None:
                return


_FROM = r"(?: = \(*[0-9]+\)*(?: [-+*] \(*[0-9]+\)*)+)"  # where a value comes from
_ORIGIN = re.compile(_FROM, re.ASCII)


def _of_division(target: int, *sides: list[Node]) -> Iterator[Line]:
    made: list[list[Node]] = []
    for side in sides:
        made.append([])
        if len(side) == 2:
            line, results = tried(target, side[0], side[1:])
            yield line
            made[-1] = _followed(results)
    for this, other in ((0, 1), (1, 0)):
        for node in made[this]:
            partners = sides[other] + (made[other] if this == 0 else [])
            line, results = tried(target, node, partners)
            yield line
            if len(sides[other]) == 2:
                found = results[: 3 * len(_once(sides[other]))]
                yield from _last(target, found, sides[other])


def _divided(numbers: Sequence[int]) -> list[tuple[list[Node], list[Node]]]:
    given = [Node(n) for n in numbers]
    if len(given) == 3:
        a, b, c = given
        return [([a, b], [c]), ([a, c], [b]), ([b, c], [a])]
    a, b, c, d = given
    return [([a, b], [c, d]), ([a, c], [b, d]), ([a, d], [b, c])]


def tried(target: int, node: Node, partners: Sequence[Node]) -> tuple[Line, list[Node]]:
    """`2, 9: 11 7 18`: a node with each of the partners until the target is found; all results."""
    text, results = f"{equation(node)},", []
    for partner in _once(partners):
        text += f"{';' if results else ''} {partner.value}:"
        for made in combined(node, partner):
            results.append(made)
            text += f" {made.value}" if made.value <= LIMIT else " over"
            if made.value == target:
                return Line(f"{text} yes", made), results
    return Line(text, None), results


def _followed(results: Sequence[Node]) -> list[Node]:
    """Results that a search goes on with, each value once."""
    return _once([n for n in results if 0 < n.value <= LIMIT])


def _once(nodes: Sequence[Node]) -> list[Node]:
    """The nodes, each value once."""
    found: dict[int, Node] = {}
    for node in nodes:
        found.setdefault(node.value, node)
    return list(found.values())


def equation(node: Node) -> str:
    """`18 = (6 - 4) * 9`: a value and where it comes from, if it is not given."""
    return f"{node.value} = {formula(node)}" if node.operator else str(node.value)


def _last(target: int, results: Sequence[Node], others: Sequence[Node]) -> Iterator[Line]:
    """Lines of results, three of each other number, with the number that is then left over, where
    the two make the target."""
    for index, node in enumerate(results):
        left = others[1 - index // 3]
        if 0 < node.value <= LIMIT and target in [n.value for n in combined(node, left)]:
            yield tried(target, node, [left])[0]


def ended(lines: Sequence[str], said: str) -> str:
    """A completion in R1-Zero's form."""
    thought = "\n".join(lines)
    return f"{THINK}\n{thought}\n{THINK_END}\n{ANSWER}{said}{ANSWER_END}"


def solution(question: str) -> str:
    """A complete search, and the right answer."""
    lines = list(search(*parse(question)))
    return ended(*concluded(lines))


def concluded(lines: Sequence[Line], *, named: bool = True) -> tuple[list[str], str]:
    """Lines of a thought, and the answer that they lead to. named: as for `search`."""
    texts, found = [line.text for line in lines], lines[-1].found
    if found is None:
        return [*texts, GIVE_UP], NONE
    if named and all(n is not None and n.operator for n in (found.left, found.right)):
        texts += looked_up(found)
    return [*texts, equation(found)], formula(found)


def looked_up(node: Node) -> list[str]:
    """`12 = 18 - 6`, `18 = 2 + 16`, `6 = 16 - 10`: a value from values, and each from others."""
    assert node.left is not None and node.right is not None
    bare = node._replace(left=Node(node.left.value), right=Node(node.right.value))
    return list(dict.fromkeys(map(equation, (bare, node.left, node.right))))


_LINE = re.compile(rf"([0-9]+){_FROM}?, (.+?)(?: yes)?", re.ASCII)
_PART = re.compile(r"([0-9]+):((?: (?:[0-9]+|over)){1,3})", re.ASCII)


def steps_right(text: str) -> tuple[int, int]:
    """Of the results in the lines of a search, how many are right, and how many there are."""
    right = total = 0
    for line in filter(None, map(_LINE.fullmatch, text.splitlines())):
        for part in filter(None, map(_PART.fullmatch, line[2].split("; "))):
            made = combined(Node(int(line[1][:3])), Node(int(part[1][:3])))
            said = part[2].split()
            wanted = [str(n.value) if n.value <= LIMIT else "over" for n in made]
            right += sum(a == b for a, b in zip(said, wanted, strict=False))
            total += len(said)
    return right, total


_STATED = re.compile(rf"([0-9]+)({_FROM})", re.ASCII)


def sound(text: str) -> float:
    """Share of what the lines of a thought state that is so: results, and where values come from. 1
    where nothing is stated."""
    thought = text.partition(THINK_END)[0].removeprefix(THINK)
    right, total = steps_right(thought)
    for value, origin in _STATED.findall(thought):
        total += 1
        try:
            right += str(read(origin.removeprefix(" = ")).value) == value
        except Unreadable:  # a result beyond the limit, among others
            pass
    return right / total if total else 1.0


_READABLE = re.compile(
    rf"[0-9]+{_FROM}?, [0-9]+:(?: [0-9]+| over){{1,3}}"
    r"(?:; [0-9]+:(?: [0-9]+| over){1,3}){0,4}(?: yes)?"
    rf"|[0-9]+{_FROM}"
    rf"|{re.escape(GIVE_UP)}",
    re.ASCII,
)


def readable(text: str) -> float:
    """Share of a thought's lines that are written as here, and stand there for the first time: what
    language consistency is to other tasks (R1, 2.3.2). 0 without lines."""
    thought = text.partition(THINK_END)[0].removeprefix(THINK)
    lines = [line for line in thought.split("\n") if line]
    return sum(bool(_READABLE.fullmatch(n)) for n in dict.fromkeys(lines)) / max(1, len(lines))
