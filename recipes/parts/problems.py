"""Verifiable problems: what is asked, and how an answer is judged.

A task is three functions. Problems are a pure function of their seed, those for evaluation share
nothing with those for training, and a verdict names its components, so that a recipe can weigh them
and a log can show them.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from deepzoo.recipes.parts import tasks
from deepzoo.zoo.errors import RequestError


class Problem(NamedTuple):
    """prompt: the text that is continued, or, where `raw` is False, what the user says.
    answer: what its verifier compares with.
    raw: whether the prompt is continued as it is, without a chat format.
    """

    prompt: str
    answer: str
    raw: bool = False


type Verdict = Mapping[str, float]
"""Components of a reward, each from 0 to 1. "accuracy" is always there; NaN: the verifier itself
failed, and the answer is dropped instead of being called wrong."""


class Task(NamedTuple):
    """A family of problems.

    problems: (*seed, held=False) -> endless problems; `held` ones are for evaluation.
    judge: (problem, text, finished) -> verdict; `finished` is False for an answer that was cut off.
    solution: problem -> a right answer as training text, where the task can write one.
    """

    problems: Callable[..., Iterator[Problem]]
    judge: Callable[[Problem, str, bool], Verdict]
    solution: Callable[[Problem], str] | None = None


NAMES = ("arithmetic", "arithmetic-long")


def task(name: str) -> Task:
    """A task by name: "arithmetic", two to four numbers; "arithmetic-long", five.

    Raises:
        RequestError: there is no such task.
    """
    if name == "arithmetic":
        return _arithmetic(None)
    if name == "arithmetic-long":
        return _arithmetic(5)
    raise RequestError(f"no task is called {name!r}; there are {', '.join(NAMES)}")


def _arithmetic(numbers: int | None) -> Task:
    def problems(*seed: int, held: bool = False) -> Iterator[Problem]:
        for text in tasks.problems(*seed, held=held, numbers=numbers):
            yield Problem(f"{text} =", text, raw=True)

    def judge(problem: Problem, text: str, finished: bool) -> Verdict:
        well_formed = finished and tasks.answer(text) is not None
        right = well_formed and tasks.is_right(problem.answer, text)
        return {"accuracy": float(right), "format": float(well_formed)}

    def solution(problem: Problem) -> str:
        return " = ".join(tasks.steps(problem.answer))

    return Task(problems, judge, solution)


def batch(problems: Callable[..., Iterator[Problem]], count: int, *seed: int) -> list[Problem]:
    """`count` different training problems; a pure function of the seed."""
    found: dict[str, Problem] = {}
    for problem in itertools.islice(problems(*seed), 100 * count):
        found.setdefault(problem.prompt, problem)
        if len(found) == count:
            return list(found.values())
    raise RequestError(
        f"the task has no {count} different problems in {100 * count} draws; ask for fewer prompts"
    )
