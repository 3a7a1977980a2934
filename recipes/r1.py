"""R1's whole pipeline: R1-Zero, cold start, two stages of RL, rejection sampling, distillation.

    deepzoo train r1 --preset nano --out DIR

Paper: DeepSeek-R1 (arXiv 2501.12948): R1-Zero 2.2, the four stages of R1 2.3, distillation 2.4, RL
on a student for comparison 4.1; numbers from "Methods" and the supplement (B.4) of the article in
Nature 645, 2025, whose names Dev1, Dev2 and Dev3 the report uses. Each stage is another recipe of
this folder with settings of its own, `--zero.steps 20` for example:

    00-base                 pretrain   unless --base names a model
    01-zero                 grpo       from the base, by rules alone: R1-Zero
    02-cold-start           sft        from the base, on readable solutions
    03-rl-1                 grpo       with a reward for readable language, too
    04-rejection            reject     what that model answers right, readable
    05-mixture                         and general data beside it
    06-fine-tuning          sft        from the base, on both
    07-rl-2                 grpo       R1
    08-student-base         pretrain   a dense model, unless --student names one
    09-distillation         distill    the student learns what R1 (or the mixture) says
    10-student-rl           grpo       the same student by RL alone

Every model answers the same held-out problems greedily, at temperature 0.6 with top-p 0.95, and
at 1.0. `report.html` and `report.md` tell the ladder, and are written anew after each stage.

Each stage is an ordinary run in its directory. Started again with the same command, finished stages
are skipped, and the one that was interrupted goes on. Other settings are refused, but for those of
stages that have no directory yet: to do a stage anew, remove its directory and all behind it.

Deviations:
* those of the recipes of the stages: the preference models of the second stage of RL, and the judge
  for answers that rules cannot check, are not public;
* the cold start's traces are written by the task, not sampled from R1-Zero and edited by people;
* nano: one kind of problems, Countdown, in all stages; for the consistency of language stands the
  share of readable lines; the general data are sums, and requests that cannot be read; some records
  follow others in one conversation (--turns); behind the cold start RL takes a quarter of the rate,
  for at R1-Zero's it lost accuracy;
* small, the same with 64M parameters, is meant for one GPU and was not run: its steps were compiled
  for an H200 that was not there, see recipes/README.md.
"""

