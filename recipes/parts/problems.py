"""Verifiable problems: what is asked, and how an answer is judged.

A task is three functions. Problems are a pure function of their seed, those for evaluation share
nothing with those for training, and a verdict names its components, so that a recipe can weigh them
and a log can show them.
"""

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from deepzoo.recipes.parts import countdown, rewards, sandbox, tasks
from deepzoo.recipes.parts import countdown_corpus as corpus
from deepzoo.recipes.parts import countdown_traces as traces
from deepzoo.recipes.parts.records import DataError, Records, read
from deepzoo.zoo.errors import RequestError


class Problem(NamedTuple):
    """prompt: the text that is continued, or, where `raw` is False, what the user says.
    Attributes:
        answer: what its verifier compares with.
        raw: whether the prompt is continued as it is, without a chat format.
        tests: (input, expected output) pairs, where the answer is a program.
        language: that the answer shall be in.
    """

    prompt: str
    answer: str
    raw: bool = False
    tests: tuple[tuple[str, str], ...] = ()
    language: str = "en"


type Verdict = Mapping[str, float]
"""Components of a reward, each from 0 to 1. "accuracy" is always there; NaN: the verifier itself
failed, and the answer is dropped instead of being called wrong."""


class Task(NamedTuple):
    """A family of problems.

    Attributes:
        problems: (*seed, held=False) -> endless problems; `held` ones are for evaluation.
        judge: (problem, text, finished) -> verdict; `text` holds the thought with its tags,
            `finished` is False for an answer that was cut off.
        solution: problem -> a right answer as training text, where the task can write one.
        vote: text -> the answer in it, spelled so that equal answers are equal texts; None without
            one.
        slow: whether judging waits for something, so that several verdicts at once are faster.
        everything: all problems in the order of the file, where there is one.
        fingerprint: of the data that the problems come from; empty where there is none.
    """

    problems: Callable[..., Iterator[Problem]]
    judge: Callable[[Problem, str, bool], Verdict]
    solution: Callable[[Problem], str] | None = None
    vote: Callable[[str], str | None] = lambda text: text.strip() or None
    slow: bool = False
    everything: tuple[Problem, ...] = ()
    fingerprint: str = ""


COUNTDOWN = {
    "countdown": (3,),
    "countdown-4": (4,),
    "countdown-3-4": (3, 4),
    "countdown-unsolvable": (3,),
}
NAMES = ("arithmetic", "arithmetic-long", *COUNTDOWN, "countdown-general", "jsonl")

# R1, arXiv 2501.12948, table 1: for base models, which have no chat format.
R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves"
    " it. The assistant first thinks about the reasoning process in the mind and then provides the"
    " user with the answer. The reasoning process and answer are enclosed within <think> </think>"
    " and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think>"
    " <answer> answer here </answer>. User: {prompt}. Assistant:"
)


def task(name: str, data: str = "", *, template: str = "", language: str = "en") -> Task:
    """A task by name.

    "arithmetic", sums of two to four numbers; "arithmetic-long", of five: continued as they are,
    with written-out steps.
    "countdown", a number to make from three others; "countdown-4", from four; "countdown-3-4", by
    turns; "countdown-unsolvable", where giving up is right; "countdown-general", sums, and requests
    that cannot be read: asked in the model's chat format.
    "jsonl", the records of `data`, see `from_records`.

    Args:
        name: the task.
        data: file or folder of records.
        template: see `from_records`.
        language: see `from_records`.

    Raises:
        RequestError: there is no such task, or `data` is missing.
        DataError: a record cannot be used; with file and line.
        SandboxUnavailable: a record has tests, and programs cannot be isolated here.
    """
    if name == "jsonl":
        if not data:
            raise RequestError("task jsonl needs --data FILE, records of prompt and answer")
        return from_records(read(data), template=template, language=language)
    if data:
        raise RequestError(f"task {name} makes its own problems; --data goes with --task jsonl")
    if name == "arithmetic":
        return _arithmetic(None)
    if name == "arithmetic-long":
        return _arithmetic(5)
    if name in COUNTDOWN:
        return _countdown(COUNTDOWN[name], 1.0 if name == "countdown-unsolvable" else None)
    if name == "countdown-general":
        return _general()
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

    def vote(text: str) -> str | None:
        found = tasks.answer(text)
        return None if found is None else str(found)

    return Task(problems, judge, solution, vote)


