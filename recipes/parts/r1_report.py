"""What the report of the R1 recipe says, from the files that its stages wrote.

OUT/00-base/ ...                           runs of the stages
OUT/evaluation/base/countdown/greedy/ ...  runs of `recipes/evaluate.py`: model, task, how
OUT/times.json                             see `clock`
"""

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deepzoo.recipes.parts import answers, clock
from deepzoo.recipes.parts.log import METRICS, read_metrics
from deepzoo.recipes.parts.report import (
    Block,
    Heading,
    Picture,
    Share,
    Table,
    Text,
    Verbatim,
    curves,
    ladder,
)
from deepzoo.recipes.parts.settings import differences, plain

# How every model answers: name -> temperature, top-p. The second is the papers' (R1, section 3).
SAMPLING = {"greedy": (0.0, 1.0), "0.6": (0.6, 0.95), "1.0": (1.0, 1.0)}
WAYS = {"greedy": "greedy", "0.6": "temperature 0.6, top-p 0.95", "1.0": "temperature 1"}
TIMES, EVALUATION = "times.json", "evaluation"


class Stage(NamedTuple):
    """One stage, ready to run.

    name: of its directory, without the number.
    title: for people.
    path: its directory.
    train: of its recipe; None for a model that was given.
    settings: of its recipe.
    model: what it makes, or was given; None where it makes none.
    """

    name: str
    title: str
    path: Path
    train: Callable[..., Any] | None
    settings: Any
    model: str | None

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do: what it writes last is there."""
        last = "model" if self.model else "report.json"
        if getattr(self.settings, "lora_rank", 0):
            last = "adapter"
        return self.train is None or (self.path / last).exists()


def measured(recipe: Any) -> list[tuple[str, str]]:
    """(task, way of answering) of all evaluations of a model."""
    first, *others = recipe.evaluated or (recipe.task,)
    return [(first, how) for how in SAMPLING] + [(task, "0.6") for task in others]


def evaluation(out: Path, name: str, task: str, how: str) -> Path:
    """The directory in which a stage's model answers held-out problems."""
    return out / EVALUATION / name / task / how


type Found = Mapping[str, Mapping[tuple[str, str], Share]]
"""Name of a stage -> (task, way of answering) -> share of right answers."""


def accuracies(out: Path, recipe: Any, stages: Sequence[Stage]) -> Found:
    """What was measured so far, in the order of the stages."""
    found: dict[str, dict[tuple[str, str], Share]] = {}
    for stage in stages:
        for task, how in measured(recipe) if stage.model else ():
            if report := _json(evaluation(out, stage.name, task, how) / "report.json"):
                found.setdefault(stage.name, {})[task, how] = Share(**report["pass@1"])
    return found


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def told(
    out: Path, recipe: Any, stages: Sequence[Stage], presets: Mapping[str, Any]
) -> Iterator[Block]:
    """The report, from what the stages have written so far."""
    found = accuracies(out, recipe, stages)
    titles = {s.name: s.title for s in stages}
    every, ways = measured(recipe), list(WAYS.values())
    (task, _), others = every[0], every[len(ways) :]
    yield Heading("R1, stage by stage", 1)
    asked = f"{recipe.samples} answers of each" if recipe.samples > 1 else "one answer of each"
    yield Text(
        f"Every model answers the same {recipe.problems} held-out problems of the task"
        f" {task}, with {asked}. Beside every share stands its 95% interval."
    )
    yield Verbatim(command(recipe, presets))
    yield Heading("How often each model is right")
    rows = [
        (titles[name], [shares.get((task, how)) for how in WAYS]) for name, shares in found.items()
    ]
    yield Picture("ladder.svg", ladder(rows, ways), "Shares of right answers, with intervals")
    yield Table(
        ["", *ways, "cut off", "tokens"],
        [
            [
                title,
                *(str(share or "") for share in shares),
                *_cut(evaluation(out, name, task, "0.6")),
            ]
            for name, (title, shares) in zip(found, rows, strict=True)
        ],
    )
    yield Text("The last two columns are those of temperature 0.6.")
    yield from _compared(task, found)
    if others:
        yield Heading("Other tasks")
        yield Text(f"At temperature 0.6, {recipe.problems} held-out problems of each.")
        yield Table(
            ["", *(other for other, _ in others)],
            [
                [titles[name], *(str(shares.get(other, "")) for other in others)]
                for name, shares in found.items()
            ],
        )
    yield from _rl(out, stages)
    yield from _data(stages)
    yield from _samples(out, task, found, titles)
    yield from _times(out, stages)


def _cut(path: Path) -> list[str]:
    report = _json(path / "report.json")
    return [f"{report['truncated']:.1%}", f"{report['length']:.0f}"] if report else ["", ""]


# What the paper compares: a claim, the later and the earlier stage.
_CLAIMS = (
    ("RL alone: R1-Zero against its base", "zero", "base"),
    ("first stage of RL: Dev2 against Dev1", "rl-1", "cold-start"),
    ("the base on sampled answers: Dev3 against Dev2", "fine-tuning", "rl-1"),
    ("second stage of RL: R1 against Dev3", "rl-2", "fine-tuning"),
    ("all stages: R1 against R1-Zero", "rl-2", "zero"),
    ("the distilled student against its teacher", "distillation", "rl-2"),
    ("the same student: distilled against RL alone", "distillation", "student-rl"),
)


