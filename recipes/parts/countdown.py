"""Countdown: make a number from others, each used at most once, with + - *; an exact verifier.

    Make 24 from 4, 6, 9.        ->  4 * 6

Numbers are 1 to 20, targets 1 to 99, and every result on the way is a whole number from 0 to 99, so
that a vocabulary of a hundred numbers suffices. An answer may leave numbers out. A problem that
has no answer is answered with `none`, and only such a problem.

Problems are told apart by their numbers, whatever their order and target: `held_out` hashes the
sorted numbers. Training leaves those problems out, and all whose numbers contain three that are
held out; evaluation uses nothing else.
"""

import functools
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from deepzoo.recipes.parts import rewards

LARGEST = 20  # of the numbers that are given
LIMIT = 99  # of targets, and of every result on the way
NONE = "none"  # the answer to a problem that has none
UNSOLVABLE = 1 / 8  # share of the problems for training

LONGEST = 100  # characters of a formula that is looked at
DEPTH = 8  # of its parentheses

_PROMPT = re.compile(r"Make ([0-9]{1,3}) from ([0-9]{1,3}(?:, [0-9]{1,3})*)\.", re.ASCII)
_WORD = re.compile(r"0|[1-9][0-9]{0,2}|[-+*()]|(?P<space> +)", re.ASCII)


class Node(NamedTuple):
    """A value and how it is made: given, or `left` `operator` `right`."""

    value: int
    operator: str = ""
    left: "Node | None" = None
    right: "Node | None" = None


class Unreadable(ValueError):
    """A text that is no formula, or one that leaves the limits; the message is a reason."""


def prompt(target: int, numbers: Sequence[int]) -> str:
    """What the user says."""
    return f"Make {target} from {', '.join(map(str, numbers))}."


def parse(text: str) -> tuple[int, tuple[int, ...]]:
    """`prompt` backwards: (target, numbers).

    Raises:
        ValueError: it is no such prompt.
    """
    match = _PROMPT.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not like {prompt(24, (4, 6, 9))!r}")
    return int(match[1]), tuple(map(int, match[2].split(", ")))


def combined(a: Node, b: Node) -> list[Node]:
    """Sum, difference of the larger and the smaller, and product; some may exceed LIMIT."""
    large, small = (a, b) if a.value >= b.value else (b, a)
    return [
        Node(a.value + b.value, "+", a, b),
        Node(large.value - small.value, "-", large, small),
        Node(a.value * b.value, "*", a, b),
    ]


@functools.lru_cache(maxsize=1 << 14)
def ways(numbers: tuple[int, ...]) -> dict[int, Node]:
    """Every value from 0 to 99 that sorted `numbers` make, and the first way found to it; a way
    that takes fewer numbers comes first."""
    found = {n: Node(n) for n in numbers}
    for count in range(2, len(numbers) + 1):
        for chosen in dict.fromkeys(itertools.combinations(numbers, count)):
            for value, node in _all_of(chosen).items():
                found.setdefault(value, node)
    return found


