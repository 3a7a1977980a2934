"""R1's pipeline: what its stages are, what it refuses, and that it can be killed in any of them."""

import dataclasses
import json
import os
import shlex
import shutil
import signal
from pathlib import Path

import jax
import pytest
import resumable
from resumable import Resumable

from deepzoo import zoo
from deepzoo.recipes import grpo, r1, sft
from deepzoo.recipes.parts import main as line
from deepzoo.recipes.parts import tasks
from deepzoo.recipes.parts.accuracy import wilson
from deepzoo.recipes.parts.log import read_metrics
from deepzoo.recipes.parts.mixture import Mixture
from deepzoo.recipes.parts.r1_report import command, evaluation
from deepzoo.recipes.parts.run import Options, Run
from deepzoo.recipes.r1 import PRESETS, plan
from deepzoo.zoo.config import Config
from deepzoo.zoo.errors import RequestError
from deepzoo.zoo.types import Model

NAMES = (
    "00-base 01-zero 02-cold-start 03-rl-1 04-rejection 05-mixture 06-fine-tuning 07-rl-2"
    " 08-student-base 09-distillation 10-student-rl"
).split()


@pytest.mark.parametrize("name", PRESETS)
def test_the_stages_in_their_order(name):
    recipe = PRESETS[name]
    stages = {s.path.name: s for s in plan(recipe, Path("out"))}
    assert list(stages) == NAMES
    base = recipe.base or "out/00-base/model"
    starts = {s: getattr(stages[s].settings, "model", None) for s in NAMES}
    assert starts["01-zero"] == starts["02-cold-start"] == starts["06-fine-tuning"] == base
    assert starts["03-rl-1"] == "out/02-cold-start/model"
    assert starts["04-rejection"] == "out/03-rl-1/model"
    assert starts["07-rl-2"] == "out/06-fine-tuning/model"
    assert stages["05-mixture"].settings.accepted == "out/04-rejection/data.jsonl"
    assert stages["06-fine-tuning"].settings.data == "out/05-mixture/data.jsonl"
    student = recipe.student or "out/08-student-base/model"
    assert starts["10-student-rl"] == stages["09-distillation"].settings.student == student
    assert stages["09-distillation"].settings.teacher == "out/07-rl-2/model"
    seeds = [s.settings.seed for s in stages.values() if s.train is not None]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(
    ("own", "task", "data"),
    [("", "jsonl", "f.jsonl"), ("jsonl", "jsonl", "f.jsonl"), ("countdown", "countdown", "")],
)
def test_r1_zero_may_have_problems_of_its_own(own, task, data):
    recipe = dataclasses.replace(PRESETS["nano"], task="jsonl", data="f.jsonl", zero_task=own)
    recipe = dataclasses.replace(
        recipe, cold_start=dataclasses.replace(recipe.cold_start, data="c")
    )
    stages = {s.name: s.settings for s in plan(recipe, Path("out"))}
    assert (stages["zero"].task, stages["zero"].data) == (task, data)
    assert (stages["rl-1"].task, stages["rl-1"].data) == ("jsonl", "f.jsonl")


@pytest.mark.parametrize("setting", ["task", "zero_task"])
def test_a_task_that_does_not_exist_is_refused_before_anything_runs(setting):
    recipe = dataclasses.replace(PRESETS["nano"], **{setting: "nonsense"})
    flag = setting.replace("_", "-")
    with pytest.raises(RequestError, match=f"--{flag} nonsense: expected one of arithmetic, "):
        plan(recipe, Path("out"))


