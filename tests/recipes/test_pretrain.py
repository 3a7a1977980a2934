"""The pretraining recipe: what its losses add up to, what a step may touch, and that it learns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepzoo import zoo
from deepzoo.kernels.router import Routing
from deepzoo.recipes import pretrain
from deepzoo.recipes.parts import tasks
from deepzoo.recipes.parts.bias import with_bias
from deepzoo.recipes.parts.fit import fit
from deepzoo.recipes.parts.packing import pack
from deepzoo.recipes.parts.step import start
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
    assert float(out.metrics["mtp0"].weight) == count
    assert float(out.metrics["mtp0"].total) == pytest.approx(total, rel=1e-4)
    whole = float(out.metrics["nll"]) + 0.3 * total
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
    assert pretrain.balance_loss(V2, routing).tolist() == pytest.approx([1.0], rel=1e-5)
    sharp = jnp.zeros_like(scores).at[..., :2].set(0.5)
    uneven = Routing(jnp.zeros_like(even) + jnp.arange(2), routing.weights, sharp)
    # f = (4, 4, 0...), P = (1/2, 1/2, 0...)
    assert pretrain.balance_loss(V2, uneven).tolist() == pytest.approx([4.0], rel=1e-5)


@functools.cache
def v3_step():
    made = recipe(V3, steps=30, warmup=0.1, balance=1e-4, mtp=0.3, bias_rate=0.01)
    step, tx = pretrain.learner(made)
    return tx, jax.jit(step)


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
        make,
        30,
        [lambda state, metrics: seen.append((int(state.step), float(metrics["loss"])))],
    )
    assert [s for s, _ in seen] == list(range(1, 31))
    assert int(state.skipped) == 0
    first, last = np.mean([x for _, x in seen[:3]]), np.mean([x for _, x in seen[-3:]])
    assert first > 8.0  # ln 1007 = 6.9, plus 0.3 times as much of MTP
    assert last < first - 2.5
