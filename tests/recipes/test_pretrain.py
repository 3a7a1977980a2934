"""The pretraining recipe: what its losses add up to, what a step may touch, and that it learns."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepzoo import zoo
from deepzoo.kernels.router import Routing
from deepzoo.recipes import pretrain
from deepzoo.recipes.parts import tasks
from deepzoo.recipes.parts.packing import pack
from deepzoo.recipes.parts.train import (
    NonFiniteError,
    Output,
    balanced,
    fit,
    optimizer,
    split_bias,
    start,
    train_step,
    warmup_constant_decay,
    with_bias,
)
from deepzoo.zoo.tokenizer import Tokenizer

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 16, "initializer_range": 0.1,
}  # fmt: skip
V2 = dataclasses.replace(pretrain.PRESETS["nano"].config, **SMALL)
V3 = dataclasses.replace(pretrain.PRESETS["v3_nano"].config, **SMALL)
KEY = jax.random.key(0)


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer(tasks.tokenizer_files(), V2)


@functools.cache
def initial(config) -> dict:
    return zoo.init(config, KEY)


def recipe(config, **changes) -> pretrain.Recipe:
    return dataclasses.replace(
        pretrain.PRESETS["nano"], config=config, rows=4, length=64, **changes
    )


def batch(step: int = 0, seed: int = 0) -> dict[str, np.ndarray]:
    return pretrain.arithmetic(tokenizer(), recipe(V2, seed=seed))(step)


def test_a_batch_is_a_pure_function_of_seed_and_step():
    for name in ("tokens", "segments", "weights"):
        np.testing.assert_array_equal(batch(3)[name], batch(3)[name])
    assert (batch(3)["tokens"] != batch(4)["tokens"]).mean() > 0.3
    assert (batch(3)["tokens"] != batch(3, seed=1)["tokens"]).mean() > 0.3


def test_packing_keeps_documents_whole_and_apart():
    documents = [([1, 5, 6, 2], 2), ([1, 7, 2], 2), ([1, 8, 8, 8, 2], 1), ([1, 9, 2], 1)] * 9
    made = pack(iter(documents), 2, 9)
    assert {a.shape for a in made.values()} == {(2, 10)}
    # the given tokens are no targets
    np.testing.assert_array_equal(made["weights"][0], [0, 0, 1, 1, 0, 0, 1, 0, 1, 1])
    np.testing.assert_array_equal(made["tokens"][0], [1, 5, 6, 2, 1, 7, 2, 1, 8, 8])
    np.testing.assert_array_equal(made["segments"][0], [0, 0, 0, 0, 1, 1, 1, 2, 2, 2])


def test_targets_lie_to_the_right_and_end_with_the_document():
    made = {
        "tokens": jnp.array([[10, 11, 12, 20, 21, 22, 23]]),
        "segments": jnp.array([[0, 0, 0, 1, 1, 1, 1]]),
        "weights": jnp.array([[0.0, 1, 1, 0, 0, 1, 1]]),  # 21 is given
    }
    target, weight = pretrain.shifted(made, 1)
    np.testing.assert_array_equal(target, [[11, 12, 20, 21, 22, 23]])
    np.testing.assert_array_equal(weight, [[1, 1, 0, 0, 1, 1]])
    target, weight = pretrain.shifted(made, 2)  # the first MTP depth
    np.testing.assert_array_equal(target * weight, [[12, 0, 0, 22, 23, 0]])
    np.testing.assert_array_equal(weight, [[1, 0, 0, 1, 1, 0]])
    target, weight = pretrain.shifted(made, 3)  # the second
    np.testing.assert_array_equal(target * weight, [[0, 0, 0, 23, 0, 0]])


def test_the_mtp_loss_is_that_of_the_token_after_the_next():
    """Against the logits of `apply_mtp`, position by position."""
    made = batch()
    tokens, segments = jnp.asarray(made["tokens"]), jnp.asarray(made["segments"])
    params = initial(V3)
    out = jax.jit(pretrain.next_token(V3, mtp=0.3))(params, made, KEY)
    hidden = zoo.apply(V3, params, tokens[:, :-1], segment_ids=segments[:, :-1]).hidden
    deep = zoo.apply_mtp(V3, params, hidden, tokens[:, 1:], segment_ids=segments[:, :-1])
    logprobs = np.asarray(jax.nn.log_softmax(deep.logits))
    total, count = 0.0, 0
    for b, i in np.ndindex(tokens.shape[0], tokens.shape[1] - 2):
        if segments[b, i] == segments[b, i + 2] and made["weights"][b, i + 2]:
            total, count = total - logprobs[b, i, int(tokens[b, i + 2])], count + 1
    assert float(out.metrics["mtp0_weight"]) == count
    assert float(out.metrics["mtp0"]) == pytest.approx(total, rel=1e-4)
    whole = float(out.metrics["nll"]) + 0.3 * total / count * float(out.weight)
    assert float(out.loss) == pytest.approx(whole, rel=1e-4)


def test_packed_documents_give_the_loss_and_gradients_of_separate_ones():
    documents = [[1, 50, 3, 41, 6, 88, 2], [1, 30, 5, 9, 2], [1, 15, 3, 10, 6, 22, 2]]
    given = 3
    width = max(map(len, documents))
    alone = {
        "tokens": np.zeros((len(documents), width + 1), np.int32),
        "segments": np.tile(np.arange(width + 1, dtype=np.int32), (len(documents), 1)),
        "weights": np.zeros((len(documents), width + 1), np.float32),
    }  # behind the document every position is a segment of its own
    for row, document in enumerate(documents):
        alone["tokens"][row, : len(document)] = document
        alone["segments"][row, : len(document)] = -1
        alone["weights"][row, given : len(document)] = 1
    size = sum(map(len, documents))
    packed = pack(((d, given) for d in documents), 1, size - 1)
    assert packed["tokens"].tolist() == [[*documents[0], *documents[1], *documents[2]]]

    loss = pretrain.next_token(V2)
    value = jax.jit(jax.value_and_grad(lambda p, b: loss(p, b, KEY).loss))
    one, one_gradient = value(initial(V2), packed)
    many, many_gradient = value(initial(V2), alone)
    assert float(one) == pytest.approx(float(many), rel=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (one_gradient, many_gradient)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3 * float(jnp.abs(b).max()) + 1e-5)
    unmasked = {**packed, "segments": np.zeros_like(packed["segments"])}
    assert abs(float(value(initial(V2), unmasked)[0]) - float(many)) > 1e-2


def test_balance_loss_is_one_a_layer_when_even_and_grows_with_the_imbalance():
    tokens = jnp.arange(64)
    even = jnp.stack([tokens % 8, (tokens + 1) % 8], axis=-1)[None, None]
    scores = jnp.full((1, 1, 64, 8), 0.125)
    routing = Routing(even.astype(jnp.int32), jnp.ones((1, 1, 64, 2)), scores)
    assert float(pretrain.balance_loss(V2, routing)) == pytest.approx(1.0, rel=1e-5)
    sharp = jnp.zeros_like(scores).at[..., :2].set(0.5)
    uneven = Routing(jnp.zeros_like(even) + jnp.arange(2), routing.weights, sharp)
    # f = (4, 4, 0...), P = (1/2, 1/2, 0...)
    assert float(pretrain.balance_loss(V2, uneven)) == pytest.approx(4.0, rel=1e-5)


def test_the_bias_goes_down_for_the_overloaded_and_up_for_the_underloaded():
    bias = jnp.array([[0.5, 0.5, 0.5, 0.5]])
    after = balanced(bias, jnp.array([[10, 2, 6, 6]]), jnp.asarray(0.01))
    np.testing.assert_allclose(after, [[0.49, 0.51, 0.5, 0.5]], atol=1e-7)


@functools.cache
def v3_step():
    params, _ = split_bias(initial(V3))
    tx = optimizer(params, 0.02, 3e-3, 0.01, warmup_constant_decay(30, 0.1, 0.3))
    loss = pretrain.next_token(V3, balance=1e-4, mtp=0.3)
    return tx, jax.jit(train_step(loss, tx, bias_rate=lambda step: 0.01))


def test_the_bias_is_moved_by_counts_alone():
    tx, step = v3_step()
    state = start(initial(V3), tx, 0)
    assert "e_score_correction_bias" not in str(jax.tree_util.tree_structure(state.params))
    after, metrics = step(state, batch())
    for name in ("moe", "mtp"):
        load = np.asarray(metrics["sums"]["load"][name], np.float64)
        expected = 0.01 * np.sign(load.mean(axis=-1, keepdims=True) - load)
        np.testing.assert_allclose(np.asarray(after.bias[name]), expected, atol=1e-7)
        assert np.abs(expected).max() > 0
    whole = with_bias(after.params, after.bias)
    assert jax.tree.structure(whole) == jax.tree.structure(initial(V3))


def test_a_few_steps_learn():
    tx, step = v3_step()
    seen = []
    make = pretrain.arithmetic(tokenizer(), recipe(V3))
    state = fit(
        step,
        start(initial(V3), tx, 0),
        map(make, range(30)),
        [lambda state, metrics: seen.append((int(state.step), float(metrics["loss"])))],
    )
    assert [s for s, _ in seen] == list(range(1, 31))
    assert int(state.skipped) == 0
    first, last = np.mean([x for _, x in seen[:3]]), np.mean([x for _, x in seen[-3:]])
    assert first > 8.0  # ln 1007 = 6.9, plus 0.3 times as much of MTP
    assert last < first - 2.5


def poisoned(value: float, leaf: str):
    """A loss whose gradient with respect to one leaf is not finite when the batch says so."""

    def loss(params, batch, key) -> Output:
        del key
        good = sum(jnp.sum(p * p) for p in jax.tree.leaves(params))
        bad = jnp.where(batch["bad"][0], value, 0.0) * jnp.sum(params[leaf])
        return Output(good + bad - jax.lax.stop_gradient(bad), jnp.ones(()), {})

    return loss


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_touches_nothing_and_the_run_stops_after_three(value: float):
    params = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(4)}
    tx = optax.adamw(0.1)
    step = jax.jit(train_step(poisoned(value, "b"), tx, clip=1.0))
    state, _ = step(start(params, tx, 0), {"bad": np.array([False])})
    after, metrics = step(state, {"bad": np.array([True])})
    assert not metrics["finite"]
    assert (int(after.skipped), int(after.streak), int(after.step)) == (1, 1, 2)
    for old, new in zip(
        *map(jax.tree.leaves, ((state.params, state.opt_state), (after.params, after.opt_state))),
        strict=True,
    ):
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()
    again, metrics = step(after, {"bad": np.array([False])})
    assert metrics["finite"]
    assert (int(again.skipped), int(again.streak)) == (1, 0)

    hooked = []
    stream = [{"bad": np.array([b])} for b in (False, True, True, False, True, True, True, False)]
    with pytest.raises(NonFiniteError, match="3 batches in a row"):
        fit(step, start(params, tx, 0), stream, [lambda s, m: hooked.append(bool(m["finite"]))])
    assert hooked == [True, False, False, True, False, False]


def test_micro_batches_add_up_to_the_whole_batch():
    made = {"x": np.arange(8.0), "w": np.array([1, 1, 0, 0, 1, 1, 1, 1.0])}

    def loss(params, batch, key) -> Output:
        del key
        each = batch["w"] * (params["a"] - batch["x"]) ** 2
        return Output(each.sum(), batch["w"].sum(), {"n": batch["w"].sum()})

    tx, results = optax.sgd(0.1), []
    for accumulate in (1, 4):
        state = start({"a": jnp.ones(())}, tx, 0)
        state, metrics = jax.jit(train_step(loss, tx, accumulate, clip=1e9))(state, made)
        results.append(
            (float(state.params["a"]), float(metrics["loss"]), float(metrics["sums"]["n"]))
        )
    assert results[0] == pytest.approx(results[1])
    mean = np.average(np.arange(8.0), weights=made["w"])
    assert results[0][0] == pytest.approx(1 - 0.2 * (1 - mean), rel=1e-5)


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


def test_every_matrix_is_orthogonalised_by_itself():
    params, _ = split_bias(initial(V3))
    tx = optimizer(params, 1.0, 0.0, 0.0, lambda step: 1.0)
    gradient = jax.tree.map(lambda p: jax.random.normal(KEY, p.shape), params)
    updates, _ = jax.jit(tx.update)(gradient, tx.init(params), params)
    experts = np.asarray(updates["moe"]["mlp"]["experts"]["up_proj"]["weight"])  # [L, E, 16, 32]
    values = np.linalg.svd(experts, compute_uv=False)
    assert values.shape == (2, 8, 16)
    assert 0.5 < values.min() < values.max() < 1.5
    # AdamW's share (rate 0 here): embedding, head, router, norms
    for path in (("embed_tokens",), ("lm_head",), ("norm",), ("moe", "mlp", "gate")):
        leaf = functools.reduce(dict.__getitem__, path, updates)["weight"]
        assert float(jnp.abs(leaf).max()) == 0.0


def test_the_schedule_rises_stays_and_falls():
    factor = warmup_constant_decay(100, 0.1, 0.2)
    found = [float(factor(jnp.asarray(s))) for s in range(100)]
    assert found[0] == pytest.approx(0.1)
    assert found[4] == pytest.approx(0.5)
    assert found[10:80] == pytest.approx([1.0] * 70)
    assert 0 < found[99] < 0.06
    assert all(a >= b for a, b in itertools.pairwise(found[80:]))
