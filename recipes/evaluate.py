"""How good a model is: pass@1, pass@k and maj@k on verifiable problems, perplexity on text.

    deepzoo evaluate v2-nano
    deepzoo train evaluate --preset nano --model runs/x/model --out DIR

Paper: DeepSeek-R1 (arXiv 2501.12948, section 3): 4 to 64 answers of each problem at temperature 0.6
and top-p 0.95, at most 32,768 tokens, pass@1 as their mean; for AIME also the majority of 64
answers (cons@64); its equation for pass@1 has no number. pass@k is the unbiased estimate of Codex
(arXiv 2107.03374, eq. 1). Perplexity is exp of the mean negative log-probability of a token.

pass@k and maj@k come with their 95% intervals: problems are drawn from a larger set, so few of them
say little, however many answers each has. Perplexity, lengths and the share of answers that were
cut off are told without. `report.json` holds the numbers, `report.md` the table,
`answers/` everything that the model wrote with its verdicts.

Deviations: where there are more answers than voters, maj@k is the mean over groups of k, in order;
greedy decoding is `--temperature 0`.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from deepzoo import zoo
from deepzoo.recipes.parts import answers, processes
from deepzoo.recipes.parts import problems as tasks
from deepzoo.recipes.parts.accuracy import held_out, interval, majority_at_k, pass_at_k
from deepzoo.recipes.parts.documents import Documents, encoded
from deepzoo.recipes.parts.logprobs import score
from deepzoo.recipes.parts.main import main
from deepzoo.recipes.parts.mesh import spread
from deepzoo.recipes.parts.problems import Problem, Task
from deepzoo.recipes.parts.records import read
from deepzoo.recipes.parts.run import Options, Run, mesh_of
from deepzoo.zoo.errors import RequestError
from deepzoo.zoo.types import Model


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One evaluation."""

    model: str = "v2-nano"
    """A shipped model or a directory."""
    task: str = "arithmetic"
    """Problems and their verifier, see recipes/parts/problems.py; empty for none."""
    data: str = ""
    """File or folder of problems, for task jsonl."""
    template: str = ""
    """Text around {prompt} that is continued as it is, for task jsonl and models without a chat
    format."""
    split: Literal["held_out", "all"] = "held_out"
    """Problems that recipes do not train on, or all of the file."""
    problems: int = 100
    """How many of them; 0 for all, of a file."""
    samples: int = 4
    """Answers of each problem."""
    passes: tuple[int, ...] = (1, 4)
    """k of pass@k."""
    majorities: tuple[int, ...] = (4,)
    """k of maj@k."""
    max_tokens: int = 256
    """Longest answer."""
    temperature: float = 0.6
    """Of sampling; 0 for greedy."""
    top_p: float = 0.95
    """Nucleus."""
    text: str = ""
    """File or folder of {"text"} records, or .txt files, to measure the perplexity on."""
    length: int = 1024
    """Tokens that a document is cut into for the perplexity."""
    at_once: int = 32
    """Problems of a step; what was answered is kept on the disk after each."""
    slots: int = 64
    """Answers that are written together."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the model; FP8 weights stay as they are."""
    seed: int = 0
    """Of problems and sampling."""


PRESETS = {
    "nano": Recipe(),
    "aime_like": Recipe(
        model="deepseek-r1-distill-qwen-1.5b", task="jsonl", data="problems.jsonl", split="all",
        problems=0, samples=64, passes=(1, 64), majorities=(64,), max_tokens=32768, at_once=1,
        dtype="bfloat16",
    ),
}  # fmt: skip


