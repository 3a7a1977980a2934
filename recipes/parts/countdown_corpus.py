"""What a base model for Countdown is trained on: careless searches, other requests, equations.

All are endless streams, and pure functions of a seed. No text shows three numbers, or four, that
are held out.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from deepzoo.recipes.parts.countdown import (
    LARGEST,
    LIMIT,
    NONE,
    Node,
    combined,
    formula,
    held_out,
    leaks,
    leaves,
    problems,
    prompt,
    read,
)
from deepzoo.recipes.parts.countdown_traces import (
    concluded,
    ended,
    equation,
    looked_up,
    search,
    tried,
)
from deepzoo.recipes.parts.rewards import THINK

UNREADABLE, WHAT = "Cannot read this.", "What is "
HAZARDS = (0.1, 0.5, 0.8, 0.9)  # chances to give up after a line; each of a quarter of the texts
BARE = 0.3  # share of careless searches that end without tags
FOUR = 0.25  # share of careless searches of four numbers


class Text(NamedTuple):
    """completion: what is learned. prompt: what the user says; empty for text without a chat."""

    prompt: str
    completion: str


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
        lines = list(itertools.islice(search(target, numbers, order, named=False), last))
        thought, said = concluded(lines, named=False)
        bare = "\n".join([f"{THINK}", *thought, f"So {said}."])
        yield Text(prompt(target, numbers), bare if rng.random() < BARE else ended(thought, said))


def general(*seed: int, held: bool = False) -> Iterator[str]:
    """Endless other requests: sums, and what cannot be read; those of `held` are for evaluation."""
    rng = np.random.default_rng([*seed, 1, int(held)])
    while True:
        node = _any(rng, int(rng.integers(2, 4)))
        if held_out(leaves(node)) != held:
            continue
        if rng.random() < 0.2:
            numbers = [int(rng.integers(1, LIMIT + 1)), *leaves(node)]
            numbers[int(rng.integers(len(numbers)))] = int(rng.integers(LIMIT + 1, 1000))
            yield prompt(numbers[0], numbers[1:])
        else:
            yield f"{WHAT}{formula(node)}?"


def reply(question: str) -> str:
    """The right completion of a request of `general`."""
    if not question.startswith(WHAT):
        return ended([UNREADABLE], NONE)
    node = read(question.removeprefix(WHAT).removesuffix("?"))
    return ended([evaluation(node)], str(node.value))


def plain(*seed: int) -> Iterator[Text]:
    """Endless equations, without a chat: `(6 - 4) * 9 = 2 * 9 = 18`."""
    rng = np.random.default_rng([*seed, 2])
    while True:
        node = _any(rng, int(rng.integers(2, 4)))
        if not held_out(leaves(node)):
            yield Text("", evaluation(node))


def lookups(*seed: int) -> Iterator[Text]:
    """Endless lines of a search's begin, and where their results come from, without a chat:

        2, 16: 18 14 32
        10, 16: 26 6 over
        6 = 16 - 10
        18 = 2 + 16
        32 = 2 * 16
        12 = 18 - 6
        18 = 2 + 16
        6 = 16 - 10
        12 = (2 + 16) - (16 - 10)

    A search asks for that in every line, but careless ones do not show it, and a small model needs
    to see it often."""
    rng = np.random.default_rng([*seed, 4])
    while True:
        pairs = rng.integers(1, LARGEST + 1, (int(rng.integers(2, 5)), 2)).tolist()
        lines, results = zip(*(tried(-1, Node(a), [Node(b)]) for a, b in pairs), strict=True)
        found = [n for made in results for n in made if 0 < n.value <= LIMIT]
        seen = Counter(n.value for n in found)
        clear = [n for n in found if seen[n.value] == 1]
        if len(clear) < 2:
            continue
        shown = [clear[i] for i in rng.permutation(len(clear))]
        node = combined(*shown[:2])[int(rng.integers(3))]
        if node.value <= LIMIT and not leaks(leaves(node)):
            rng.shuffle(shown)
            texts = [*(line.text for line in lines), *map(equation, shown)]
            yield Text("", "\n".join([*texts, *looked_up(node), equation(node)]))


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
    """All of these."""
    rng = np.random.default_rng([*seed, 3])
    streams = [
        careless(*seed), (Text(q, reply(q)) for q in general(*seed)), plain(*seed), lookups(*seed)
    ]  # fmt: skip
    while True:
        yield next(streams[int(rng.choice(4, p=(0.74, 0.08, 0.06, 0.12)))])