def _countdown(sizes: tuple[int, ...], unsolvable: float | None) -> Task:
    def problems(*seed: int, held: bool = False) -> Iterator[Problem]:
        options = {"held": held, "unsolvable": unsolvable}
        found = [countdown.problems(*seed, numbers=n, **options) for n in sizes]
        for target, given in itertools.chain.from_iterable(zip(*found, strict=True)):
            asked = countdown.prompt(target, given)
            yield Problem(asked, countdown.answer(target, given))

    def judge(problem: Problem, text: str, finished: bool) -> Verdict:
        right = finished and countdown.is_right(problem.prompt, text)
        form = finished and countdown.said(text) is not None
        lines = {"language": traces.readable(text), "sound": traces.sound(text)}
        return {"accuracy": float(right), "format": float(form), **lines}

    def solution(problem: Problem) -> str:
        return traces.solution(problem.prompt)

    return Task(problems, judge, solution, countdown.vote)


def _general() -> Task:
    def problems(*seed: int, held: bool = False) -> Iterator[Problem]:
        for asked in corpus.general(*seed, held=held):
            yield Problem(asked, countdown.said(corpus.reply(asked)) or "")

    def judge(problem: Problem, text: str, finished: bool) -> Verdict:
        answer = countdown.said(text) if finished else None
        return {"accuracy": float(answer == problem.answer), "format": float(answer is not None)}

    return Task(problems, judge, lambda problem: corpus.reply(problem.prompt), countdown.vote)


def from_records(records: Records, *, template: str = "", language: str = "en") -> Task:
    """Problems with known answers, from files.

    A record is {"prompt", "answer"}, judged by `rewards.maths`, or {"prompt", "tests": [[input,
    expected output], ...]}, whose answer is a program, judged by `sandbox.solves`. Components of a
    verdict: accuracy; format, R1-Zero's form with a template that asks for <answer> tags, else
    `rewards.chat_form`; language, the share of words in the language that the record's "language"
    names. One record in 20 is held out, by a hash of its prompt.

    Args:
        records: see `records.read`.
        template: text that is continued as it is, with {prompt} for the prompt, such as R1_ZERO;
            empty: the prompt is what the user says in the model's chat format.
        language: of records that name none; see `rewards.LANGUAGES`.

    Raises:
        DataError: a field is missing or is something else; with file and line.
        RequestError: a template without {prompt}, or a language that is not known.
        SandboxUnavailable: a record has tests, and programs cannot be isolated here.
    """
    if template and "{prompt}" not in template:
        raise RequestError("the template has no {prompt}: say where the prompt goes")
    if language not in rewards.LANGUAGES:
        raise RequestError(f"language {language!r}: expected one of {', '.join(rewards.LANGUAGES)}")
    found = [_record(records, i, template, language) for i in range(len(records))]
    slow = any(problem.tests for problem in found)
    if slow:
        sandbox.check()
    for_training, held_out = [], []
    for index, problem in enumerate(found):
        # Of the bare prompt: recipes with other templates must hold out the same problems.
        bare = records.field(index, "prompt").encode(errors="surrogatepass")
        digest = hashlib.blake2b(bare, digest_size=4).digest()
        (for_training if int.from_bytes(digest) % 20 else held_out).append(problem)

    def problems(*seed: int, held: bool = False) -> Iterator[Problem]:
        these = held_out if held else for_training
        rng = np.random.default_rng([*seed, int(held)])
        while these:
            yield from (these[i] for i in rng.permutation(len(these)))

    digest = hashlib.blake2b(repr(found).encode(errors="surrogatepass"), digest_size=16)
    form = rewards.form if rewards.ANSWER in template else rewards.chat_form
    judge = functools.partial(_judge, form=form)
    return Task(
        problems, judge, vote=rewards.vote, slow=slow, everything=tuple(found),
        fingerprint=digest.hexdigest(),
    )  # fmt: skip


def _record(records: Records, index: int, template: str, language: str) -> Problem:
    record, place = records[index], records.places[index]
    prompt = records.field(index, "prompt")
    spoken = record.get("language", language)
    if spoken not in rewards.LANGUAGES:
        known = ", ".join(rewards.LANGUAGES)
        raise DataError(f"{place}: language is {spoken!r}; expected one of {known}")
    tests, answer = record.get("tests"), ""
    if tests is None:
        answer = records.field(index, "answer")
    elif not isinstance(tests, list) or not tests or not all(map(_is_test, tests)):
        raise DataError(f"{place}: tests must be a list of [input, expected output] pairs of texts")
    text = template.replace("{prompt}", prompt) if template else prompt
    pairs = tuple((given, expected) for given, expected in tests or ())
    return Problem(text, answer, bool(template), pairs, spoken)


def _is_test(pair: object) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) for p in pair)


def _judge(
    problem: Problem, text: str, finished: bool, *, form: Callable[[str], rewards.Judged]
) -> Verdict:
    accuracy = 0.0
    if finished and problem.tests:
        source = rewards.program(text)
        if source is not None:
            accuracy, _ = sandbox.solves(source, problem.tests)
    elif finished:
        accuracy = rewards.maths(text, problem.answer).reward
    return {
        "accuracy": accuracy,
        "format": form(text).reward if finished else 0.0,
        "language": rewards.language(text, problem.language),
    }


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