def _compared(task: str, found: Found) -> Iterator[Block]:
    rows = []
    for claim, later, earlier in _CLAIMS:
        one, other = (found.get(name, {}).get((task, "0.6")) for name in (later, earlier))
        if one is not None and other is not None:
            apart = one.low > other.high or one.high < other.low
            points = f"{100 * (one.value - other.value):+.1f}"
            rows.append([claim, points, "apart" if apart else "overlap"])
    if rows:
        yield Table(["at temperature 0.6", "points", "intervals"], rows)


def _rl(out: Path, stages: Sequence[Stage]) -> Iterator[Block]:
    """Curves of reinforcement learning."""
    every = [(s.title, read_metrics(s.path / METRICS)) for s in stages]
    runs = {title: rows for title, rows in every if any("reward" in r for r in rows)}
    keys = {"accuracy": "right", "length": "tokens of an answer", "truncated": "cut off"}
    panels = {
        told: [
            [(r["step"], r[key]) for r in some if r.get(key) is not None] for some in runs.values()
        ]
        for key, told in keys.items()
    }
    if any(map(any, panels.values())):
        yield Heading("Reinforcement learning, rollout by rollout")
        yield Picture("curves.svg", curves(list(runs), panels), "Accuracy and length over rollouts")
        yield Text(
            "Of the answers that the model learns from, sampled at the rollout's temperature."
        )


def _data(stages: Sequence[Stage]) -> Iterator[Block]:
    """What rejection sampling kept."""
    found = {s.name: _json(s.path / "report.json") for s in stages if s.model is None}
    counts, mixture = (found.get(name, {}) for name in ("rejection", "mixture"))
    if counts:
        yield Heading("Rejection sampling")
        total = counts["answers"]
        reasons = {"kept": counts["kept"], **counts["left_out"]}
        yield Table(["", "answers", "share"], [
            [reason, f"{n:,}", f"{n / total:.1%}"] for reason, n in reasons.items()
        ])  # fmt: skip
        beside = f" {mixture['general']:,} general records stand beside them." if mixture else ""
        yield Text(
            f"{counts['problems_without']:,} of {counts['problems']:,} problems have no answer that"
            f" was kept.{beside}"
        )


def _samples(out: Path, task: str, found: Found, titles: Mapping[str, str]) -> Iterator[Block]:
    """What each model answers to one problem: the first that some are right on and some wrong."""
    said = {}
    for name, shares in found.items():
        if (task, "0.6") in shares:
            every = answers.made(evaluation(out, name, task, "0.6"))
            said[name] = {a.problem: a for a in reversed(list(every))}
    shared = set.intersection(*(set(some) for some in said.values())) if said else set()
    mixed = [p for p in sorted(shared) if len({some[p].right for some in said.values()}) > 1]
    for problem in (mixed or sorted(shared))[:1]:
        yield Heading("One problem")
        yield Text("Sampled at temperature 0.6; the same problem for all models.")
        yield Verbatim(next(iter(said.values()))[problem].prompt)
        for name, some in said.items():
            answer = some[problem]
            verdict = "right" if answer.right else "wrong" if answer.finished else "cut off"
            yield Heading(f"{titles[name]}: {verdict}", 3)
            yield Verbatim(answer.text)


def _times(out: Path, stages: Sequence[Stage]) -> Iterator[Block]:
    found = clock.read(out / TIMES)
    parts = found.get("parts", {})
    if parts:
        yield Heading("Time")
        names = [s.name for s in stages] + [EVALUATION]
        rows = []
        for name in (n for n in names if n in parts):
            path = next((s.path for s in stages if s.name == name), out)
            steps = max((r["step"] for r in read_metrics(path / METRICS)), default=0)
            told = [f"{parts[name][kind] / 60:.1f}" for kind in ("wall", "cpu")]
            rows.append([name, f"{steps or ''}", *told, str(parts[name]["starts"])])
        total = [f"{sum(p[kind] for p in parts.values()) / 60:.1f}" for kind in ("wall", "cpu")]
        rows.append(["together", "", *total, ""])
        yield Table(["", "steps", "minutes", "minutes of CPU time", "starts"], rows)
        versions = _json(out / "recipe.json").get("versions", {})
        told = ", ".join(f"{name} {version}" for name, version in versions.items())
        yield Text(f"On {found['machine']}; {told}.")


def command(recipe: Any, presets: Mapping[str, Any]) -> str:
    """The command line that makes the same again."""
    now = plain(recipe)
    nearest: list[str] = []
    for number, (name, preset) in enumerate(presets.items()):
        words = ["deepzoo", "train", "r1", "--preset", name, "--out", "DIR"]
        for field in differences(plain(preset), now):
            words += _flag(field, now)
        if not number or len(words) < len(nearest):
            nearest = words
    return shlex.join(nearest)


def _flag(field: str, settings: Any) -> list[str]:
    for part in field.split("."):
        settings = settings[part]
    flag = field.replace("_", "-")
    table, dot, name = flag.rpartition(".")
    if isinstance(settings, bool):
        return [f"--{flag}" if settings else f"--{table}{dot}no-{name}"]
    values = settings if isinstance(settings, list) else [settings]
    return [f"--{flag}", *map(str, values)]
