"""Bytes of a step: what is printed is what the compiled step says, and the options make it less."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepzoo import zoo
from deepzoo.recipes import pretrain
from deepzoo.recipes.parts.memory import estimate, size
from deepzoo.recipes.parts.optim import adamw
from deepzoo.recipes.parts.step import Output, start, train_step

CONFIG = dataclasses.replace(pretrain.PRESETS["nano"].config, num_hidden_layers=6, vocab_size=64)
UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def compiled(remat: bool | str = False, accumulate: int = 1, state: str = "float32"):
    """The jitted step, its state and a batch of 8 rows of 64 tokens."""

    def loss(params, batch, key) -> Output:
        del key
        out = zoo.apply(CONFIG, params, batch["tokens"], remat=remat)
        picked = jnp.take_along_axis(jax.nn.log_softmax(out.logits), batch["tokens"][..., None], -1)
        return Output(-picked.sum(), jnp.float32(picked.size), {})

    params = zoo.init(CONFIG, jax.random.key(0))
    tx = adamw(params, 1e-3, state=state)  # pyright: ignore[reportArgumentType]
    made = start(params, tx, 0)
    batch = {"tokens": np.arange(8 * 64, dtype=np.int32).reshape(8, 64) % 64}
    return jax.jit(train_step(loss, tx, accumulate), donate_argnums=0), made, batch


@functools.cache
def told(**options) -> dict[str, float]:
    line = estimate(*compiled(**options))
    found = re.findall(r"([a-z ]+?):? ([\d.]+) (bytes|[KMG]iB)", line)
    return {name.strip(): float(number) * UNITS[unit] for name, number, unit in found}


def test_the_parts_are_those_of_the_trees_and_of_the_program():
    step, state, batch = compiled()
    held = told()
    params = sum(x.nbytes for x in jax.tree.leaves(state.params))
    assert held["parameters"] == pytest.approx(params, rel=0.02)
    assert held["optimiser"] == pytest.approx(2 * params, rel=0.02)
    assert held["gradients"] == pytest.approx(params, rel=0.02)
    found = step.lower(state, batch).compile().memory_analysis()
    total = found.argument_size_in_bytes + found.temp_size_in_bytes
    assert held["memory per device"] == pytest.approx(total, rel=0.02)
    parts = sum(v for k, v in held.items() if k != "memory per device")
    assert parts == pytest.approx(held["memory per device"], rel=0.05)


def test_recomputing_micro_batches_and_a_small_state_take_less():
    plain = told()
    again, some = told(remat=True), told(remat="dots_with_no_batch_dims_saveable")
    assert again["activations"] < 0.6 * plain["activations"]
    assert again["activations"] < some["activations"] < plain["activations"]
    assert told(accumulate=4)["activations"] < 0.6 * plain["activations"]
    assert told(state="int8")["optimiser"] < 0.3 * plain["optimiser"]


def test_recomputing_changes_no_number():
    results = []
    for remat in (False, True, "dots_with_no_batch_dims_saveable"):
        step, state, batch = compiled(remat=remat)
        _, metrics = step(state, batch)
        results.append((float(metrics["loss"]), float(metrics["norm"])))
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert results[0] == pytest.approx(results[2], rel=1e-5)


def test_sizes_have_units():
    assert [size(n) for n in (512, 1536, 5 << 20, 3 << 30, 2 << 40)] == [
        "512 bytes", "1.5 KiB", "5.0 MiB", "3.0 GiB", "2.0 TiB",
    ]  # fmt: skip
