"""Supervised fine-tuning: what it learns, and what becomes of layers that draft."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from deepzoo import zoo
from deepzoo.recipes import pretrain, sft
from deepzoo.recipes.parts import problems as tasks
from deepzoo.recipes.parts.accuracy import measure
from deepzoo.recipes.parts.log import read_metrics
from deepzoo.recipes.parts.rows import Rows
from deepzoo.recipes.parts.run import Options
from deepzoo.zoo.errors import RequestError

QUIET = Options(quiet=True)
SMALL = dataclasses.replace(
    sft.PRESETS["nano"], task="arithmetic", samples=12, epochs=1, rows=2, length=96, held_out=0
)


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the V3 architecture with one MTP layer; its weights are random."""
    config = dataclasses.replace(pretrain.PRESETS["v3_nano"].config, num_hidden_layers=2)
    model = zoo.load("v2-nano", dtype="float32", stacked=True)._replace(
        config=config, params=zoo.init(config, jax.random.key(0)), source=None
    )
    path = tmp_path_factory.mktemp("models") / "drafting"
    zoo.save_hf(model, path)
    return path


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_layers_that_draft_are_trained_or_kept(drafting: Path, tmp_path: Path, weight: float):
    recipe = dataclasses.replace(SMALL, model=str(drafting), mtp=weight)
    before = zoo.load(drafting, dtype="float32").params
    after = sft.train(recipe, tmp_path, QUIET).params
    same = jax.tree.map(np.array_equal, before["mtp"], after["mtp"])
    assert all(jax.tree.leaves(same)) == (not weight)
    assert not np.array_equal(before["lm_head"]["weight"], after["lm_head"]["weight"])
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "nll" in row]
    assert all(("mtp0" in row) == bool(weight) for row in rows)
    packed = Rows(sft.samples(recipe, zoo.load(drafting)), rows=2, length=96)(0)
    tokens = int((packed["segments"][:, :-1] >= 0).sum())
    assert rows[0]["step_tokens"] == tokens < 2 * 96  # padding does not count


@pytest.mark.parametrize(
    ("changes", "told"),
    [({}, "v2-nano has no MTP layer"), ({"lora_rank": 2}, "low-rank adapters leave no MTP layer")],
)
def test_what_is_not_there_cannot_be_trained(tmp_path: Path, changes, told: str):
    with pytest.raises(RequestError, match=told):
        sft.train(dataclasses.replace(SMALL, mtp=0.3, **changes), tmp_path, QUIET)
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_it_learns(tmp_path: Path):
    """Written solutions of longer problems than the model knows: held-out accuracy rises beyond
    both intervals."""
    task = tasks.task("arithmetic-long")
    made = sft.train(
        dataclasses.replace(sft.PRESETS["nano"], epochs=1, held_out=0), tmp_path, QUIET
    )
    before, after = (
        measure(model, task, 300, max_tokens=160, temperature=0.0)
        for model in (zoo.load("v2-nano", dtype="float32"), made)
    )
    print(f"before: {before.accuracy} {before.interval}\nafter: {after.accuracy} {after.interval}")
    assert after.interval[0] > before.interval[1]