@functools.lru_cache(maxsize=1 << 14)
def _all_of(numbers: tuple[int, ...]) -> dict[int, Node]:
    """Values that take all of the sorted numbers."""
    if len(numbers) == 1:
        return {numbers[0]: Node(numbers[0])}
    found: dict[int, Node] = {}
    places = range(len(numbers))
    for size in range(1, len(numbers) // 2 + 1):
        for chosen in itertools.combinations(places, size):
            one = _all_of(tuple(numbers[i] for i in chosen))
            other = _all_of(tuple(numbers[i] for i in places if i not in chosen))
            for a, b in itertools.product(one.values(), other.values()):
                for node in combined(a, b):
                    if node.value <= LIMIT:
                        found.setdefault(node.value, node)
    return found


def formula(node: Node) -> str:
    """A way as text; parentheses around every side that is no number."""
    if node.left is None or node.right is None:
        return str(node.value)
    sides = (f"({formula(n)})" if n.operator else formula(n) for n in (node.left, node.right))
    return f" {node.operator} ".join(sides)


def answer(target: int, numbers: Sequence[int]) -> str:
    """A right answer."""
    node = ways(tuple(sorted(numbers))).get(target)
    return NONE if node is None else formula(node)


def read(text: str) -> Node:
    """A formula, from its text.

    Whole numbers of ASCII digits without leading zeros, + - * and parentheses; spaces between them
    do not matter.

    Raises:
        Unreadable: it is anything else, longer or deeper than the limits, or a result on the way
            lies outside 0 to 99.
    """
    if len(text) > LONGEST:
        raise Unreadable(f"more than {LONGEST} characters")
    words, at = [], 0
    while at < len(text):
        match = _WORD.match(text, at)
        if match is None or (match[0].isdigit() and text[match.end() : match.end() + 1].isdigit()):
            raise Unreadable("no formula")
        words += [] if match["space"] else [match[0]]
        at = match.end()
    node, at = _sum(words, 0, 0)
    if at != len(words):
        raise Unreadable("no formula")
    return node


def leaves(node: Node) -> list[int]:
    """The numbers in a formula."""
    if node.left is None or node.right is None:
        return [node.value]
    return leaves(node.left) + leaves(node.right)


def _sum(words: list[str], at: int, depth: int) -> tuple[Node, int]:
    node, at = _product(words, at, depth)
    while words[at : at + 1] in (["+"], ["-"]):
        other, end = _product(words, at + 1, depth)
        value = node.value + (other.value if words[at] == "+" else -other.value)
        node, at = _checked(Node(value, words[at], node, other)), end
    return node, at


def _product(words: list[str], at: int, depth: int) -> tuple[Node, int]:
    node, at = _single(words, at, depth)
    while words[at : at + 1] == ["*"]:
        other, at = _single(words, at + 1, depth)
        node = _checked(Node(node.value * other.value, "*", node, other))
    return node, at


def _single(words: list[str], at: int, depth: int) -> tuple[Node, int]:
    if depth > DEPTH:
        raise Unreadable(f"more than {DEPTH} parentheses in each other")
    if at == len(words):
        raise Unreadable("no formula")
    if words[at] == "(":
        node, at = _sum(words, at + 1, depth + 1)
        if words[at : at + 1] != [")"]:
            raise Unreadable("parentheses that do not match")
        return node, at + 1
    if not words[at].isdigit():
        raise Unreadable("no formula")
    return _checked(Node(int(words[at]))), at + 1


def _checked(node: Node) -> Node:
    if not 0 <= node.value <= LIMIT:
        raise Unreadable(f"a result outside 0 to {LIMIT}")
    return node


def said(text: str) -> str | None:
    """What stands between the answer tags of a text in R1-Zero's form; None without the form."""
    if rewards.form(text).reward != 1.0:
        return None
    return text.partition(rewards.ANSWER)[2].partition(rewards.ANSWER_END)[0].strip(" \n")


def is_right(question: str, text: str) -> bool:
    """Whether `text`, with its thought, answers the prompt `question`."""
    target, numbers = parse(question)
    found = said(text)
    if found is None:
        return False
    if found == NONE:
        return target not in ways(tuple(sorted(numbers)))
    try:
        node = read(found)
    except Unreadable:
        return False
    return node.value == target and Counter(leaves(node)) <= Counter(numbers)


def vote(text: str) -> str | None:
    """What the answer of `text` comes to: a value, `none`, or None without an answer."""
    found = said(text)
    try:
        return found if found in (None, NONE) else str(read(found).value)
    except Unreadable:
        return None


def held_out(numbers: Sequence[int]) -> bool:
    """Whether these numbers, in any order, are for evaluation (one set in 10)."""
    digest = hashlib.blake2b(repr(sorted(map(int, numbers))).encode(), digest_size=4).digest()
    return int.from_bytes(digest) % 10 == 0


def leaks(numbers: Sequence[int]) -> bool:
    """Whether training must not show these numbers: they, or three of them, are held out."""
    return any(
        held_out(part)
        for count in range(3, len(numbers) + 1)
        for part in itertools.combinations(numbers, count)
    )


def problems(
    *seed: int, held: bool = False, numbers: int = 3, unsolvable: float | None = None
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Endless (target, numbers); a pure function of the seed. No target is one of its numbers.

    Args:
        seed: any whole numbers from 0 on.
        held: those for evaluation instead of those for training.
        numbers: in each problem.
        unsolvable: share of problems without an answer; by default none of those for evaluation
            and UNSOLVABLE of those for training.
    """
    share = (0.0 if held else UNSOLVABLE) if unsolvable is None else unsolvable
    rng = np.random.default_rng([*seed, numbers, int(held)])
    while True:
        drawn = tuple(rng.integers(1, LARGEST + 1, numbers).tolist())
        impossible = rng.random() < share
        if (held and not held_out(drawn)) or (not held and leaks(drawn)):
            continue
        made = ways(tuple(sorted(drawn)))
        targets = [t for t in range(1, LIMIT + 1) if t not in drawn and (t in made) != impossible]
        if targets:
            yield int(rng.choice(targets)), drawn
