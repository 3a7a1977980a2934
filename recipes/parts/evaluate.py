"""How often a model is right on held-out problems, with the interval that so few problems allow."""

import math
import time
from typing import Any, NamedTuple

from deepzoo import zoo
from deepzoo.recipes.parts import tasks
from deepzoo.zoo.types import Model


class Score(NamedTuple):
    """Right of total problems, 95% interval, share of right links, seconds, tokens written."""

    right: int
    total: int
    interval: tuple[float, float]
    steps: float
    seconds: float
    tokens: int

    def __str__(self) -> str:
        low, high = self.interval
        share = f"{self.right}/{self.total} right = {self.right / self.total:.1%}"
        return f"{share} (95% interval {low:.1%} to {high:.1%}), {self.steps:.2%} of steps right"


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share, 95% by default; sound near 0 and 1, too."""
    share, spread = right / total, z * z / total
    centre = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / total + spread / total / 4)
    return (centre - half) / (1 + spread), (centre + half) / (1 + spread)


def held_out_problems(count: int, seed: int = 0) -> list[str]:
    """The first `count` held-out problems of `seed` that differ; a repeated one would count twice
    and make the interval too narrow."""
    found: dict[str, None] = {}
    stream = tasks.problems(seed, held=True)
    while len(found) < count:
        found.setdefault(next(stream))
    return list(found)


def evaluate(model: Model, count: int = 500, *, seed: int = 0, **sampling: Any) -> Score:
    """The first `count` held-out problems of `seed`, answered by `zoo.generate(**sampling)`."""
    problems = held_out_problems(count, seed)
    begin = time.perf_counter()
    completions = zoo.generate(
        model,
        [f"{p} =" for p in problems],
        raw=True,
        max_tokens=128,
        seed=seed,
        slots=32,
        **sampling,
    )
    seconds = time.perf_counter() - begin
    pairs = list(zip(problems, completions, strict=True))
    links = [tasks.steps_right(p, c.text) for p, c in pairs]
    right = sum(c.finish == "eos" and tasks.is_right(p, c.text) for p, c in pairs)
    return Score(
        right, count, wilson(right, count), sum(a for a, _ in links) / sum(b for _, b in links),
        seconds, sum(len(c.tokens) for c in completions),
    )  # fmt: skip
