"""A training step: what adds up, what must not move, and what a loss is given."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepzoo.recipes.parts.bias import balanced, split_bias, with_bias
from deepzoo.recipes.parts.step import (
    Mean,
    Output,
    Peak,
    State,
    cast,
    culprits,
    jitted,
    several,
    start,
    train_step,
)


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def moved(state: State) -> tuple:
    return state.params, state.bias, state.opt_state


def squares(params, batch, key) -> Output:
    """Weighted squares of a small network's error, with a metric of every kind."""
    del key
    hidden = jnp.tanh(batch["x"] @ params["w"])
    error = (hidden @ params["v"] - batch["y"]) ** 2
    sums = {
        "n": batch["w"].sum(),
        "wide": Mean((batch["w"] * error).sum(), (batch["w"] > 0).sum().astype(jnp.float32)),
        "worst": Peak(jnp.where(batch["w"] > 0, error, -jnp.inf).max()),
    }
    return Output((batch["w"] * error).sum(), batch["w"].sum(), sums)


def network(rng: np.random.Generator) -> dict:
    return {
        "w": jnp.asarray(rng.normal(size=(5, 7)), jnp.float32),
        "v": jnp.asarray(rng.normal(size=7), jnp.float32),
    }


def rows(rng: np.random.Generator, count: int) -> dict:
    weights = rng.integers(0, 4, count) * 1.0  # some rows count nothing
    return {
        "x": rng.normal(size=(count, 5)).astype(np.float32),
        "y": rng.normal(size=count).astype(np.float32),
        "w": weights.astype(np.float32),
    }


