"""Many answers of one model to many problems, judged, kept on the disk as they are made.

A batch of problems is a step of the run: `answers/00000012.jsonl` holds those of step 12. They are
a pure function of the settings and the step, so a run that was ended writes the same files again.
"""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from deepzoo import zoo
from deepzoo.recipes.parts import rewards
from deepzoo.recipes.parts.problems import Problem, Task
from deepzoo.recipes.parts.rollout import rollout, step_seed
from deepzoo.recipes.parts.run import Run
from deepzoo.recipes.parts.step import Mean, Metrics, State, start
from deepzoo.zoo.prompt import encode, tokenizer_of
from deepzoo.zoo.types import Model

_FOLDER = "answers"


class Answer(NamedTuple):
    """One answer.

    Attributes:
        problem: number of the problem.
        prompt: its text.
        text: what the model wrote, without the end token; the thought's opening tag is there even
            if the prompt ended with it.
        verdict: components of its reward; None for NaN, where the verifier failed.
        finished: False for an answer that was cut off.
        tokens: its length.
    """

    problem: int
    prompt: str
    text: str
    verdict: dict[str, float | None]
    finished: bool
    tokens: int

    @property
    def right(self) -> bool:
        """Whether all of it is right, and the model ended it itself."""
        return self.finished and self.verdict.get("accuracy") == 1.0


def sample(
    run: Run,
    model: Model,
    task: Task,
    problems: Sequence[Problem],
    *,
    answers: int,
    at_once: int,
    max_tokens: int,
    temperature: float,
    top_p: float,
    slots: int,
    seed: int,
) -> None:
    """Has the model answer every problem `answers` times; goes on where an earlier run ended.

    Args:
        run: the open run; the files lie in its directory.
        model: with a tokenizer.
        task: whose verifier judges.
        problems: all of them.
        answers: of each.
        at_once: problems of a step.
        max_tokens: of an answer.
        temperature: 0 for greedy.
        top_p: nucleus.
        slots: answers that are written together.
        seed: of the sampling.
    """
    params = zoo.unstack(model.params)
    prompts = [encode(model, p.prompt, raw=p.raw) for p in problems]
    # Few widths, so that few programs are compiled; the same ones however the run was ended.
    width = -(-max(len(p.tokens) for p in prompts) // 32) * 32 + max_tokens
    folder = run.out / _FOLDER
    folder.mkdir(exist_ok=True)

    def step(state: State, which: range) -> tuple[State, Metrics]:
        asked = [problems[i] for i in which]
        made = rollout(
            model.config, params, [prompts[i].tokens for i in which], answers=answers,
            max_tokens=max_tokens, width=width, eos_ids=tokenizer_of(model).eos_ids,
            seed=step_seed(seed, int(state.step)), temperature=temperature, top_p=top_p,
            slots=slots,
        )  # fmt: skip

        def judged(row: int) -> Answer:
            at, ids, finished = int(made.group[row]), made.answer(row), not made.truncated[row]
            text = tokenizer_of(model).decode(ids[:-1] if finished else ids)
            if prompts[which[at]].thought:
                text = rewards.THINK + text
            verdict = {
                k: None if np.isnan(v) else float(v)
                for k, v in task.judge(asked[at], text, finished).items()
            }
            return Answer(which[at], asked[at].prompt, text, verdict, finished, len(ids))

        with ThreadPoolExecutor(os.cpu_count() if task.slow else 1) as pool:
            found = list(pool.map(judged, range(len(made.group))))
        _write(_path(run.out, int(state.step)), found)
        count = jnp.float32(len(found))
        sums = {
            "accuracy": Mean(jnp.float32(sum(a.right for a in found)), count),
            "length": Mean(jnp.float32(sum(a.tokens for a in found)), count),
            "truncated": Mean(jnp.float32(sum(not a.finished for a in found)), count),
        }
        none = jnp.float32(jnp.nan)  # there is no loss
        metrics = {"loss": none, "norm": none, "weight": count, "finite": True, "sums": sums}
        return state._replace(step=state.step + 1), metrics

    def batch(at: int) -> range:
        return range(at * at_once, min((at + 1) * at_once, len(problems)))

    state = run.state(lambda: start({"none": jnp.zeros(1)}, optax.identity(), seed))
    steps = -(-len(problems) // at_once)
    run.fit(step, state, batch, steps)


def made(out: Path) -> Iterator[Answer]:
    """All answers of a finished run, in the order of the problems."""
    for path in sorted((out / _FOLDER).glob("*.jsonl")):
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield Answer(**json.loads(line))


def _path(out: Path, step: int) -> Path:
    return out / _FOLDER / f"{step:08d}.jsonl"


def _write(path: Path, answers: Sequence[Answer]) -> None:
    partial = path.with_suffix(".tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(a._asdict()) + "\n" for a in answers)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