def test_the_paper_has_the_papers_settings():
    stages = {s.name: s.settings for s in plan(PRESETS["paper"], Path("out"))}
    blank = {"model": "", "data": "", "seed": 0}
    for name, preset in (("zero", "r1_zero"), ("rl-1", "r1_stage1"), ("rl-2", "r1_stage2")):
        given = grpo.PRESETS[preset]
        assert dataclasses.replace(stages[name], **blank) == dataclasses.replace(given, **blank)
    for name, preset in (("cold-start", "r1_cold_start"), ("fine-tuning", "r1_sft")):
        given = sft.PRESETS[preset]
        assert dataclasses.replace(stages[name], **blank) == dataclasses.replace(given, **blank)
    assert stages["distillation"].data == "out/05-mixture/data.jsonl"
    assert stages["student-rl"].rate == 2e-6


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--zero.model x", "--zero.model: the pipeline sets it"),
        ("--rl-1.task arithmetic", "--rl-1.task: the pipeline sets it"),
        ("--pretraining.seed 3", "--pretraining.seed: the pipeline sets it"),
        ("--until rl-3", "--until rl-3: expected one of base, zero, cold-start, "),
        ("--share 1", "--share is 1.0; expected from 0 to below 1"),
        ("--turns 2", "--turns is 2.0; expected from 0 to 1"),
        ("--task jsonl --data x --distilled answers", "the student learns the mixture"),
        ("--task jsonl --data x --until rl-2", "give --cold-start.data"),
    ],
)
def test_what_is_refused_before_anything_is_written(flags, told, tmp_path):
    recipe, _, _ = line.parse(PRESETS, "", ["--out", "x", *flags.split()], "x")
    with pytest.raises(RequestError, match=told):
        r1.train(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--base v2-nano --until rl-2 --zero.steps 3 --evaluated --share 0.5",
        "--preset paper --zero.objective.beta 0.1 --rejection.code --rl-1.replay --seed 4",
        "--zero.scale batch_std --rejection.no-code --distilled answers"
        " --cold-start.lora-targets attention dense_mlp",
    ],
)
def test_the_report_tells_the_command(flags):
    recipe, _, _ = line.parse(PRESETS, "", ["--out", "x", *flags.split()], "x")
    words = shlex.split(command(recipe, PRESETS))
    assert words[:3] == ["deepzoo", "train", "r1"]
    assert line.parse(PRESETS, "", words[3:], "x")[0] == recipe


def test_sigterm_behind_the_last_step_of_a_stage_ends_the_pipeline(tmp_path):
    """While a stage's run is open, it decides when to stop; then nothing must begin."""
    settings = Mixture(accepted="", general="", share=0.0)

    def write(path):
        os.kill(os.getpid(), signal.SIGTERM)
        path.write_text("whole")

    def pipeline():
        with r1.ended_by_sigterm():
            with Run(tmp_path / "stage", settings, Options(quiet=True)) as run:
                run.product("model", write)
            pytest.fail("went on")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        pipeline()
    assert end.value.code == 0
    assert (tmp_path / "stage" / "model").read_text() == "whole"
    assert signal.getsignal(signal.SIGTERM) is before


PROMPTS = [f"{n} + 1 =" for n in range(200)]


def make(folder):
    """Problems whose answer is 7; texts that say so three times in four, and 8 else."""
    written = {
        "problems": ("answer", lambda i: "7"),
        "cold": ("completion", lambda i: "7"),
        "texts": ("completion", lambda i: "7" if i % 4 else "8"),
    }
    for name, (field, said) in written.items():
        lines = (json.dumps({"prompt": p, field: said(i)}) for i, p in enumerate(PROMPTS))
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    (folder / "tokenizer").mkdir()
    for name, data in tasks.tokenizer_files().items():
        (folder / "tokenizer" / name).write_bytes(data)


def small(folder, nano=PRESETS["nano"]):
    """A pipeline of a few seconds, from nothing: base with experts and MTP, dense student."""

    def pretraining(stage, **sizes):
        tiny = dataclasses.replace(
            stage.config, vocab_size=1007, hidden_size=16, intermediate_size=16,
            num_attention_heads=2, max_position_embeddings=64, **sizes,
        )  # fmt: skip
        return dataclasses.replace(
            stage, config=tiny, data=str(folder / "texts.jsonl"),
            tokenizer=str(folder / "tokenizer"), steps=10, rows=8, length=32, adam_rate=0.1,
            problems=0, sample_every=0,
        )  # fmt: skip

    rl = dataclasses.replace(
        nano.zero, steps=2, prompts=2, answers=4, max_tokens=3, prompt_tokens=8, held_out=2,
        slots=8, least=0.0,
    )  # fmt: skip
    few = dataclasses.replace(
        nano.cold_start, data=str(folder / "cold.jsonl"), samples=0, epochs=1, rows=50, length=16,
        rate=0.05,
    )  # fmt: skip
    rejection = dataclasses.replace(
        nano.rejection, prompts=4, answers=4, at_once=2, max_tokens=3, slots=8, form=False
    )
    distillation = dataclasses.replace(
        nano.distillation, problems=0, max_tokens=3, rows=2, length=16, slots=8, rate=0.1
    )
    return dataclasses.replace(
        nano, task="jsonl", data=str(folder / "problems.jsonl"),
        general=str(folder / "cold.jsonl"), problems=12, max_tokens=3, slots=8, evaluated=(),
        pretraining=pretraining(
            nano.pretraining, num_hidden_layers=2, num_key_value_heads=2, q_lora_rank=8,
            kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
            moe_intermediate_size=16, n_routed_experts=4,
        ),
        zero_task="", zero=rl, cold_start=few, rl_1=rl, rejection=rejection,
        fine_tuning=dataclasses.replace(few, data="", mtp=0.1), rl_2=rl,
        student_base=pretraining(
            nano.student_base, num_hidden_layers=1, num_key_value_heads=1
        ),
        distillation=distillation, student_rl=rl,
    )  # fmt: skip