@pytest.mark.parametrize("accumulate", [2, 3, 12])
def test_micro_batches_add_up_to_the_whole_batch(accumulate: int):
    rng = np.random.default_rng(0)
    params, batch, tx = network(rng), rows(rng, 12), optax.sgd(0.1)
    (whole, one), (parts, many) = (
        jax.jit(train_step(squares, tx, n, clip=1e9))(start(params, tx, 0), batch)
        for n in (1, accumulate)
    )
    assert float(one["norm"]) > 0.1
    for a, b in zip(*map(jax.tree.leaves, (whole.params, parts.params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    for name in ("loss", "weight", "norm"):
        assert float(one[name]) == pytest.approx(float(many[name]), rel=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (one["sums"], many["sums"])), strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-6)


def test_gradients_of_bfloat16_are_added_in_float32():
    """Looked up in the program: compilers for CPUs add in float32 anyway."""

    def loss(params, batch, key) -> Output:
        del key
        return Output((params["a"] * batch["x"]).sum(), jnp.ones(()), {})

    tx = optax.sgd(1.0)
    state = start({"a": jnp.zeros(3, jnp.bfloat16)}, tx, 0)
    batch = {"x": jnp.full((256, 3), 1 + 2**-7, jnp.bfloat16)}
    step = train_step(loss, tx, 256, clip=1e9)
    (scan,) = (e for e in jax.make_jaxpr(step)(state, batch).eqns if e.primitive.name == "scan")
    sums = [v.aval for v in scan.outvars]
    assert [a.dtype for a in sums if a.shape == (3,)] == [jnp.float32]
    after, metrics = jax.jit(step)(state, batch)
    assert float(metrics["norm"]) == pytest.approx((1 + 2**-7) * 3**0.5, rel=1e-6)  # weight 256
    assert after.params["a"].dtype == jnp.bfloat16


def test_the_key_differs_between_steps_and_micro_batches_and_is_that_of_the_seed():
    def loss(params, batch, key) -> Output:
        drawn = jax.random.normal(key, ())
        return Output((params["a"] * batch["x"]).sum(), jnp.ones(()), {"drawn": drawn})

    tx, batch = optax.sgd(0.0), {"x": np.ones(2, np.float32)}

    def draws(accumulate: int, seed: int, steps: int = 2) -> list[float]:
        step, found = jax.jit(train_step(loss, tx, accumulate)), []
        state = start({"a": jnp.ones(())}, tx, seed)
        for _ in range(steps):
            state, metrics = step(state, batch)
            found.append(float(metrics["sums"]["drawn"]))
        return found

    assert draws(1, 3) == draws(1, 3)
    assert len({*draws(1, 3), *draws(1, 4), *draws(2, 3)}) == 6
    key = jax.random.fold_in(jax.random.key(3), 1)
    assert draws(1, 3)[1] == float(jax.random.normal(key, ()))


def poisoned(value: float, leaf: str):
    """A loss whose gradient with respect to one leaf is not finite when the batch says so."""

    def loss(params, batch, key) -> Output:
        del key
        good = sum(jnp.sum(p * p) for p in jax.tree.leaves(params))
        bad = jnp.where(batch["bad"][0], value, 0.0) * jnp.sum(params[leaf])
        return Output(good + bad - jax.lax.stop_gradient(bad), jnp.ones(()), {})

    return loss


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_touches_nothing_and_its_leaf_is_named(value: float):
    params = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(4)}
    tx = optax.adamw(0.1)
    step = jax.jit(train_step(poisoned(value, "b"), tx, clip=1.0))
    state, metrics = step(start(params, tx, 0), {"bad": np.array([False])})
    assert culprits(state, metrics) == []
    after, metrics = step(state, {"bad": np.array([True])})
    assert not metrics["finite"]
    assert culprits(after, metrics) == ["b"]
    assert (int(after.skipped), int(after.streak), int(after.step)) == (1, 1, 2)
    assert bits(moved(after)) == bits(moved(state))
    again, metrics = step(after, {"bad": np.array([False])})
    assert metrics["finite"]
    assert bits(again.params) != bits(after.params)
    assert (int(again.skipped), int(again.streak)) == (1, 0)


def test_nan_in_the_loss_alone_or_in_the_update_alone_touches_nothing():
    def loss(params, batch, key) -> Output:
        del key
        return Output((params["a"] ** 2).sum() + batch["x"], jnp.ones(()), {})

    state = start({"a": jnp.ones(3)}, optax.sgd(0.1), 0)
    step = jax.jit(train_step(loss, optax.sgd(0.1)))
    for x in (np.nan, np.inf):
        after, metrics = step(state, {"x": np.float32(x)})
        assert bits(after.params) == bits(state.params)
        assert not metrics["finite"]
        assert metrics["leaves"].all()
    endless = optax.sgd(np.inf)
    after, metrics = jax.jit(train_step(loss, endless))(state, {"x": np.float32(0)})
    assert bits(after.params) == bits(state.params)
    assert int(after.skipped) == 1


def test_a_batch_of_weight_zero_moves_nothing_and_is_no_mistake():
    """AdamW would decay the weights and let its momentum go on."""
    rng = np.random.default_rng(1)
    params, tx = network(rng), optax.adamw(0.1, weight_decay=0.5)
    step = jax.jit(train_step(squares, tx))
    state, _ = step(start(params, tx, 0), rows(rng, 4))
    nothing = {**rows(rng, 4), "w": np.zeros(4, np.float32)}
    after, metrics = step(state, nothing)
    assert bits(moved(after)) == bits(moved(state))
    assert float(metrics["loss"]) == 0.0
    assert metrics["finite"]
    assert (int(after.step), int(after.skipped), int(after.streak)) == (2, 0, 0)


def test_the_norm_is_clipped():
    def loss(params, batch, key) -> Output:
        del key
        return Output(jnp.sum(params["a"] * batch["x"]), jnp.ones(()), {})

    tx = optax.sgd(1.0)
    step = jax.jit(train_step(loss, tx, clip=1.0))
    for slope in ([3.0, 4.0], [0.3, 0.4]):
        state, metrics = step(start({"a": jnp.zeros(2)}, tx, 0), {"x": np.array(slope)})
        norm = float(np.hypot(*slope))
        assert float(metrics["norm"]) == pytest.approx(norm, rel=1e-5)
        np.testing.assert_allclose(state.params["a"], -np.array(slope) / max(norm, 1), rtol=1e-5)


GATE = {"weight": jnp.ones((2, 4, 3)), "e_score_correction_bias": jnp.zeros((2, 4))}


def routed(params, batch, key) -> Output:
    """Looks at the bias, and has a load."""
    del key
    gate = params["moe"]["mlp"]["gate"]
    total = (gate["weight"] ** 2).sum() + 5.0 * gate["e_score_correction_bias"].sum()
    return Output(total, jnp.ones(()), {"load": {"moe": batch["load"]}})


def test_the_bias_is_moved_by_counts_alone_and_frozen_without_a_rate():
    params, tx = {"moe": {"mlp": {"gate": GATE}}}, optax.adamw(0.1)
    state = start(params, tx, 0)
    assert "e_score_correction_bias" not in state.params["moe"]["mlp"]["gate"]
    batch = {"load": np.array([[9, 1, 4, 2], [3, 3, 3, 3]], np.int32)}
    step = jax.jit(train_step(routed, tx, bias_rate=lambda at: jnp.where(at < 1, 0.01, 0.0)))
    after, _ = step(state, batch)
    np.testing.assert_allclose(
        after.bias["moe"], [[-0.01, 0.01, 0.0, 0.01], [0, 0, 0, 0]], atol=1e-8
    )
    later, _ = step(after, batch)  # gamma is 0 now
    assert bits(later.bias) == bits(after.bias)
    frozen, _ = jax.jit(train_step(routed, tx))(state, batch)
    assert bits(frozen.bias) == bits(state.bias)
    assert bits(frozen.params) == bits(after.params)


def test_the_bias_goes_down_for_the_overloaded_and_up_for_the_underloaded():
    bias = jnp.array([[0.5, 0.5, 0.5, 0.5]])
    after = balanced(bias, jnp.array([[10, 2, 6, 6]]), jnp.asarray(0.01))
    np.testing.assert_allclose(after, [[0.49, 0.51, 0.5, 0.5]], atol=1e-7)


def test_biases_are_taken_out_and_put_back_also_of_a_tree_that_has_none():
    params = {"moe": {"mlp": {"gate": GATE}}, "mtp": {"block": {"mlp": {"gate": GATE}}}}
    without, bias = split_bias(params)
    assert set(bias) == {"moe", "mtp"}
    assert jax.tree.structure(with_bias(without, bias)) == jax.tree.structure(params)
    adapter = {"moe": {"self_attn": {"a": jnp.ones(2)}}}
    assert split_bias(adapter) == (adapter, {})


def test_a_frozen_tree_is_seen_by_the_loss_and_by_nothing_else():
    """LoRA: the small tree is trained, the loss sees the merged model."""

    def loss(params, batch, key) -> Output:
        del key
        return Output(((batch["x"] @ params["w"]) ** 2).sum(), jnp.ones(()), {})

    def merge(pair, frozen):
        return {"w": frozen["w"] + pair["b"] @ pair["a"]}

    rng = np.random.default_rng(2)
    frozen = {"w": jnp.asarray(rng.normal(size=(5, 6)), jnp.float32)}
    pair = {"a": jnp.asarray(rng.normal(size=(2, 6)), jnp.float32), "b": jnp.zeros((5, 2))}
    tx, batch = optax.sgd(0.1), {"x": rng.normal(size=(3, 5)).astype(np.float32)}
    step = jax.jit(train_step(loss, tx, combine=merge, clip=1e9), donate_argnums=0)
    bound = functools.partial(step, frozen=frozen)
    old = np.asarray(pair["b"])
    state, _ = bound(start(pair, tx, 0), batch)
    gradient = jax.grad(lambda b: ((batch["x"] @ (frozen["w"] + b @ pair_a)) ** 2).sum())
    pair_a = np.asarray(state.params["a"])  # unchanged: b was 0
    expected = -0.1 * np.asarray(gradient(jnp.asarray(old)))
    np.testing.assert_allclose(state.params["b"], expected, rtol=1e-5)
    assert np.abs(expected).max() > 0.1
    assert set(state.params) == {"a", "b"}


def test_master_weights_stay_float32_while_the_loss_computes_in_bfloat16():
    seen = {}

    def loss(params, batch, key) -> Output:
        del key
        seen.update({"w": params["w"].dtype, "gate": params["gate"]["weight"].dtype})
        return Output((params["w"].astype(jnp.float32) * batch["x"]).sum(), jnp.ones(()), {})

    params = {"w": jnp.ones(4), "gate": {"weight": jnp.ones(2)}}
    tx, batch = optax.sgd(1e-4), {"x": np.ones(4, np.float32)}
    step = jax.jit(train_step(loss, tx, compute="bfloat16", clip=1e9))
    state = start(params, tx, 0)
    for _ in range(10):
        state, _ = step(state, batch)
    assert seen == {"w": jnp.bfloat16, "gate": jnp.float32}
    assert state.params["w"].dtype == jnp.float32
    # each of the ten steps is below the spacing of bfloat16 at 1
    np.testing.assert_allclose(state.params["w"], 1 - 1e-3, rtol=1e-5)
    assert cast({"q": jnp.ones(2, jnp.float8_e4m3fn)}, "bfloat16")["q"].dtype == jnp.float8_e4m3fn


def test_several_updates_count_as_one_step_and_have_randomness_of_their_own():
    def loss(params, batch, key) -> Output:
        drawn = jax.random.normal(key, ())
        sums = {"drawn": Peak(drawn), "n": batch["x"].sum()}
        return Output((params["a"] * batch["x"]).sum(), batch["x"].sum(), sums)

    tx = optax.sgd(0.1)
    step = jax.jit(train_step(loss, tx), donate_argnums=0)
    state = start({"a": jnp.ones(())}, tx, 5)
    batches = [{"x": np.full(2, float(n), np.float32)} for n in (1, 2, 3)]
    state, metrics = several(step)(state, batches)
    assert (int(state.step), int(state.seed)) == (1, 5)
    assert float(state.params["a"]) == pytest.approx(0.7)
    assert float(metrics["weight"]) == float(metrics["sums"]["n"]) == 12.0
    drawn = []
    for n in (1, 2, 3):
        _, m = several(step)(start({"a": jnp.ones(())}, tx, 5), batches[:n])
        drawn.append(float(m["sums"]["drawn"].value))
    assert drawn == sorted(drawn)
    assert len(set(drawn)) > 1


def test_what_a_recipe_carries_along_passes_through_a_donated_step():
    tx = optax.sgd(0.1)
    rng = np.random.default_rng(3)
    params = network(rng)
    extra = {"reference": jax.tree.map(jnp.copy, params)}
    before = bits(extra)
    step = jax.jit(train_step(squares, tx), donate_argnums=0)
    state, _ = step(start(params, tx, 0, extra), rows(rng, 4))
    assert bits(state.extra) == before


def test_all_steps_are_one_program():
    rng = np.random.default_rng(5)
    tx = optax.adam(0.01)
    state = start(network(rng), tx, 0)
    step = jitted(train_step(squares, tx), state)
    for _ in range(3):
        state, _ = step(state, rows(rng, 8))
    assert step._cache_size() == 1
