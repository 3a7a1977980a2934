"""Accepted answers with general data beside them: what R1's second fine-tuning learns.

Paper: DeepSeek-R1 (arXiv 2501.12948, 2.3.3): 600K samples of reasoning and 200K of anything else.
Here some records may also follow others in one conversation, so that a model whose data know single
questions only learns to answer a second one.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from deepzoo.recipes.parts import problems as tasks
from deepzoo.recipes.parts.records import read
from deepzoo.recipes.parts.run import Options, Run
from deepzoo.zoo.errors import RequestError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """What is mixed."""

    accepted: str
    """File of accepted answers."""
    general: str
    """A task whose solutions can be written, or a file or folder of prompts with completions;
    empty for nothing."""
    share: float
    """Of all records that is general, from 0 to below 1; a file gives what it has."""
    turns: float = 0.0
    """Share of records that follow one or two others, drawn from all, in one conversation."""
    seed: int = 0
    """Of the general problems and of the conversations."""


def mix(recipe: Mixture, out: Path, options: Options | None = None) -> dict[str, int]:
    """Joins both; writes `out`/data.jsonl and `out`/report.json and returns the latter.

    Raises:
        DataError: a file cannot be used.
        RequestError: the task cannot write solutions.
    """
    with Run(out, recipe, options) as run:
        accepted = [dict(record) for record in read(recipe.accepted)]
        wanted = round(len(accepted) * recipe.share / (1 - recipe.share))
        general = list(_general(recipe, wanted)) if recipe.general else []

        def write(path: Path) -> None:
            records = accepted + general
            if recipe.turns:
                records = list(conversations(records, recipe.turns, recipe.seed))
            lines = (json.dumps(r, ensure_ascii=False) + "\n" for r in records)
            path.write_text("".join(lines), encoding="utf-8")

        run.product("data.jsonl", write)
        report = {"accepted": len(accepted), "general": len(general)}
        text = json.dumps(report, indent=1) + "\n"
        run.product("report.json", lambda path: path.write_text(text, encoding="utf-8"))
    return report


def conversations(records: Sequence[dict[str, str]], share: float, seed: int) -> Iterator[dict]:
    """{"messages"} of {"prompt", "completion"}: of a conversation the last completion is learned.

    Args:
        records: every one comes once as the last turn, in this order.
        share: of them that have one or two others before them.
        seed: of the draws.
    """
    rng = np.random.default_rng([seed, 5])
    for record in records:
        before = int(rng.integers(1, 3)) if rng.random() < share else 0
        turns = [*(records[int(i)] for i in rng.integers(len(records), size=before)), record]
        yield {
            "messages": [
                {"role": role, "content": turn[field]}
                for turn in turns
                for role, field in (("user", "prompt"), ("assistant", "completion"))
            ]
        }


def _general(recipe: Mixture, wanted: int) -> Iterator[dict[str, str]]:
    if recipe.general not in tasks.NAMES:
        records = read(recipe.general)
        for i in range(min(wanted, len(records))):
            yield {k: records.field(i, k) for k in ("prompt", "completion")}
        return
    task = tasks.task(recipe.general)
    if task.solution is None:
        raise RequestError(f"task {recipe.general} has no written solutions; name another")
    for problem in tasks.batch(task.problems, wanted, recipe.seed) if wanted else ():
        yield {"prompt": problem.prompt, "completion": task.solution(problem)}
