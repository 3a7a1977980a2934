"""Rejection sampling: what is kept, why the rest is not, and that a run can be ended anywhere."""

import collections
import dataclasses
import json

import pytest
from resumable import Resumable, check

from deepzoo.recipes import reject
from deepzoo.recipes.parts import answers, tasks
from deepzoo.recipes.parts.answers import Answer
from deepzoo.recipes.parts.problems import task
from deepzoo.recipes.parts.records import read
from deepzoo.recipes.reject import PRESETS, fault, filtered
from deepzoo.zoo.errors import RequestError

CASE = Resumable(
    source="""
    reject = copied("reject")
    recipe = dataclasses.replace(
        reject.PRESETS["nano"], task="arithmetic", prompts=6, at_once=1, answers=3, max_tokens=24,
        slots=3,
    )
    train = reject.train
    """,
    changed="dataclasses.replace(recipe, temperature=0.5)",
    told="temperature: ",
)


def test_it_can_be_ended_and_gone_on_with(tmp_path):
    out = check(CASE, tmp_path)
    records = read(out / "data.jsonl")
    report = json.loads((out / "report.json").read_text())
    assert report["answers"] == 18
    assert report["kept"] == len(records) > 0
    assert report["kept"] + sum(report["left_out"].values()) == 18
    everything = list(answers.made(out))
    assert [a.problem for a in everything] == [i for i in range(6) for _ in range(3)]
    for i in range(len(records)):
        problem = records.field(i, "prompt").removesuffix(" =")
        assert tasks.is_right(problem, records.field(i, "completion"))
        assert not tasks.held_out(problem)
    problems = {a.prompt for a in everything}
    assert report["problems_without"] == len(problems - {r["prompt"] for r in records})


def answer(text="<think>so</think><answer>2</answer>", **changes):
    verdict = {"accuracy": 1.0, "format": 1.0, "language": 1.0} | changes.pop("verdict", {})
    return Answer(0, "1 + 1?", text, verdict, True, 12)._replace(**changes)


STRICT = dataclasses.replace(
    PRESETS["nano"], form=True, language=0.9, sound=0.9, repeated=0.2, paragraph=100, code=False,
    shortest=5, longest=50,
)  # fmt: skip


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (answer(), ""),
        (answer(verdict={"accuracy": None}), "without verdict"),
        (answer(finished=False), "cut off"),
        (answer(verdict={"accuracy": 0.0}), "wrong"),
        (answer(verdict={"format": 0.0}), "another form"),
        (answer(verdict={"language": 0.8}), "other languages"),
        (answer(verdict={"sound": 0.8}), "wrong steps"),
        (answer(verdict={"sound": 1.0}), ""),
        (answer("the same line again\n" * 4), "repeated lines"),
        (answer("x" * 101), "a long paragraph"),
        (answer("x" * 80 + "\n\n" + "y" * 80), ""),
        (answer("<think>```python```</think>2"), "code in the thought"),
        (answer("<think>so</think>```python```"), ""),
        (answer(tokens=4), "too short"),
        (answer(tokens=51), "too long"),
    ],
)
def test_each_reason(made, reason):
    assert fault(STRICT, made) == reason
    lenient = dataclasses.replace(PRESETS["nano"], repeated=1.0)
    hard = ("without verdict", "cut off", "wrong")
    assert fault(lenient, made) == (reason if reason in hard else "")


def test_the_preset_of_the_paper_keeps_an_answer_of_r1(tmp_path):
    """A thought and a plain summary: what the released models write in a chat."""
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps({"prompt": "1 + 1?", "answer": "2"}) + "\n")
    recipe = dataclasses.replace(PRESETS["r1_600k"], data=str(path))
    found = task(recipe.task, recipe.data, language=recipe.target_language)
    (problem,) = found.everything

    def reason(text):
        judged = found.judge(problem, text, True)
        return fault(recipe, Answer(0, problem.prompt, text, dict(judged), True, 100))

    assert reason("<think>\nOne and one.\n</think>\n\nThe sum is \\boxed{2}.") == ""
    assert reason("The sum is \\boxed{2}.") == "another form"
    assert reason("<think>\nOne and one.\n</think>\n\nThe sum is \\boxed{3}.") == "wrong"


def test_repeats_and_surplus_are_left_out(monkeypatch, tmp_path):
    texts = ["a", "a", "b", "c", "d"]
    made = [answer(t) for t in texts] + [answer(t, problem=1) for t in texts]
    monkeypatch.setattr(answers, "made", lambda out: iter(made))
    recipe = dataclasses.replace(PRESETS["nano"], per_problem=2)
    found = [reason for _, reason in filtered(recipe, tmp_path)]
    again = ["kept", "the same again", "kept", *["enough of this problem"] * 2]
    assert found == again * 2
    everything = collections.Counter(
        reason for _, reason in filtered(dataclasses.replace(recipe, per_problem=0), tmp_path)
    )
    assert everything == {"kept": 8, "the same again": 2}


def test_nothing_left_is_told(tmp_path):
    recipe = dataclasses.replace(
        PRESETS["nano"], task="arithmetic", prompts=2, at_once=2, answers=1, max_tokens=24,
        shortest=1000,
    )  # fmt: skip
    with pytest.raises(RequestError, match="none of 2 answers is left"):
        reject.train(recipe, tmp_path / "run")
