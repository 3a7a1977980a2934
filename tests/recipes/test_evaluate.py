"""The recipe `evaluate` and the command: numbers from the answers that it keeps."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from resumable import Resumable, check

from deepzoo import zoo
from deepzoo.recipes import evaluate
from deepzoo.recipes.evaluate import PRESETS, chosen, perplexity, table
from deepzoo.recipes.parts import answers, tasks
from deepzoo.recipes.parts.documents import encoded
from deepzoo.recipes.parts.problems import task
from deepzoo.recipes.parts.records import read
from deepzoo.recipes.parts.run import Options
from deepzoo.zoo import cli
from deepzoo.zoo.errors import RequestError

CASE = Resumable(
    source="""
    evaluate = copied("evaluate")
    recipe = dataclasses.replace(
        evaluate.PRESETS["nano"], problems=6, at_once=1, samples=3, passes=(1, 3), majorities=(3,),
        max_tokens=24, slots=3,
    )
    train = evaluate.train
    """,
    changed="dataclasses.replace(recipe, top_p=0.5)",
    told="top_p: ",
)


def test_it_can_be_ended_and_gone_on_with(tmp_path):
    out = check(CASE, tmp_path)
    report = json.loads((out / "report.json").read_text())
    made = list(answers.made(out))
    assert len(made) == 18
    right = [
        a.finished and tasks.is_right(a.prompt.removesuffix(" ="), a.text) for a in made
    ]  # judged here once more
    assert report["pass@1"]["value"] == pytest.approx(np.mean(right))
    assert report["pass@3"]["value"] == pytest.approx(np.reshape(right, (6, 3)).any(axis=1).mean())
    assert report["truncated"] == pytest.approx(np.mean([not a.finished for a in made]))
    assert all(tasks.held_out(a.prompt.removesuffix(" =")) for a in made)
    lines = (out / "report.md").read_text()
    assert f"| pass@1 | {report['pass@1']['value']:.1%} |" in lines


def test_what_cannot_be_measured_is_told(tmp_path):
    nano = PRESETS["nano"]
    for changes, told in [
        ({"task": "", "text": ""}, "nothing to measure"),
        ({"passes": (8,)}, "needs 8 answers of each problem; --samples is 4"),
        ({"problems": 0}, "--problems must be at least 1"),
        ({"split": "all"}, "has no end"),
    ]:
        with pytest.raises(RequestError, match=told):
            evaluate.train(dataclasses.replace(nano, **changes), tmp_path / "run")
        assert not (tmp_path / "run" / "report.json").exists()


def test_all_problems_of_a_file_are_asked(tmp_path):
    path = tmp_path / "problems.jsonl"
    rows = [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in (3, 1, 2, 3)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = dataclasses.replace(PRESETS["aime_like"], data=str(path))
    found = chosen(recipe, task("jsonl", str(path)))
    assert [p.prompt for p in found] == ["3 + 1 =", "1 + 1 =", "2 + 1 ="]
    assert len(chosen(dataclasses.replace(recipe, problems=2), task("jsonl", str(path)))) == 2


def test_perplexity_is_that_of_every_token_but_the_first(tmp_path):
    model = zoo.load("v2-nano", dtype="float32", mtp=False)
    texts = ["47 + 3 = 50", "12 - 2 = 10", "1 + 1 = 2"]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    total, count = 0.0, 0
    for text in texts:
        ids = [*model.tokenizer.encode_prompt(text), model.tokenizer.eos_ids[0]]
        logits = zoo.apply(model.config, model.params, np.array([ids])).logits
        logp = np.asarray(jax.nn.log_softmax(logits[0]), np.float64)
        total -= sum(logp[t, ids[t + 1]] for t in range(len(ids) - 1))
        count += len(ids) - 1
    found = perplexity(model, encoded(model, read(str(path))), 16)
    assert found["tokens"] == count
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    recipe = dataclasses.replace(
        PRESETS["nano"], task="", text=str(path), length=16, dtype="bfloat16"
    )
    report = evaluate.train(recipe, tmp_path / "run", Options(quiet=True))
    assert report["perplexity"] == pytest.approx(found["perplexity"], rel=0.05)
    assert abs(report["nll"] - found["nll"]) > 1e-5  # it was computed in bfloat16
    # Cut into windows of four, each first token has nothing before it and is not counted.
    short = perplexity(model, encoded(model, read(str(path))), 4)
    assert short["tokens"] == sum(
        n - -(-n // 4) for n in (len(model.tokenizer.encode_prompt(t)) + 1 for t in texts)
    )


def test_the_command_prints_a_table_and_leaves_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    args = "--problems 3 --samples 2 --passes 1 2 --majorities 2 --max-tokens 24 --slots 6".split()
    assert cli.main(["evaluate", "v2-nano", *args]) == 0
    out = capsys.readouterr().out
    assert out.startswith("| measure | value | 95% interval |")
    assert "| maj@2 |" in out
    assert not list(tmp_path.iterdir())


def test_mistakes_on_the_command_line(capsys):
    assert cli.main(["evaluate"]) == 2
    assert "MODEL is missing" in capsys.readouterr().err
    assert cli.main(["evaluate", "v2-nano", "--sample", "3"]) == 2
    assert "no option --sample, did you mean --samples?" in capsys.readouterr().err
    assert cli.main(["evaluate", "--help"]) == 0
    assert "deepzoo evaluate" in capsys.readouterr().out


def test_the_table_says_what_was_measured():
    report = {
        "pass@1": {"value": 0.5, "low": 0.25, "high": 0.75},
        "perplexity": 2.5,
        "tokens": 1000,
    }
    assert table(report).splitlines()[2:] == [
        "| pass@1 | 50.0% | 25.0% to 75.0% |",
        "| perplexity | 2.5 | |",
        "| tokens of text | 1,000 | |",
    ]
