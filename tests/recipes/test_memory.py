"""Bytes of a step: what is printed is what the compiled step says, and the options make it less."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from deepzoo import zoo
from deepzoo.recipes import pretrain
from deepzoo.recipes.parts.losses import next_token
from deepzoo.recipes.parts.memory import estimate, size
from deepzoo.recipes.parts.optim import adamw
from deepzoo.recipes.parts.step import start, train_step

CONFIG = dataclasses.replace(pretrain.PRESETS["nano"].config, num_hidden_layers=6, vocab_size=64)
UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def rows() -> dict[str, np.ndarray]:
    """A batch of 8 rows of 64 tokens."""
    tokens = np.arange(8 * 65, dtype=np.int32).reshape(8, 65) % 64
    return {"tokens": tokens, "segments": 0 * tokens, "weights": np.ones(tokens.shape, np.float32)}


def compiled(remat: bool | str = False, accumulate: int = 1, state: str = "float32"):
    """The jitted step, its state and a batch."""
    loss = next_token(CONFIG, remat=remat)
    params = zoo.init(CONFIG, jax.random.key(0))
    tx = adamw(params, 1e-3, state=state)  # pyright: ignore[reportArgumentType]
    made = start(params, tx, 0)
    return jax.jit(train_step(loss, tx, accumulate), donate_argnums=0), made, rows()


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
    again, some = told(remat="full"), told(remat="dots")
    assert again["activations"] < 0.6 * plain["activations"]
    assert again["activations"] < some["activations"] < plain["activations"]
    assert told(accumulate=4)["activations"] < 0.6 * plain["activations"]
    assert told(state="int8")["optimiser"] < 0.3 * plain["optimiser"]


def test_recomputing_changes_no_number():
    params, made = zoo.init(CONFIG, jax.random.key(0)), rows()

    @functools.partial(jax.jit, static_argnames="remat")
    def gradient(params, remat):
        loss = next_token(CONFIG, remat=remat)
        return jax.value_and_grad(lambda p: loss(p, made, jax.random.key(0)).loss)(params)

    plain, found = gradient(params, "none"), [gradient(params, name) for name in ("full", "dots")]
    for loss, gradients in found:
        assert float(loss) == pytest.approx(float(plain[0]), rel=1e-6)
        for one, other in zip(*map(jax.tree.leaves, (gradients, plain[1])), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * abs(other).max())


def test_names_and_booleans_are_policies():
    def program(remat):
        tokens = rows()["tokens"]
        made = jax.make_jaxpr(lambda p: zoo.apply(CONFIG, p, tokens, remat=remat).logits)
        return re.sub("0x[0-9a-f]+", "", str(made(zoo.abstract(CONFIG))))

    names = ("none", "full", "dots", "dots_with_no_batch_dims_saveable")
    none, full, dots, spelled = map(program, names)
    assert (program(False), program(True), spelled) == (none, full, dots)
    assert "policy=" in full and "policy=" not in none and full != dots
    with pytest.raises(ValueError, match="remat 'layers': expected none, full, dots, or a name in"):
        program("layers")


def test_sizes_have_units():
    assert [size(n) for n in (512, 1536, 5 << 20, 3 << 30, 2 << 40)] == [
        "512 bytes", "1.5 KiB", "5.0 MiB", "3.0 GiB", "2.0 TiB",
    ]  # fmt: skip
