"""How often a model is right on held-out problems, with the interval that so few problems allow.

Q problems  N samples of each
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deepzoo import zoo
from deepzoo.recipes.parts import rewards
from deepzoo.recipes.parts.problems import Problem, Task
from deepzoo.zoo.errors import RequestError
from deepzoo.zoo.generate import Completion
from deepzoo.zoo.prompt import encode
from deepzoo.zoo.types import Model


class Score(NamedTuple):
    """What `measure` found.

    Attributes:
        right: bool [Q, N].
        truncated: bool [Q, N], answers that were cut off.
        lengths: int [Q, N], tokens of each answer.
        problems: the Q problems.
        completions: their N answers each.
    """

    right: np.ndarray
    truncated: np.ndarray
    lengths: np.ndarray
    problems: list[Problem]
    completions: list[list[Completion]]

    @property
    def accuracy(self) -> float:
        """Mean share of right answers: pass@1."""
        return float(self.right.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of `accuracy`; problems are independent, samples of one are not."""
        return interval(self.right.mean(axis=1))

    def __str__(self) -> str:
        low, high = self.interval
        count, samples = self.right.shape
        each = f", {samples} samples each" if samples > 1 else ""
        return (
            f"{self.accuracy:.1%} of {count} problems right{each}"
            f" (95% interval {low:.1%} to {high:.1%}), {self.truncated.mean():.1%} cut off,"
            f" {self.lengths.mean():.0f} tokens on average"
        )


_Z = 1.959964  # of a normal, 95% within


def wilson(right: float, total: int, z: float = _Z) -> tuple[float, float]:
    """Wilson's score interval of a share, 95% by default; sound near 0 and 1, too."""
    share, spread = right / total, z * z / total
    centre = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / total + spread / total / 4)
    return (centre - half) / (1 + spread), (centre + half) / (1 + spread)


def interval(values: np.ndarray) -> tuple[float, float]:
    """95% interval of the mean of a share that was measured on each of Q problems: [Q], 0 to 1.

    Wilson's for shares of 0 and 1. Others vary less, so a normal with the deviation between the
    problems serves; where they do not vary at all, Wilson's again.
    """
    values, count = np.asarray(values, np.float64), len(values)
    spread = float(values.std(ddof=1)) if count > 1 else 0.0
    if np.isin(values, (0.0, 1.0)).all() or not spread:
        return wilson(float(values.sum()), count)
    mean, half = float(values.mean()), _Z * spread / math.sqrt(count)
    return max(0.0, mean - half), min(1.0, mean + half)


def held_out(task: Task, count: int, seed: int = 0) -> list[Problem]:
    """The first `count` different held-out problems of a seed.

    Raises:
        RequestError: the task has fewer.
    """
    found: dict[str, Problem] = {}
    for problem in itertools.islice(task.problems(seed, held=True), 100 * count):
        found.setdefault(problem.prompt, problem)
        if len(found) == count:
            return list(found.values())
    raise RequestError(f"the task has {len(found)} held-out problems; ask for no more")


def measure(
    model: Model,
    task: Task,
    count: int = 500,
    *,
    samples: int = 1,
    max_tokens: int = 256,
    temperature: float = 0.6,
    top_p: float = 0.95,
    seed: int = 0,
    slots: int = 32,
    speculative: bool = False,
) -> Score:
    """Answers held-out problems and judges the answers.

    Args:
        model: with a tokenizer.
        task: see `problems`.
        count: Q.
        samples: N.
        max_tokens: of an answer.
        temperature: 0 for greedy; 0.6 with top_p 0.95 is how the papers measure (R1, section 3).
        top_p: nucleus.
        seed: of problems and sampling.
        slots: answers that are written together.
        speculative: draft with the MTP layer.
    """
    asked = held_out(task, count, seed)
    raw = asked[0].raw
    opening = rewards.THINK if encode(model, asked[0].prompt, raw=raw).thought else ""
    made = zoo.generate(
        model, [p.prompt for p in asked for _ in range(samples)], raw=raw, max_tokens=max_tokens,
        temperature=temperature, top_p=top_p, seed=seed, slots=slots, speculative=speculative,
    )  # fmt: skip
    answers = [made[i : i + samples] for i in range(0, len(made), samples)]

    def table(value) -> np.ndarray:
        return np.array([[value(p, c) for c in row] for p, row in zip(asked, answers, strict=True)])

    return Score(
        table(lambda p, c: task.judge(p, opening + c.text, c.finish == "eos")["accuracy"] == 1.0),
        table(lambda p, c: c.finish == "length"),
        table(lambda p, c: len(c.tokens)),
        asked,
        answers,
    )


def pass_at_k(right: np.ndarray, k: int) -> np.ndarray:
    """Chance that one of k samples is right, unbiased (Codex, arXiv 2107.03374, eq. 1): [Q].

    Args:
        right: bool [Q, N], N at least k.
    """
    total, good = right.shape[1], right.sum(axis=1)
    if not 1 <= k <= total:
        raise ValueError(f"pass@{k} needs at least {k} samples, there are {total}")
    return np.array([1.0 - math.comb(total - int(c), k) / math.comb(total, k) for c in good])


def majority_at_k(right: np.ndarray, votes: Sequence[Sequence[str | None]], k: int) -> np.ndarray:
    """Share of groups of k samples whose most frequent answer is right (cons@k of R1): [Q].

    The N samples form N // k groups, in order. Of answers that are equally frequent the first one
    counts; a group in which nobody answers is wrong.

    Args:
        right: bool [Q, N], N at least k.
        votes: for each of the Q what its N samples answer; None for one that answers nothing.
        k: voters.
    """
    total = right.shape[1]
    if not 1 <= k <= total:
        raise ValueError(f"maj@{k} needs at least {k} samples, there are {total}")
    out = []
    for row, said in zip(right, votes, strict=True):
        won = []
        for begin in range(0, total - k + 1, k):
            group = range(begin, begin + k)
            counts = Counter(said[i] for i in group if said[i] is not None)
            top = counts.most_common(1)[0][0] if counts else None
            won.append(any(bool(row[i]) for i in group if top is not None and said[i] == top))
        out.append(np.mean(won))
    return np.array(out)
