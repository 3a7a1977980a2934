"""Router of V2 and V3 against its float64 reference, ties and extremes, counts, the gate."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepzoo.kernels.router import expert_counts, gate, reference, router

V3 = {"k": 3, "scoring": "sigmoid", "groups": 4, "top_groups": 2, "group_score": "top2"}
KINDS = {
    "v2_lite": {"k": 3, "scoring": "softmax"},
    "v2": {"k": 3, "scoring": "softmax", "groups": 4, "top_groups": 2, "scale": 16.0},
    "v3": V3 | {"normalise": True, "scale": 2.5},
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_router_equals_the_reference(kind):
    logits = normal(64, 16)
    bias = normal(16, seed=1) * 0.5 if kind == "v3" else None
    out = router(jnp.asarray(logits), bias, **KINDS[kind])
    indices, weights = reference.router(logits, bias, **KINDS[kind])
    assert np.array_equal(np.asarray(out.indices), indices)
    assert np.abs(np.asarray(out.weights) - weights).max() < 1e-5 * weights.max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("logits", [0.0, 1e9, -1e9])
def test_router_ties_and_extremes_give_distinct_experts(kind, logits):
    bias = np.where(np.arange(16) % 3 == 0, 1e9, -1e9).astype(np.float32) if kind == "v3" else None
    out = router(jnp.full((4, 16), logits), bias, **KINDS[kind])
    assert np.isfinite(np.asarray(out.weights)).all()
    for row in np.asarray(out.indices):
        assert len(set(row.tolist())) == 3
        assert ((row >= 0) & (row < 16)).all()


def test_equal_scores_go_to_the_lowest_index():
    out = router(jnp.zeros((2, 16)), k=3, scoring="softmax")
    assert out.indices.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_counts_leave_out_masked_tokens():
    indices = jnp.array([[0, 1], [1, 2], [1, 3]])
    assert expert_counts(indices, 5).tolist() == [1, 3, 1, 1, 0]
    assert expert_counts(indices, 5, jnp.array([True, False, True])).tolist() == [1, 2, 0, 1, 0]


@pytest.fixture(scope="module")
def compiled():
    """One compiled program for each kind; hypothesis changes data only."""
    return {kind: jax.jit(partial(router, **options)) for kind, options in KINDS.items()}


@given(seed=st.integers(0, 999), spread=st.floats(0.1, 5), push=st.floats(0, 3))
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("kind", KINDS)
def test_any_logits_and_bias(compiled, kind, seed, spread, push):
    """Also biases that push whole groups out, and back: weights never feel them."""
    logits = normal(32, 16, seed=seed) * np.float32(spread)
    bias = normal(16, seed=seed + 1) * np.float32(push) if kind == "v3" else None
    out = compiled[kind](logits, bias)
    indices, weights = reference.router(logits, bias, **KINDS[kind])
    # Two float32 scores may tie where the float64 ones do not: compare where the choice is clear.
    score = np.asarray(out.scores, np.float64) + (0 if bias is None else bias)
    close = 0 if bias is None else 1e-6

    def ties(a):
        a = np.sort(a, axis=1)
        return (np.diff(a, axis=1) <= 1e-6 * np.abs(a[:, 1:]) + close).any(axis=1)

    rank = score.reshape(32, 4, 4)
    rank = np.sort(rank, axis=2)[..., -2:].sum(axis=2) if kind == "v3" else rank.max(axis=2)
    near = ties(score) | ties(rank)
    assert near.mean() < 0.5
    assert np.array_equal(np.asarray(out.indices)[~near], indices[~near])
    assert np.abs(np.asarray(out.weights) - weights)[~near].max() < 1e-5 * weights.max()


def test_groups_are_ranked_by_max_in_v2_and_by_the_two_best_in_v3():
    """Group 0 has the best expert, group 1 the best pair."""
    logits = np.full((1, 8), -9.0, np.float32)
    logits[0, [0, 4, 5]] = 3.0, 2.5, 2.5
    options = {"k": 1, "scoring": "sigmoid", "groups": 2, "top_groups": 1}
    assert router(jnp.asarray(logits), **options, group_score="max").indices[0, 0] == 0
    assert router(jnp.asarray(logits), **options, group_score="top2").indices[0, 0] == 4


def test_bias_moves_the_choice_and_not_the_weights():
    logits = normal(20, 16)
    plain = router(jnp.asarray(logits), k=3, scoring="sigmoid")
    bias = np.zeros(16, np.float32)
    bias[7] = 10
    out = router(jnp.asarray(logits), jnp.asarray(bias), k=3, scoring="sigmoid")
    assert (np.asarray(out.indices)[:, 0] == 7).all()
    assert (np.asarray(plain.indices)[:, 0] != 7).any()
    score = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert np.abs(np.asarray(out.weights)[:, 0] - score[:, 7]).max() < 1e-6


def test_an_excluded_expert_stays_out_whatever_the_bias():
    logits, bias = np.zeros((1, 8), np.float32), np.full(8, -100.0, np.float32)
    logits[0, :4] = 1
    options = {"k": 4, "scoring": "sigmoid", "groups": 2, "top_groups": 1}
    out = router(jnp.asarray(logits), jnp.asarray(bias), **options)
    assert sorted(out.indices[0].tolist()) == [0, 1, 2, 3]


def test_weights_are_differentiable_and_the_bias_gets_nothing():
    logits, bias = jnp.asarray(normal(5, 16)), jnp.asarray(normal(16, seed=1)) * 0.1
    pick = normal(5, 3, seed=2)

    def loss(logits, bias):
        return (router(logits, bias, **KINDS["v3"]).weights * pick).sum()

    to_logits, to_bias = jax.grad(loss, argnums=(0, 1))(logits, bias)
    assert (np.asarray(to_bias) == 0).all()
    indices = np.asarray(router(logits, bias, **KINDS["v3"]).indices)
    score = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    want = np.zeros((5, 16))
    for row in range(5):
        mine = score[row, indices[row]]
        total = mine.sum()
        to_score = 2.5 * (pick[row] / total - (pick[row] * mine).sum() / total**2)
        want[row, indices[row]] = to_score * mine * (1 - mine)
    assert np.abs(np.asarray(to_logits) - want).max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_given_experts_are_weighted_by_these_scores(kind):
    """With the experts that it would choose itself it is itself; others get their own scores."""
    options, logits = KINDS[kind], jnp.asarray(normal(8, 16))
    own = router(logits, **options)
    again = router(logits, **options, indices=own.indices)
    assert all(np.array_equal(a, b) for a, b in zip(own, again, strict=True))
    other = jnp.asarray(np.arange(24).reshape(8, 3) % 16, jnp.int32)
    found = router(logits, jnp.full((16,), 7.0), **options, indices=other)
    assert np.array_equal(found.indices, other)
    weights = np.take_along_axis(np.asarray(own.scores), np.asarray(other), axis=-1)
    if options.get("normalise"):
        weights = weights / weights.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(found.weights, weights * options.get("scale", 1.0), rtol=1e-5)
    with pytest.raises(ValueError, match="indices must be"):
        router(logits, **options, indices=other[:, :2])


def test_counts_add_up():
    indices = router(jnp.asarray(normal(64, 16)), **KINDS["v2"]).indices
    counts = expert_counts(indices, 16)
    assert counts.sum() == 64 * 3
    assert counts.tolist() == np.bincount(np.asarray(indices).ravel(), minlength=16).tolist()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_gate_is_a_float32_product_in_every_dtype(dtype):
    x, w = normal(33, 700).astype(dtype), normal(16, 700, seed=1).astype(dtype)
    want = x.astype(np.float64) @ w.astype(np.float64).T
    out = gate(jnp.asarray(x), jnp.asarray(w))
    assert out.dtype == jnp.float32
    assert np.abs(np.asarray(out) - want).max() < 2e-6 * np.abs(want).max() * 700**0.5
    to_x = jax.grad(lambda x: gate(x, jnp.asarray(w)).sum())(jnp.asarray(x))
    assert to_x.dtype == dtype
    assert np.abs(np.asarray(to_x, np.float64) - w.astype(np.float64).sum(0)).max() < 0.1


def test_what_cannot_be_chosen_is_told():
    logits = jnp.zeros((2, 16))
    with pytest.raises(ValueError, match="16 experts do not form 3 equal groups"):
        router(logits, k=1, scoring="softmax", groups=3)
    with pytest.raises(ValueError, match="from 1 to the 8 experts that can be chosen, got 9"):
        router(logits, k=9, scoring="softmax", groups=4, top_groups=2)
    with pytest.raises(ValueError, match=r"top_groups must be from 1 to 4, got 5"):
        router(logits, k=2, scoring="softmax", groups=4, top_groups=5)
    with pytest.raises(ValueError, match=r"bias must be \[E\] = \(16,\), got \(8,\)"):
        router(logits, jnp.zeros(8), k=2, scoring="sigmoid")
    with pytest.raises(ValueError, match="need two"):
        router(logits, k=2, scoring="sigmoid", groups=16, top_groups=4, group_score="top2")
