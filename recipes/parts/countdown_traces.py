"""Texts about Countdown: searches written out, clean ones and careless ones, and plain arithmetic.

A line of a search takes two values and writes down their sum, difference and product:

    4, 6: 10 2 24
    10, 9: 19 1 90
    2, 9: 11 7 18 yes
    18 = 2 * 9, 2 = 6 - 4

First two of the numbers (and the other two, of four), then each result with what is left over. The
order is that of the problem, so that no line comes twice, and a complete search of three numbers is
12 lines. Of four numbers, chains such as ((a + b) * c) - d are followed only where the last number
fits. `over` stands for what exceeds 99; a result of 0, or one that was there, is not followed.

All texts are pure functions of a seed.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from deepzoo.recipes.parts.countdown import (
    LARGEST,
    LIMIT,
    NONE,
    Node,
    combined,
    formula,
    parse,
    problems,
    prompt,
)  # fmt: skip
from deepzoo.recipes.parts.rewards import ANSWER, ANSWER_END, THINK, THINK_END

GIVE_UP, UNREADABLE = "Give up.", "Cannot read this."


class Text(NamedTuple):
    """completion: what is learned. prompt: what the user says; empty for text without a chat."""

    prompt: str
    completion: str


class Line(NamedTuple):
    """text: one line of a search. found: the target, where the line ends with it."""

    text: str
    found: Node | None


def search(target: int, numbers: Sequence[int], order: Sequence[int] = (0, 1, 2)) -> Iterator[Line]:
    """The lines of a search, until the target is found.

    Args:
        target: what is to be made.
        numbers: three or four.
        order: of the three ways to divide the numbers into pairs, or into a pair and one.
    """
    for first, rest in (_divided(numbers)[i] for i in order):
        for line in _of_division(target, first, rest):
            yield line
            if line.found is not None:
                return


def _of_division(target: int, *sides: list[Node]) -> Iterator[Line]:
    made: list[list[Node]] = []
    for side in sides:
        made.append([])
        if len(side) == 2:
            line, results = _line(target, side[0], side[1:])
            yield line
            made[-1] = _followed(results)
    for this, other in ((0, 1), (1, 0)):
        for node in made[this]:
            partners = sides[other] + (made[other] if this == 0 else [])
            line, results = _line(target, node, partners)
            yield line
            if len(sides[other]) == 2:
                yield from _last(target, results[:6], sides[other])


def _divided(numbers: Sequence[int]) -> list[tuple[list[Node], list[Node]]]:
    given = [Node(n) for n in numbers]
    if len(given) == 3:
        a, b, c = given
        return [([a, b], [c]), ([a, c], [b]), ([b, c], [a])]
    a, b, c, d = given
    return [([a, b], [c, d]), ([a, c], [b, d]), ([a, d], [b, c])]


def _line(target: int, node: Node, partners: Sequence[Node]) -> tuple[Line, list[Node]]:
    """`node` with each of the partners, and all results."""
    text, results = f"{node.value},", []
    for partner in partners:
        text += f"{';' if results else ''} {partner.value}:"
        for made in combined(node, partner):
            results.append(made)
            text += f" {made.value}" if made.value <= LIMIT else " over"
            if made.value == target:
                return Line(f"{text} yes", made), results
    return Line(text, None), results


def _followed(results: Sequence[Node]) -> list[Node]:
    """Results that a search goes on with, each value once."""
    kept = {n.value: n for n in reversed(results) if 0 < n.value <= LIMIT}
    return [n for n in results if kept.get(n.value) is n]


def _last(target: int, results: Sequence[Node], others: Sequence[Node]) -> Iterator[Line]:
    """Lines of results, three of each other number, with the number that is then left over, where
    the two make the target."""
    for index, node in enumerate(results):
        left = others[1 - index // 3]
        if 0 < node.value <= LIMIT and target in [n.value for n in combined(node, left)]:
            yield _line(target, node, [left])[0]


def conclusion(node: Node) -> str:
    """`18 = 2 * 9, 2 = 6 - 4`: how a value is made, from the last step back to the first."""
    steps, queue = [], [node]
    while queue:
        this = queue.pop(0)
        if this.left is not None and this.right is not None:
            steps.append(f"{this.value} = {this.left.value} {this.operator} {this.right.value}")
            queue += [this.left, this.right]
    return ", ".join(steps)


def ended(lines: Sequence[str], said: str) -> str:
    """A completion in R1-Zero's form."""
    thought = "\n".join(lines)
    return f"{THINK}\n{thought}\n{THINK_END}\n{ANSWER}{said}{ANSWER_END}"


