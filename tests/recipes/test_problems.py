"""Tasks: problems are a pure function of the seed, held-out ones are apart, verdicts by rules."""

import itertools
import json
import math

import pytest

from deepzoo.recipes.parts import problems, sandbox
from deepzoo.recipes.parts.accuracy import held_out
from deepzoo.recipes.parts.problems import R1_ZERO, batch, task
from deepzoo.recipes.parts.records import DataError
from deepzoo.recipes.parts.sandbox import SandboxUnavailable
from deepzoo.zoo.errors import RequestError


@pytest.fixture
def records(tmp_path):
    """A file of records, from what each is."""

    def write(*rows):
        path = tmp_path / "problems.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def many(count=400):
    return [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(count)]


def some(found, *seed, count=50, **options):
    return list(itertools.islice(found.problems(*seed, **options), count))


def test_problems_of_records_are_a_pure_function_of_the_seed(records):
    found = task("jsonl", records(*many()))
    assert some(found, 1, 2) == some(found, 1, 2)
    assert some(found, 1, 2) != some(found, 1, 3)


def test_held_out_records_are_apart_and_few(records):
    found = task("jsonl", records(*many()))
    training = {p.prompt for p in some(found, 0, count=2000)}
    held = {p.prompt for p in some(found, 0, count=200, held=True)}
    assert not training & held
    assert len(training) + len(held) == 400
    assert 8 <= len(held) <= 36
    # The hash depends on the prompt alone: more records do not move the old ones.
    more = task("jsonl", records(*many(600)))
    assert held <= {p.prompt for p in some(more, 0, count=600, held=True)}


def test_each_record_comes_once_an_epoch(records):
    found = task("jsonl", records(*many()))
    count = len({p.prompt for p in some(found, 0, count=2000)})
    epoch = some(found, 5, count=count)
    assert len({p.prompt for p in epoch}) == count


def test_too_few_records_are_told(records):
    found = task("jsonl", records(*many(30)))
    with pytest.raises(RequestError, match="held-out problems; ask for no more"):
        held_out(found, 30)
    with pytest.raises(RequestError, match="ask for fewer prompts"):
        batch(found.problems, 31, 0)


def test_maths_form_and_language_are_judged(records):
    found = task("jsonl", records({"prompt": "1 + 1?", "answer": "2"}, *many()))
    problem = problems.Problem("1 + 1?", "2")
    right = "<think>one and one</think>2"
    assert found.judge(problem, right, True) == {"accuracy": 1, "format": 1, "language": 1}
    assert found.judge(problem, right, False) == {"accuracy": 0, "format": 0, "language": 1}
    assert found.judge(problem, "\\boxed{2}", True)["accuracy"] == 1
    assert found.judge(problem, "\\boxed{2}", True)["format"] == 0
    assert found.judge(problem, right.replace("2", "3"), True)["accuracy"] == 0
    assert found.judge(problem, "", True) == {"accuracy": 0, "format": 0, "language": 0}
    three = right.replace("2", "3")
    assert found.judge(problem, three, True) == {"accuracy": 0, "format": 1, "language": 1}
    chinese = problem._replace(language="zh")
    assert found.judge(chinese, right, True)["language"] == 0


def test_answer_tags_are_asked_of_those_whose_template_asks_for_them(records):
    """R1 answers in a chat with a plain summary behind its thought, R1-Zero between tags."""
    problem, path = problems.Problem("1 + 1?", "2"), records(*many())
    chat, zero = task("jsonl", path), task("jsonl", path, template=R1_ZERO)
    plain = task("jsonl", path, template="Question: {prompt}")
    summary = "<think>\none and one\n</think>\n\nThe sum is \\boxed{2}."
    tagged = "<think>one and one</think> <answer>2</answer>"
    forms = [
        [t.judge(problem, a, True)["format"] for a in (summary, tagged)]
        for t in (chat, plain, zero)
    ]
    assert forms == [[1, 1], [1, 1], [0, 1]]
    assert chat.judge(problem, summary, True)["accuracy"] == 1
    assert zero.judge(problem, "\\boxed{2}", True)["format"] == 0


def test_the_template_is_continued_as_it_is(records):
    path = records(*many())
    plain = some(task("jsonl", path), 0, count=1)[0]
    assert not plain.raw
    base = some(task("jsonl", path, template=R1_ZERO), 0, count=1)[0]
    assert base.raw
    assert base.prompt.endswith(". Assistant:")
    assert "{prompt}" not in base.prompt
    held = some(task("jsonl", path), 0, count=50, held=True)
    dressed = some(task("jsonl", path, template="<{prompt}>"), 0, count=50, held=True)
    assert [f"<{p.prompt}>" for p in held] == [p.prompt for p in dressed]
    with pytest.raises(RequestError, match=r"no \{prompt\}"):
        task("jsonl", path, template="User:")


ODD = {"prompt": "Add.", "tests": [["1 2", "3"], ["5 5", "10"]]}


def test_programs_are_run(records):
    try:
        sandbox.check()
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    found = task("jsonl", records(*many(), ODD))
    problem = problems.Problem("Add.", "", tests=(("1 2", "3"), ("5 5", "10")))
    right = "<think>easy</think>```python\nprint(sum(map(int, input().split())))\n```"
    assert found.judge(problem, right, True)["accuracy"] == 1
    assert found.judge(problem, right, False)["accuracy"] == 0
    assert found.judge(problem, right.replace("sum", "max"), True)["accuracy"] == 0
    assert found.judge(problem, "3", True)["accuracy"] == 0


def test_a_sandbox_that_fails_drops_the_answer(records, monkeypatch):
    def fails(*args):
        raise sandbox.SandboxFailure("no more processes")

    monkeypatch.setattr(sandbox, "check", lambda: None)
    monkeypatch.setattr(sandbox, "execute", fails)
    found = task("jsonl", records(ODD))
    verdict = found.judge(problems.Problem("", "", tests=(("", ""),)), "```\nx\n```", True)
    assert math.isnan(verdict["accuracy"])


def test_where_programs_cannot_be_isolated_nothing_starts(records, monkeypatch):
    def refuses():
        raise SandboxUnavailable("no namespaces")

    monkeypatch.setattr(sandbox, "check", refuses)
    with pytest.raises(SandboxUnavailable):
        task("jsonl", records(*many(), ODD))
    task("jsonl", records(*many()))


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"prompt": "a"}, "field 'answer' is missing"),
        ({"prompt": "a", "answer": 3}, "field 'answer' is no text"),
        ({"prompt": "a", "answer": ""}, "field 'answer' is empty"),
        ({"answer": "3"}, "field 'prompt' is missing"),
        ({"prompt": "a", "tests": []}, "tests must be a list"),
        ({"prompt": "a", "tests": [["1"]]}, "tests must be a list"),
        ({"prompt": "a", "tests": [["1", 2]]}, "tests must be a list"),
        ({"prompt": "a", "answer": "3", "language": "xx"}, "language is 'xx'"),
    ],
)
def test_bad_records_are_told_with_file_and_line(records, record, told):
    path = records(*many(3), record)
    with pytest.raises(DataError, match=told) as error:
        task("jsonl", path)
    assert f"{path}:4: " in str(error.value)


def test_tasks_and_data_that_do_not_go_together():
    with pytest.raises(RequestError, match="no task is called 'x'"):
        task("x")
    with pytest.raises(RequestError, match="needs --data"):
        task("jsonl")
    with pytest.raises(RequestError, match="makes its own problems"):
        task("arithmetic", "file.jsonl")
