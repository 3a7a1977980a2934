"""The data of R1's second fine-tuning: counts, order, and that no held-out problem is among it."""

import json

import numpy as np
import pytest

from deepzoo.recipes.parts import tasks
from deepzoo.recipes.parts.mixture import Mixture, mix
from deepzoo.recipes.parts.records import DataError, read
from deepzoo.recipes.parts.run import Options
from deepzoo.zoo.errors import RequestError

QUIET = Options(quiet=True)


def accepted(path, count=30):
    lines = [json.dumps({"prompt": f"q{i}", "completion": f"a{i}"}) + "\n" for i in range(count)]
    path.write_text("".join(lines))
    return str(path)


def test_a_task_gives_its_share(tmp_path):
    recipe = Mixture(accepted=accepted(tmp_path / "a.jsonl"), general="arithmetic", share=0.25)
    assert mix(recipe, tmp_path / "out", QUIET) == {"accepted": 30, "general": 10}
    assert json.loads((tmp_path / "out" / "report.json").read_text())["general"] == 10
    found = read(tmp_path / "out" / "data.jsonl")
    assert [r["prompt"] for r in found[:30]] == [f"q{i}" for i in range(30)]
    for record in found[30:]:
        problem = record["prompt"].removesuffix(" =")
        assert tasks.is_right(problem, record["completion"])
        assert not tasks.held_out(problem)
    assert len({r["prompt"] for r in found[30:]}) == 10


def test_a_file_gives_what_it_has(tmp_path):
    own = accepted(tmp_path / "general.jsonl", 4)
    recipe = Mixture(accepted=accepted(tmp_path / "a.jsonl"), general=own, share=0.25)
    assert mix(recipe, tmp_path / "out", QUIET) == {"accepted": 30, "general": 4}
    (tmp_path / "general.jsonl").write_text('{"text": "no prompt"}\n')
    with pytest.raises(DataError, match=r"general.jsonl:1: field 'prompt' is missing"):
        mix(recipe, tmp_path / "other", QUIET)


def test_none(tmp_path):
    recipe = Mixture(accepted=accepted(tmp_path / "a.jsonl"), general="", share=0.25)
    assert mix(recipe, tmp_path / "out", QUIET) == {"accepted": 30, "general": 0}


def test_some_records_follow_others(tmp_path):
    recipe = Mixture(
        accepted=accepted(tmp_path / "a.jsonl", 400), general="", share=0.25, turns=0.5
    )
    mix(recipe, tmp_path / "out", QUIET)
    found = read(tmp_path / "out" / "data.jsonl")
    lengths = [len(r["messages"]) for r in found]
    assert set(lengths) == {2, 4, 6}
    assert 0.4 < np.mean(np.array(lengths) > 2) < 0.6
    for i, record in enumerate(found):  # each is learned once, and earlier turns are whole
        asked, answered = record["messages"][::2], record["messages"][1::2]
        assert asked[-1] == {"role": "user", "content": f"q{i}"}
        assert answered[-1] == {"role": "assistant", "content": f"a{i}"}
        assert [a["content"][1:] for a in asked] == [a["content"][1:] for a in answered]
    mix(recipe, tmp_path / "again", QUIET)
    assert list(read(tmp_path / "again" / "data.jsonl")) == list(found)


def test_a_task_that_needs_data_is_refused(tmp_path):
    recipe = Mixture(accepted=accepted(tmp_path / "a.jsonl"), general="jsonl", share=0.25)
    with pytest.raises(RequestError, match="jsonl"):
        mix(recipe, tmp_path / "out", QUIET)