import contextlib
import dataclasses
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from deepzoo import zoo
from deepzoo.recipes import distill, evaluate, grpo, pretrain, reject, sft
from deepzoo.recipes.parts import checkpoint, processes
from deepzoo.recipes.parts import problems as tasks
from deepzoo.recipes.parts.clock import Clock
from deepzoo.recipes.parts.main import main
from deepzoo.recipes.parts.mixture import Mixture, mix
from deepzoo.recipes.parts.policy import Objective
from deepzoo.recipes.parts.r1_report import (
    EVALUATION,
    SAMPLING,
    TIMES,
    Found,
    Stage,
    accuracies,
    evaluation,
    measured,
    told,
)
from deepzoo.recipes.parts.report import Picture, markdown, page
from deepzoo.recipes.parts.run import Options, Run
from deepzoo.zoo.errors import RequestError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The whole pipeline. What its stages start from, their problems and seeds it sets itself."""

    base: str = ""
    """A shipped model or a directory to start from, instead of pretraining one."""
    student: str = ""
    """The same for the student."""
    until: str = "student-rl"
    """Name of the last stage that is run; it may change on resuming."""
    task: str = "countdown-3-4"
    """Problems of all stages and their verifier, see recipes/parts/problems.py."""
    data: str = ""
    """File or folder of problems, for task jsonl."""
    zero_task: str = ""
    """Problems of R1-Zero, such as easier ones; empty for those of `task`."""
    general: str = "countdown-general"
    """What is mixed into the second fine-tuning: a task whose solutions can be written, or a file
    of prompts with completions; empty for nothing."""
    share: float = 0.25
    """Of the mixture that is general; 200K of 800K samples in the paper."""
    turns: float = 0.0
    """Of the mixture that follows other records in one conversation."""
    distilled: Literal["answers", "mixture"] = "mixture"
    """What the student learns: the data of the second fine-tuning, as in the paper, or R1's right
    answers to new problems."""
    pretraining: pretrain.Recipe
    """Of the base."""
    zero: grpo.Recipe
    """R1-Zero."""
    cold_start: sft.Recipe
    """From `data`, or from solutions that the task writes."""
    rl_1: grpo.Recipe
    """First stage of reinforcement learning."""
    rejection: reject.Recipe
    """Sampling and filtering."""
    fine_tuning: sft.Recipe
    """On the mixture."""
    rl_2: grpo.Recipe
    """Second stage of reinforcement learning."""
    student_base: pretrain.Recipe
    """Pretraining of the student."""
    distillation: distill.Recipe
    """Into the student."""
    student_rl: grpo.Recipe
    """Of the student as it was."""
    evaluated: tuple[str, ...] = ()
    """Tasks whose held-out problems every model answers: the first in every way, further ones at
    temperature 0.6; by default `task`. More may be added on resuming."""
    problems: int = 500
    """Held-out problems that every model answers; so many of each task."""
    samples: int = 1
    """Answers of each, but for greedy ones."""
    max_tokens: int = 552
    """Longest answer that is evaluated."""
    slots: int = 128
    """Answers that are written together in evaluations."""
    seed: int = 0
    """Of everything; each stage draws its own from it."""


def _open(settings: Any, **changes: Any) -> Any:
    """Settings of a stage without those that the pipeline sets."""
    for name in ("model", "teacher", "student", "task", "data"):
        if hasattr(settings, name):
            changes = {name: "", **changes}
    return dataclasses.replace(settings, **changes)


_RL = _open(
    grpo.PRESETS["nano"], steps=20, prompts=16, answers=8, max_tokens=256, prompt_tokens=24,
    scale="none", objective=Objective(clip_high=0.28, norm="token"), rate=2e-4, beta2=0.99,
    decay=0.5, format=0.2, slots=128, held_out=100, evaluate_every=0, packed=True,
)  # fmt: skip
_RL_MORE = dataclasses.replace(_RL, language=0.2, steps=12, max_tokens=552, rate=5e-5)
_SFT = _open(  # a long search behind a conversation may be longer than a row
    sft.PRESETS["nano"], samples=24000, epochs=1, length=576, overlong="drop", rate=2e-3,
    held_out=0, sample_every=200,
)  # fmt: skip
_ZERO = _open(grpo.PRESETS["r1_zero"])
_SMALL: dict[str, Any] = {
    "prompts": 64, "accumulate": 8, "packed": False, "rate": 5e-5, "slots": 512, "held_out": 500,
}  # fmt: skip
_SFT_SMALL = dataclasses.replace(
    _SFT, samples=60000, epochs=2, rows=64, rate=3e-4, compute="bfloat16"
)
PRESETS = {
    "nano": Recipe(
        evaluated=("countdown", "countdown-4", "countdown-unsolvable"), turns=0.2,
        pretraining=pretrain.PRESETS["r1_nano"],
        zero_task="countdown", zero=dataclasses.replace(_RL, steps=120),
        cold_start=_SFT,
        rl_1=_RL_MORE,
        rejection=_open(
            reject.PRESETS["nano"], prompts=20000, answers=1, max_tokens=552, per_problem=1,
            form=True, repeated=0.0, at_once=1024, slots=128,
        ),
        fine_tuning=dataclasses.replace(_SFT, epochs=2, mtp=0.1),
        rl_2=_RL_MORE,
        student_base=pretrain.PRESETS["student_nano"],
        distillation=_open(
            distill.PRESETS["nano"], problems=5000, max_tokens=552, epochs=2, length=576,
            overlong="drop", rate=2e-3, slots=128, held_out=0, sample_every=200,
        ),
        student_rl=_RL,
    ),
    "small": Recipe(
        evaluated=("countdown", "countdown-4", "countdown-unsolvable"), turns=0.2,
        pretraining=pretrain.PRESETS["r1_small"],
        zero=dataclasses.replace(_RL, steps=80, **_SMALL),
        cold_start=_SFT_SMALL,
        rl_1=dataclasses.replace(_RL_MORE, steps=40, **_SMALL),
        rejection=_open(
            reject.PRESETS["nano"], prompts=40000, answers=2, max_tokens=552, per_problem=1,
            form=True, repeated=0.0, at_once=512, slots=512,
        ),
        fine_tuning=dataclasses.replace(_SFT_SMALL, mtp=0.1),
        rl_2=dataclasses.replace(_RL_MORE, steps=40, **_SMALL),
        student_base=pretrain.PRESETS["student_small"],
        distillation=_open(
            distill.PRESETS["nano"], epochs=3, length=576, overlong="drop", rows=64, rate=1e-3,
            slots=512, max_tokens=552, held_out=0, compute="bfloat16",
        ),
        student_rl=dataclasses.replace(_RL, steps=80, **_SMALL), slots=512,
    ),
    "paper": Recipe(
        base="deepseek-v3-base", student="Qwen2.5-32B", task="jsonl", data="problems.jsonl",
        general="general.jsonl", samples=4, max_tokens=32768, slots=512,
        pretraining=pretrain.PRESETS["v3"],
        zero=_ZERO,
        cold_start=dataclasses.replace(sft.PRESETS["r1_cold_start"], model="", data="cold.jsonl"),
        rl_1=_open(grpo.PRESETS["r1_stage1"]),
        rejection=_open(reject.PRESETS["r1_600k"]),
        fine_tuning=_open(sft.PRESETS["r1_sft"]),
        rl_2=_open(grpo.PRESETS["r1_stage2"]),
        student_base=pretrain.PRESETS["v3"],
        distillation=_open(distill.PRESETS["r1_qwen_32b"]),
        student_rl=dataclasses.replace(_ZERO, rate=2e-6),
    ),
}  # fmt: skip


def train(recipe: Recipe, out: Path, options: Options | None = None) -> Found:
    """Runs the stages that are not finished; returns what `accuracies` does.

    Called again for the same directory, it goes on where it was ended.

    Raises:
        RequestError: settings contradict each other, or differ from those it was begun with; or a
            stage cannot go on, such as when nothing is left after rejection sampling.
    """
    processes.only_one("r1")
    out = Path(out).expanduser().resolve()
    stages = plan(recipe, out)
    names = [stage.name for stage in stages]
    if recipe.until not in names:
        raise RequestError(f"--until {recipe.until}: expected one of {', '.join(names)}")
    begun = Run(out, recipe, options, models=given(recipe), open=still_open(stages))
    with begun as run, ended_by_sigterm():
        times = Clock(out / TIMES)
        stages = stages[: names.index(recipe.until) + 1]
        for stage in stages:
            if stage.train is not None and not stage.finished:
                run.say(f"{stage.path.name}: {stage.title}")
                if not stage.path.exists():  # what was measured is of a model that was removed
                    checkpoint.remove(out / EVALUATION / stage.name)
                with times.part(stage.name):
                    stage.train(stage.settings, stage.path, _options(stage, run.options))
            for task, how in measured(recipe) if stage.model else ():
                path = evaluation(out, stage.name, task, how)
                if not (path / "report.md").exists():  # it is written last
                    with times.part(EVALUATION):
                        judge(recipe, stage, task, how, path, run.options)
            _write(run, recipe, stages)
        found = accuracies(out, recipe, stages)
        for stage in stages:
            if stage.model:
                run.say(f"{stage.title}: {found[stage.name][measured(recipe)[0][0], '0.6']}")
        run.say(f"the report: {out / 'report.html'}")
    return found


def given(recipe: Recipe) -> dict[str, Any]:
    """Parameters of the models that the pipeline does not make itself, by their setting."""
    names = {"base": recipe.base, "student": recipe.student}
    return {setting: zoo.load(name).params for setting, name in names.items() if name}


def plan(recipe: Recipe, out: Path) -> list[Stage]:
    """All stages with all their settings; nothing is read or run.

    Raises:
        RequestError: settings that contradict each other, or that the pipeline sets itself.
    """
    _check(recipe)
    stages: list[Stage] = []

    def filled(field: str, **given: str) -> Any:
        """The settings of a stage with what the pipeline sets."""
        return _filled(recipe, field, given | {"seed": recipe.seed + len(stages)})

    def add(name: str, title: str, train: Callable | None, settings: Any, made="model") -> str:
        path = out / f"{len(stages):02d}-{name}"
        product = settings if train is None else str(path / made)
        model = product if made == "model" else None
        stages.append(Stage(name, title, path, train, settings, model))
        return product

    problems = {"task": recipe.task, "data": recipe.data}
    written = {"task": "" if recipe.task == "jsonl" else recipe.task}
    if recipe.base:
        base = add("base", "Base", None, recipe.base)
    else:
        base = add("base", "Base", pretrain.train, filled("pretraining"))
    own = recipe.zero_task or recipe.task
    data = recipe.data if own == recipe.task else ""
    settings = filled("zero", model=base, task=own, data=data)
    add("zero", "R1-Zero: RL alone", grpo.train, settings)
    settings = filled("cold_start", model=base, **({} if recipe.cold_start.data else written))
    model = add("cold-start", "Dev1: base, cold start", sft.train, settings)
    settings = filled("rl_1", model=model, **problems)
    model = add("rl-1", "Dev2: Dev1 and RL", grpo.train, settings)
    settings = filled("rejection", model=model, **problems)
    kept = add("rejection", "What Dev2 answers right", reject.train, settings, "data.jsonl")
    seed = recipe.seed + len(stages)
    settings = Mixture(
        accepted=kept, general=recipe.general, share=recipe.share, turns=recipe.turns, seed=seed
    )  # fmt: skip
    mixed = add("mixture", "General data beside it", mix, settings, "data.jsonl")
    settings = filled("fine_tuning", model=base, data=mixed, **written)
    model = add("fine-tuning", "Dev3: base, fine-tuned", sft.train, settings)
    settings = filled("rl_2", model=model, **problems)
    model = add("rl-2", "R1: Dev3 and RL", grpo.train, settings)
    if recipe.student:
        student = add("student-base", "Student", None, recipe.student)
    else:
        student = add("student-base", "Student", pretrain.train, filled("student_base"))
    source = {"data": mixed} if recipe.distilled == "mixture" else written
    settings = filled("distillation", teacher=model, student=student, **source)
    add("distillation", "Student, distilled", distill.train, settings)
    settings = filled("student_rl", model=student, **problems)
    add("student-rl", "Student, RL alone", grpo.train, settings)
    return stages


# Fields of the recipe that a stage is the first to depend on, where it is not its name alone.
_FIELDS = {
    "base": ("base", "pretraining"), "zero": ("zero", "zero_task"),
    "mixture": ("general", "share", "turns"),
    "student-base": ("student", "student_base"), "distillation": ("distillation", "distilled"),
}  # fmt: skip


def still_open(stages: Sequence[Stage]) -> set[str]:
    """Settings of the stages behind the last one that has a directory: they may still change."""
    begun = max((i for i, stage in enumerate(stages) if stage.path.exists()), default=-1)
    names = [stage.name for stage in stages[begun + 1 :]]
    return {field for n in names for field in _FIELDS.get(n, (n.replace("-", "_"),))} | {
        "evaluated"
    }


def _check(recipe: Recipe) -> None:
    for name in ("task", "zero_task"):  # known now, not when its first stage comes
        if (asked := getattr(recipe, name)) and asked not in tasks.NAMES:
            flag = f"--{name.replace('_', '-')}"
            raise RequestError(f"{flag} {asked}: expected one of {', '.join(tasks.NAMES)}")
    students = recipe.until in ("distillation", "student-rl")
    if recipe.task == "jsonl" and recipe.distilled == "answers" and students:
        raise RequestError("with task jsonl the student learns the mixture: --distilled mixture")
    if recipe.task == "jsonl" and not recipe.cold_start.data:
        raise RequestError(
            "task jsonl has no written solutions to start from; give --cold-start.data"
        )
    if not 0 <= recipe.share < 1:
        raise RequestError(f"--share is {recipe.share}; expected from 0 to below 1")
    if not 0 <= recipe.turns <= 1:
        raise RequestError(f"--turns is {recipe.turns}; expected from 0 to 1")


def _filled(recipe: Recipe, field: str, given: dict[str, Any]) -> Any:
    settings = getattr(recipe, field)
    for name in given:
        if getattr(settings, name):
            flag = f"--{field.replace('_', '-')}.{name}"
            raise RequestError(f"{flag}: the pipeline sets it; leave it out")
    return dataclasses.replace(settings, **given)


def _options(stage: Stage, options: Options) -> Options:
    if stage.train is grpo.train:  # there are few steps, and the report draws each
        return dataclasses.replace(options, log_every=1)
    if stage.model is None:  # nothing that a mesh divides
        return dataclasses.replace(options, mesh="")
    return options


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Between the runs of the stages, which end themselves in order, it ends the pipeline."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def judge(recipe: Recipe, stage: Stage, task: str, how: str, out: Path, options: Options) -> None:
    """Has the stage's model answer the held-out problems."""
    asked_as = {"base": recipe.zero, "student-base": recipe.student_rl}.get(stage.name)
    temperature, top_p = SAMPLING[how]
    settings = evaluate.Recipe(
        model=str(stage.model), task=task, data=recipe.data if task == recipe.task else "",
        template=getattr(asked_as or stage.settings, "template", ""), problems=recipe.problems,
        samples=recipe.samples if temperature else 1, passes=(1,), majorities=(),
        max_tokens=recipe.max_tokens, temperature=temperature, top_p=top_p, slots=recipe.slots,
        at_once=4 * recipe.slots, seed=recipe.seed,
    )  # fmt: skip
    evaluate.train(settings, out, dataclasses.replace(options, mesh="", quiet=True))


def _write(run: Run, recipe: Recipe, stages: Sequence[Stage]) -> None:
    blocks = list(told(run.out, recipe, stages, PRESETS))
    texts = {b.file: b.svg for b in blocks if isinstance(b, Picture)}
    texts |= {"report.md": markdown(blocks), "report.html": page("R1", blocks)}
    for name, text in texts.items():
        run.product(name, lambda path, text=text: path.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main(train, PRESETS, __doc__)
