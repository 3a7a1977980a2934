"""A run can be ended at any instant: killed, told to end, damaged on disk; and goes on."""

import json
import signal
from pathlib import Path

import faults
import pytest
from resumable import SAVE_POINTS, Resumable, check, compare, newest, rows

from deepzoo.zoo.cli import recipes

# A recipe without a model: least squares with noise from the key, router biases, a product.
SOURCE = """
import jax, jax.numpy as jnp, numpy as np, optax
from deepzoo.recipes.parts.bias import with_bias
from deepzoo.recipes.parts.run import Run
from deepzoo.recipes.parts.step import Output, start, train_step

@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    steps: int = 10
    rate: float = 0.01
    seed: int = 0

def loss(params, batch, key):
    noise = jax.random.normal(key, batch["y"].shape)
    gate = params["moe"]["mlp"]["gate"]
    scores = batch["x"] @ gate["weight"][0].T + gate["e_score_correction_bias"][0]
    chosen = scores.argmax(-1)
    error = (batch["x"] @ params["w"] - batch["y"] - 0.1 * noise) ** 2 + (scores**2).mean(-1)
    load = jnp.bincount(chosen, length=4)[None].astype(jnp.int32)
    return Output(error.sum(), jnp.float32(error.size), {"load": {"moe": load}})

def train(recipe, out, options):
    tx = optax.adamw(recipe.rate)
    step = jax.jit(train_step(loss, tx, bias_rate=lambda at: 0.01), donate_argnums=0)

    def initial():
        key = jax.random.key(recipe.seed)
        gate = {"weight": jax.random.normal(key, (1, 4, 8))}
        gate["e_score_correction_bias"] = jnp.zeros((1, 4))
        params = {"w": jax.random.normal(key, (8,)), "moe": {"mlp": {"gate": gate}}}
        return start(params, tx, recipe.seed)

    def batch(at):
        rng = np.random.default_rng([recipe.seed, at])
        x = rng.normal(size=(16, 8)).astype(np.float32)
        return {"x": x, "y": x.sum(-1)}

    def look(state):
        return {"first": float(state.params["w"][0]), "sample": f"at {state.step}"}

    with Run(out, recipe, options) as run:
        on = [run.every(4, look, last=True)]
        state = run.fit(step, run.state(initial), batch, recipe.steps, on=on, tokens=16)
        weights = bytes(state.params["w"])
        run.product("result", lambda path: (path.mkdir(), (path / "w").write_bytes(weights)))

recipe = Recipe()
"""
CASE = Resumable(source=SOURCE)


def test_a_run_that_is_ended_in_every_way_ends_as_if_nothing_had_happened(tmp_path: Path):
    out = check(CASE, tmp_path, ("half", "terms", "second", "term", "instant"))
    assert [row["step"] for row in rows(out) if "loss" in row] == list(range(1, 11))
    assert [row["step"] for row in rows(out) if "sample" in row] == [4, 8, 10]


@pytest.mark.slow
def test_it_can_be_killed_at_every_point_of_a_save(tmp_path: Path):
    longer = Resumable(source=SOURCE + "\nrecipe = dataclasses.replace(recipe, steps=16)")
    check(longer, tmp_path, SAVE_POINTS)


@pytest.mark.slow
def test_it_can_be_killed_at_random_instants_until_it_is_finished(tmp_path: Path):
    longer = Resumable(source=SOURCE + "\nrecipe = dataclasses.replace(recipe, steps=40)")
    check(longer, tmp_path, ["instant"] * 12)


def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_it_serves(tmp_path: Path):
    whole, out = tmp_path / "whole", tmp_path / "broken"
    case = Resumable(source=SOURCE, keep=3)
    case.run(whole)
    case.run(out, at=7, **{"with": signal.SIGTERM})
    data = max((out / "checkpoints" / "00000007").rglob("*"), key=lambda p: p.stat().st_size)
    faults.flip_bit(data, data.stat().st_size // 2)
    told = case.run(out)
    assert "put aside as damaged-00000007" in told
    assert "going on from step 6" in told
    compare(whole, out)
    for path in out.glob("checkpoints/[0-9]*/manifest.json"):
        path.write_text("{}")
    told = case.run(out, status=2)
    assert "none of its 3 checkpoints is whole" in told


def test_more_steps_go_on_and_replace_what_was_made(tmp_path: Path):
    out, other = tmp_path / "a", tmp_path / "b"
    CASE.run(out)
    assert newest(out) == 10
    before = (out / "result" / "w").read_bytes()
    longer = Resumable(source=SOURCE + "\nrecipe = dataclasses.replace(recipe, steps=12)")
    longer.run(out)
    longer.run(other)
    assert newest(out) == 12
    assert (out / "result" / "w").read_bytes() == (other / "result" / "w").read_bytes() != before
    held = [row for row in rows(out) if row["step"] != 10]  # the end of the shorter run is noted
    assert held == [row for row in rows(other) if row["step"] != 10]
    settings = json.loads((out / "recipe.json").read_text())
    assert settings["settings"]["steps"] == 10  # as it was begun


def test_every_recipe_is_copied_ended_and_gone_on_with():
    names = {p.stem for p in recipes.path("sft").parent.glob("*.py")} - {"__init__"}
    tests = "".join(p.read_text() for p in Path(__file__).parent.glob("test_*.py"))
    assert "sft" in names
    assert [n for n in sorted(names) if f'copied("{n}")' not in tests] == []
