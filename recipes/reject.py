"""Rejection sampling: sample many answers, keep those that hold, write a data set.

    deepzoo train reject --preset nano --out DIR
    deepzoo train sft --data DIR/data.jsonl --out DIR2

Paper: DeepSeek-R1 (arXiv 2501.12948, 2.3.3): some 600K right answers of the model after its first
stage of reinforcement learning, without those that mix languages, have long paragraphs or blocks of
code in the thought. It is a filter: there is no equation.

`data.jsonl` holds {"prompt", "completion"} records, which `sft` reads; `report.json` how many
answers there were, how many were left out for which reason, and how many problems have none left.

Deviations: the paper does not say how many answers it took of a problem, at which temperature, or
what a long paragraph is; the values of `r1_600k` are ours. Its judge for answers that rules cannot
check is not here.
"""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from deepzoo import zoo
from deepzoo.recipes.parts import answers, processes, rewards
from deepzoo.recipes.parts import problems as tasks
from deepzoo.recipes.parts.answers import Answer
from deepzoo.recipes.parts.main import main
from deepzoo.recipes.parts.run import Options, Run, mesh_of
from deepzoo.zoo.errors import RequestError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One data set."""

    model: str = "v2-nano"
    """Whose answers: a shipped model or a directory."""
    task: str = "arithmetic-long"
    """Problems and their verifier, see recipes/parts/problems.py."""
    data: str = ""
    """File or folder of problems, for task jsonl."""
    target_language: str = "en"
    """Of answers, where a problem of task jsonl names none."""
    prompts: int = 64
    """Problems, each of them another."""
    answers: int = 4
    """Answers of each problem."""
    max_tokens: int = 160
    """Longest answer."""
    temperature: float = 1.0
    """Of sampling."""
    top_p: float = 1.0
    """Nucleus."""
    per_problem: int = 4
    """Answers that are kept of a problem at most; the first ones. 0 for all."""
    form: bool = False
    """Keep only answers of the form that the task asks for; of task jsonl, a thought and an answer
    behind it."""
    language: float = 0.0
    """Keep only answers of which at least this share is in the target language."""
    sound: float = 0.0
    """Keep only answers of whose steps at least this share is right, where a task checks steps."""
    repeated: float = 0.5
    """Keep only answers of which at most this share of the lines has stood there before."""
    paragraph: int = 0
    """Keep only answers whose paragraphs have at most so many characters; 0 for any."""
    code: bool = True
    """Keep answers with blocks of code in the thought, too."""
    shortest: int = 1
    """Keep only answers of at least so many tokens."""
    longest: int = 0
    """Keep only answers of at most so many tokens; 0 for any."""
    at_once: int = 16
    """Problems of a step; what was answered is kept on the disk after each."""
    slots: int = 64
    """Answers that are written together."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the model; FP8 weights stay as they are."""
    seed: int = 0
    """Of problems and sampling."""


PRESETS = {
    "nano": Recipe(),
    "r1_600k": Recipe(
        model="runs/r1_stage1/model", task="jsonl", data="problems.jsonl", prompts=150_000,
        answers=16, max_tokens=32768, per_problem=4, form=True, language=0.95, repeated=0.2,
        paragraph=2000, code=False, shortest=64, at_once=64, slots=512,
        dtype="bfloat16",
    ),
}  # fmt: skip


def train(recipe: Recipe, out: Path, options: Options | None = None) -> dict[str, Any]:
    """Samples and filters; writes `out`/data.jsonl and `out`/report.json and returns the latter.

    Called again for the same directory, it goes on where it was ended.

    Raises:
        RequestError: nothing is left after filtering; with the reasons.
    """
    processes.only_one("reject")
    how: dict[str, Any] = {"dtype": recipe.dtype, "mtp": False, "mesh": mesh_of(options)}
    model = zoo.load(recipe.model, stacked=False, **how)
    task = tasks.task(recipe.task, recipe.data, language=recipe.target_language)
    problems = tasks.batch(task.problems, recipe.prompts, recipe.seed)
    told = {"facts": {"problems": task.fingerprint}, "models": {"model": model.params}}
    with Run(out, recipe, options, frozen=model.config, **told) as run:
        answers.sample(
            run, model, task, problems, answers=recipe.answers, at_once=recipe.at_once,
            max_tokens=recipe.max_tokens, temperature=recipe.temperature, top_p=recipe.top_p,
            slots=recipe.slots, seed=recipe.seed,
        )  # fmt: skip
        reasons: Counter[str] = Counter()
        served: Counter[int] = Counter()

        def write(path: Path) -> None:
            with path.open("w", encoding="utf-8") as file:
                for answer, reason in filtered(recipe, run.out):
                    reasons[reason] += 1
                    if reason == "kept":
                        served[answer.problem] += 1
                        record = {"prompt": answer.prompt, "completion": answer.text}
                        file.write(json.dumps(record, ensure_ascii=False) + "\n")

        path = run.product("data.jsonl", write)
        report = {
            "answers": reasons.total(), "kept": reasons.pop("kept", 0),
            "left_out": dict(sorted(reasons.items())), "problems": len(problems),
            "problems_without": len(problems) - len(served),
        }  # fmt: skip
        text = json.dumps(report, indent=1)
        run.product("report.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    told = ", ".join(f"{count} {reason}" for reason, count in report["left_out"].items())
    if not report["kept"]:
        raise RequestError(
            f"{path}: none of {report['answers']} answers is left ({told}); filter less, take a"
            " better model or easier problems"
        )
    run.say(f"{report['kept']} of {report['answers']} answers kept; left out: {told or 'none'}")
    return report


def filtered(recipe: Recipe, out: Path):
    """Every answer with the first reason to leave it out, or "kept"."""
    seen: set[str] = set()
    kept, problem = 0, -1
    for answer in answers.made(out):
        if answer.problem != problem:
            seen, kept, problem = set(), 0, answer.problem
        reason = fault(recipe, answer)
        if not reason and answer.text in seen:
            reason = "the same again"
        if not reason and recipe.per_problem and kept >= recipe.per_problem:
            reason = "enough of this problem"
        if not reason:
            seen.add(answer.text)
            kept += 1
        yield answer, reason or "kept"


def fault(recipe: Recipe, answer: Answer) -> str:
    """Why an answer is no example, looked at alone; empty if it is one."""
    verdict, text = answer.verdict, answer.text
    thought, _, _ = text.partition(rewards.THINK_END)
    paragraph = max(map(len, text.split("\n\n")))
    language, sound = verdict.get("language"), verdict.get("sound")
    tests = {
        "without verdict": None in verdict.values(),
        "cut off": not answer.finished,
        "wrong": not answer.right,
        "another form": recipe.form and verdict.get("format") != 1.0,
        "other languages": language is not None and language < recipe.language,
        "wrong steps": sound is not None and sound < recipe.sound,
        "repeated lines": rewards.repeated(text) > recipe.repeated,
        "a long paragraph": bool(recipe.paragraph) and paragraph > recipe.paragraph,
        "code in the thought": not recipe.code and "```" in thought,
        "too short": answer.tokens < recipe.shortest,
        "too long": bool(recipe.longest) and answer.tokens > recipe.longest,
    }
    return next((reason for reason, true in tests.items() if true), "")


if __name__ == "__main__":
    main(train, PRESETS, __doc__)