def train(recipe: Recipe, out: Path, options: Options | None = None) -> dict[str, Any]:
    """Measures; writes `out`/report.json and `out`/report.md and returns the former.

    Called again for the same directory, it goes on where it was ended.

    Raises:
        RequestError: k is larger than the number of samples, or there is nothing to measure.
    """
    processes.only_one("evaluate")
    _check(recipe)
    mesh = mesh_of(options)
    model = zoo.load(recipe.model, dtype=recipe.dtype, mtp=False, stacked=False, mesh=mesh)
    facts: dict[str, Any] = {}
    task = problems = None
    if recipe.task:
        task = tasks.task(recipe.task, recipe.data, template=recipe.template)
        problems = chosen(recipe, task)
        facts["problems"] = task.fingerprint
    text = encoded(model, read(recipe.text)) if recipe.text else None
    if text is not None:
        facts["text"] = text.fingerprint
    report: dict[str, Any] = {"model": recipe.model, "settings": dataclasses.asdict(recipe)}
    told: dict[str, Any] = {"facts": facts, "models": {"model": model.params}}
    with Run(out, recipe, options, frozen=model.config, **told) as run:
        if task is not None and problems is not None:
            answers.sample(
                run, model, task, problems, answers=recipe.samples, at_once=recipe.at_once,
                max_tokens=recipe.max_tokens, temperature=recipe.temperature, top_p=recipe.top_p,
                slots=recipe.slots, seed=recipe.seed,
            )  # fmt: skip
            report |= accuracies(recipe, task, run.out)
        if text is not None:
            report |= perplexity(model, text, recipe.length, mesh)
        text, lines = json.dumps(report, indent=1), table(report)
        run.product("report.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))
        run.product("report.md", lambda path: path.write_text(lines, encoding="utf-8"))
        if not run.options.quiet:
            print(lines, end="")
    return report


def chosen(recipe: Recipe, task: Task) -> list[Problem]:
    """The problems that are asked."""
    if recipe.split == "held_out":
        return held_out(task, recipe.problems, recipe.seed)
    if not task.everything:
        raise RequestError(f"task {recipe.task} has no end; take --split held_out")
    found = list({p.prompt: p for p in task.everything}.values())
    return found[: recipe.problems or None]


def accuracies(recipe: Recipe, task: Task, out: Path) -> dict[str, Any]:
    """pass@k, maj@k and how long answers were, from the files of a run."""
    made = list(answers.made(out))
    shape = (-1, recipe.samples)
    right = np.array([a.right for a in made]).reshape(shape)
    said = [task.vote(a.text) if a.finished else None for a in made]
    votes = [said[i : i + recipe.samples] for i in range(0, len(said), recipe.samples)]
    found = {f"pass@{k}": pass_at_k(right, k) for k in recipe.passes}
    found |= {f"maj@{k}": majority_at_k(right, votes, k) for k in recipe.majorities}
    return {
        "problems": len(right), "samples": recipe.samples,
        **{name: _shares(values) for name, values in found.items()},
        "truncated": float(np.mean([not a.finished for a in made])),
        "unjudged": sum(None in a.verdict.values() for a in made),
        "length": float(np.mean([a.tokens for a in made])),
    }  # fmt: skip


def _shares(values: np.ndarray) -> dict[str, float]:
    low, high = interval(values)
    return {"value": float(values.mean()), "low": low, "high": high}


def perplexity(
    model: Model, text: Documents, length: int, mesh: Mesh | None = None
) -> dict[str, Any]:
    """exp of the mean negative log-probability of every token but each window's first.

    Args:
        model: with a tokenizer.
        text: what is read.
        length: of a window; a document is cut into such windows, which do not overlap.
        mesh: that the model lies on; windows are divided over it.

    Returns:
        "perplexity"; "nll" in nats per token; "tokens" that were predicted.
    """
    windows = []
    for i in range(len(text.lengths)):
        ids = text.tokens[text.starts[i] : text.starts[i + 1]]
        windows += [ids[at : at + length] for at in range(0, len(ids) - 1, length)]
    rows = 8 if mesh is None else 8 * mesh.shape["data"] * mesh.shape["fsdp"]
    tokens = np.zeros((-(-len(windows) // rows) * rows, length), np.int32)
    mask = np.zeros((len(tokens), length - 1), np.float64)
    for i, ids in enumerate(windows):
        tokens[i, : len(ids)] = ids
        mask[i, : len(ids) - 1] = 1
    stacked = zoo.stack(model.params)

    @jax.jit
    def logprobs(params, tokens):
        return score(model.config, params, tokens).logprobs

    total = 0.0
    for at in range(0, len(tokens), rows):
        some = tokens[at : at + rows]
        some = some if mesh is None else spread(some, mesh)
        found = np.asarray(logprobs(stacked, some), np.float64)
        total -= float((found * mask[at : at + rows]).sum())
    nll = total / mask.sum()
    return {"perplexity": math.exp(nll), "nll": nll, "tokens": int(mask.sum())}


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["| measure | value | 95% interval |", "|---|---|---|"]
    for name, found in report.items():
        if name.startswith(("pass@", "maj@")):
            low, high = found["low"], found["high"]
            lines.append(f"| {name} | {found['value']:.1%} | {low:.1%} to {high:.1%} |")
    if "problems" in report:
        lines.append(f"| problems, answers of each | {report['problems']}, {report['samples']} | |")
        lines.append(f"| cut off | {report['truncated']:.1%} | |")
        lines.append(f"| tokens of an answer | {report['length']:.0f} | |")
    if report.get("unjudged"):
        lines.append(f"| without verdict, counted as wrong | {report['unjudged']} | |")
    if "perplexity" in report:
        lines.append(f"| perplexity | {report['perplexity']:.4g} | |")
        lines.append(f"| tokens of text | {report['tokens']:,} | |")
    return "\n".join(lines) + "\n"


def _check(recipe: Recipe) -> None:
    if not recipe.task and not recipe.text:
        raise RequestError("nothing to measure: give --task, --text or both")
    worst = max((*recipe.passes, *recipe.majorities), default=1)
    if recipe.task and worst > recipe.samples:
        raise RequestError(
            f"pass@{worst} or maj@{worst} needs {worst} answers of each problem; --samples is"
            f" {recipe.samples}"
        )
    if recipe.task and recipe.split == "held_out" and recipe.problems < 1:
        raise RequestError("--problems must be at least 1; 0, for all, goes with --split all")


if __name__ == "__main__":
    main(train, PRESETS, __doc__)