def child(folder):
    """The same in another process, to be killed."""
    source = f"""
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    import test_r1
    r1 = copied("r1")
    recipe, train = test_r1.small(Path({str(folder)!r}), r1.PRESETS["nano"]), r1.train
    """
    return Resumable(source=source, save_every=1, pace=0.0)


def runs(out):
    """Directories of stages and evaluations that took steps."""
    return sorted(p.parent.relative_to(out) for p in out.rglob("metrics.jsonl"))


def test_settings_of_stages_that_have_not_begun_may_change(tmp_path):
    nano, out = PRESETS["nano"], tmp_path / "out"
    fields = {f.name for f in dataclasses.fields(r1.Recipe)}
    shared = {"task", "data", "problems", "samples", "max_tokens", "slots", "seed", "until"}
    assert r1.still_open(plan(nano, out)) == fields - shared
    for name in NAMES[:9]:
        (out / name).mkdir(parents=True)
    assert r1.still_open(plan(nano, out)) == {
        "distillation", "distilled", "student_rl", "evaluated"
    }  # fmt: skip
    (out / "04-rejection").rmdir()  # a later stage is there
    assert "rejection" not in r1.still_open(plan(nano, out))


def test_what_changed_is_what_must_be_the_same_from_then_on(tmp_path):
    one, two, three = (Mixture(accepted="", general=g, share=0.0) for g in ("a", "b", "c"))
    for settings, free in ((one, ()), (two, ("general",)), (two, ())):
        with Run(tmp_path / "run", settings, Options(quiet=True), open=free):
            pass
    with pytest.raises(RequestError, match="general: 'b' -> 'c'"):
        Run(tmp_path / "run", three, open=("share",)).__enter__()


def test_other_weights_of_a_model_that_was_given_are_refused(tmp_path):
    config = Config(
        model_type="qwen2", vocab_size=11, hidden_size=16, intermediate_size=16,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64, dtype="float32",
    )  # fmt: skip
    given = tmp_path / "given"
    recipe = dataclasses.replace(PRESETS["nano"], base=str(given), student=str(given))
    for seed in (0, 1):
        zoo.save_hf(Model(config, zoo.init(config, jax.random.key(seed))), given)
        if not seed:
            with Run(tmp_path / "run", recipe, Options(quiet=True), models=r1.given(recipe)):
                (tmp_path / "run" / "01-zero").mkdir()  # from now on, the base counts
            shutil.rmtree(given)
    with pytest.raises(RequestError, match=f"--base {given} holds other weights than") as told:
        r1.train(recipe, tmp_path / "run", Options(quiet=True))
    assert "--student" not in str(told.value)
    assert [p.name for p in (tmp_path / "run").iterdir() if p.is_dir()] == ["01-zero"]