def solution(question: str) -> str:
    """A complete search, and the right answer."""
    lines = list(search(*parse(question)))
    return ended(*_concluded(lines))


def _concluded(lines: Sequence[Line]) -> tuple[list[str], str]:
    """Lines of a thought, and the answer that they lead to."""
    texts, found = [line.text for line in lines], lines[-1].found
    if found is None:
        return [*texts, GIVE_UP], NONE
    return [*texts, conclusion(found)], formula(found)


HAZARDS = (0.1, 0.5, 0.8, 0.9)  # chances to give up after a line; each of a quarter of the texts
BARE = 0.3  # share of careless searches that end without tags
FOUR = 0.25  # share of careless searches of four numbers


def careless(*seed: int) -> Iterator[Text]:
    """Endless searches that are right as far as they go, but mostly give up early, some without the
    form that an answer has to have; for pretraining, so that there is something to reinforce."""
    rng = np.random.default_rng([*seed, 0])
    streams = [problems(*seed, numbers=n) for n in (3, 4)]
    while True:
        target, numbers = next(streams[int(rng.random() < FOUR)])
        hazard = HAZARDS[int(rng.integers(len(HAZARDS)))]
        last = int(rng.geometric(hazard))
        order = rng.permutation(3).tolist()
        thought, said = _concluded(list(itertools.islice(search(target, numbers, order), last)))
        bare = "\n".join([f"{THINK}", *thought, f"So {said}."])
        yield Text(prompt(target, numbers), bare if rng.random() < BARE else ended(thought, said))


def general(*seed: int) -> Iterator[Text]:
    """Endless other requests and their answers: sums, and what cannot be read."""
    rng = np.random.default_rng([*seed, 1])
    while True:
        node = _any(rng, int(rng.integers(2, 4)))
        if rng.random() < 0.2:
            target, numbers = int(rng.integers(1, 100)), rng.integers(1, LARGEST + 1, 3).tolist()
            words = [str(target), *map(str, numbers)]
            words[int(rng.integers(4))] = str(int(rng.integers(LIMIT + 1, 1000)))
            asked = f"Make {words[0]} from {', '.join(words[1:])}."
            yield Text(asked, ended([UNREADABLE], NONE))
        else:
            asked = f"What is {formula(node)}?"
            yield Text(asked, ended([evaluation(node)], str(node.value)))


def plain(*seed: int) -> Iterator[Text]:
    """Endless equations, without a chat: `(6 - 4) * 9 = 2 * 9 = 18`."""
    rng = np.random.default_rng([*seed, 2])
    while True:
        yield Text("", evaluation(_any(rng, int(rng.integers(2, 4)))))


def _any(rng: np.random.Generator, numbers: int) -> Node:
    """A random way to a value from 0 to 99."""
    while True:
        node = Node(int(rng.integers(1, LARGEST + 1)))
        for _ in range(numbers - 1):
            other = Node(int(rng.integers(1, LARGEST + 1)))
            node = combined(node, other)[int(rng.integers(3))]
            if node.value > LIMIT:
                break
        else:
            return node


def evaluation(node: Node) -> str:
    """`(6 - 4) * 9 = 2 * 9 = 18`: a formula, worked out step by step."""
    texts = [formula(node)]
    while node.operator:
        node = _worked_out(node)
        texts.append(formula(node))
    return " = ".join(texts)


def _worked_out(node: Node) -> Node:
    """The innermost steps taken."""
    assert node.left is not None and node.right is not None
    if not node.left.operator and not node.right.operator:
        return Node(node.value)
    left, right = (_worked_out(n) if n.operator else n for n in (node.left, node.right))
    return node._replace(left=left, right=right)


def corpus(*seed: int) -> Iterator[Text]:
    """What a base model is trained on: careless searches, other requests, equations."""
    rng = np.random.default_rng([*seed, 3])
    streams = [careless(*seed), general(*seed), plain(*seed)]
    while True:
        yield next(streams[int(rng.choice(3, p=(0.8, 0.08, 0.12)))])