def test_the_student_may_learn_the_answers_of_r1_instead_of_the_mixture(tmp_path):
    """That stage alone; in the place of R1 stands a model that is mostly right."""
    config = small(tmp_path).student_base.config
    student = Model(config, zoo.init(config, jax.random.key(0)), zoo.load("v2-nano").tokenizer)
    zoo.save_hf(student, tmp_path / "student")
    nano = PRESETS["nano"]
    recipe = dataclasses.replace(
        nano, task="arithmetic", base="v2-nano", student=str(tmp_path / "student"),
        distilled="answers",
        distillation=dataclasses.replace(
            nano.distillation, problems=6, answers=2, max_tokens=48, rows=2, length=64, slots=8
        ),
    )  # fmt: skip
    stages = {stage.name: stage for stage in plan(recipe, tmp_path)}
    r1_itself = Path(stages["rl-2"].model)
    r1_itself.parent.mkdir()
    r1_itself.symlink_to(Path(zoo.__file__).parent / "pretrained" / "v2-nano")
    stage = stages["distillation"]
    assert not stage.finished
    stage.train(stage.settings, stage.path, Options(quiet=True, tensorboard=False, log_every=1))
    assert stage.finished
    kept = [json.loads(x) for x in (stage.path / "traces/traces.jsonl").read_text().splitlines()]
    assert 2 <= len(kept) <= 12
    assert all(tasks.is_right(r["prompt"].removesuffix(" ="), r["completion"]) for r in kept)
    losses = [row["nll"] for row in read_metrics(stage.path / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    assert zoo.load(stage.path / "model").config.model_type == "qwen2"


@pytest.mark.slow
def test_it_can_be_killed_in_any_stage_and_skips_those_that_are_finished(tmp_path):
    """All eleven stages, from no model at all."""
    make(tmp_path)
    process = child(tmp_path)
    out, whole = tmp_path / "run", tmp_path / "whole"
    process.run(out)
    out.rename(whole)  # paths are settings: both runs have the same
    draw = resumable.random_instants()
    process.run(out, status=-9, point="half", save=15)
    assert resumable.newest(out / "01-zero") == 1
    assert not (out / "02-cold-start").exists()
    changed = "dataclasses.replace(recipe, zero=dataclasses.replace(recipe.zero, steps=3))"
    greedy = evaluation(out, "base", "jsonl", "greedy") / "metrics.jsonl"
    finished = greedy.stat().st_mtime_ns
    told = process.run(out, status=-9, point="visible", save=39, changed=changed)
    assert "begun with other settings (zero.steps: 2 -> 3)" in told
    assert resumable.newest(out / "09-distillation") == 1
    assert not (out / "10-student-rl").exists()
    _, told = resumable.kill(process, out, draw, share=0.2)
    told += process.run(out)
    assert "09-distillation" in told
    assert "08-student-base" not in told
    assert greedy.stat().st_mtime_ns == finished
    assert sorted(p.name for p in out.glob("[0-9]*")) == NAMES
    assert runs(out) == runs(whole)
    made_steps = [n for n in NAMES if n != "05-mixture"]
    assert [str(run) for run in runs(out) if run.parts[0] != "evaluation"] == made_steps
    assert len(runs(out)) == len(made_steps) + 3 * 9  # all but rejection are models
    for run in runs(out):
        resumable.compare(whole / run, out / run)
    mixed = Path("05-mixture") / "data.jsonl"
    assert (out / mixed).read_bytes() == (whole / mixed).read_bytes()
    same, other = ((p / "report.md").read_text().split("## Time")[0] for p in (out, whole))
    assert same == other
    check_report(out, same)


def check_report(out, text):
    """It says what the evaluations found, in numbers that were counted here."""
    for stage, how, name in (
        ("base", "greedy", "Base"),
        ("fine-tuning", "0.6", "Dev3: base, fine-tuned"),
        ("distillation", "1.0", "Student, distilled"),
        ("student-rl", "greedy", "Student, RL alone"),
    ):
        files = (evaluation(out, stage, "jsonl", how) / "answers").glob("*.jsonl")
        made = [json.loads(row) for f in files for row in f.read_text().splitlines()]
        right = sum(a["finished"] and a["verdict"]["accuracy"] == 1.0 for a in made)
        low, high = wilson(right, 12)
        row = next(r for r in text.splitlines() if r.startswith(f"| {name} |"))
        assert f"| {right / 12:.1%} ({low:.1%} to {high:.1%}) |" in row
    times = json.loads((out / "times.json").read_text())["parts"]
    names = ("base", "zero", "rl-2", "student-base", "distillation")
    starts = {name: times[name]["starts"] for name in names}
    assert starts.pop("distillation") in (2, 3)  # it may be in there at the random instant, too
    assert starts == {"base": 1, "zero": 2, "rl-2": 1, "student-base": 1}
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 2
