"""Sort, gather and combine against float64 references, forward and backward, for any routing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from deepzoo.kernels.grouped_matmul import grouped_matmul
from deepzoo.kernels.moe_dispatch import cases, combine, dispatch, plan, reference

TOKENS, CHOSEN, EXPERTS, WIDTH = 13, 3, 5, 7


def normal(*shape, seed=0, dtype=np.float32):
    return np.array(jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype))


def error(got, expected):
    got = np.asarray(got, np.float64)
    return np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30)


@jax.jit
def everything(indices, x, y, weights, to_rows, to_tokens):
    rows = plan(indices, EXPERTS)
    sent, sent_back = jax.vjp(lambda x: dispatch(x, rows), x)
    out, out_back = jax.vjp(lambda y, w: combine(y, w, rows), y, weights)
    return rows, sent, sent_back(to_rows), out, out_back(to_tokens)


# Any experts: one for all, none for some, the same twice for a token.
ROUTING = arrays.arrays(np.int32, (TOKENS, CHOSEN), elements=st.integers(0, EXPERTS - 1))


@given(indices=ROUTING, seed=st.integers(0, 99), dtype=st.sampled_from(["float32", "bfloat16"]))
@settings(max_examples=60)
def test_everything_equals_the_reference_and_repeats(indices, seed, dtype):
    x, to_tokens = (normal(TOKENS, WIDTH, seed=seed + i, dtype=dtype) for i in (0, 1))
    y, to_rows = (normal(TOKENS * CHOSEN, WIDTH, seed=seed + i, dtype=dtype) for i in (2, 3))
    weights = normal(TOKENS, CHOSEN, seed=seed + 4)
    inputs = indices, x, y, weights, to_rows, to_tokens
    rows, sent, (to_x,), out, (to_y, to_weights) = everything(*inputs)
    order, inverse, sizes = reference.plan(indices, EXPERTS)
    assert np.array_equal(rows.order, order)
    assert np.array_equal(rows.inverse, inverse)
    assert np.array_equal(rows.group_sizes, sizes)
    assert np.array_equal(sent, x[order // CHOSEN])
    limit = 4e-3 if dtype == "bfloat16" else 1e-6  # one rounding of a float32 sum
    assert error(to_x, reference.dispatch_gradient(to_rows, order, CHOSEN)) < limit
    assert error(out, reference.combine(y, weights, order)) < limit
    expected = reference.combine_gradients(y, weights, order, to_tokens)
    assert error(to_y, expected[0]) < limit
    assert error(to_weights, expected[1]) < 1e-6
    again = everything(*inputs)
    found = rows, sent, (to_x,), out, (to_y, to_weights)
    jax.tree.map(np.testing.assert_array_equal, again, found)


def test_a_token_does_not_depend_on_the_others():
    """The same token among others, at another place: bit-equal."""
    indices = np.random.default_rng(0).integers(0, EXPERTS, (TOKENS, CHOSEN)).astype(np.int32)
    x, y, weights = normal(TOKENS, WIDTH), normal(TOKENS, CHOSEN, WIDTH), normal(TOKENS, CHOSEN)

    def run(order):
        rows = plan(jnp.asarray(indices[order]), EXPERTS)
        by_pair = y[order].reshape(-1, WIDTH)
        return dispatch(x[order], rows), combine(by_pair[rows.order], weights[order], rows)

    back = np.argsort(shuffled := np.random.default_rng(1).permutation(TOKENS))
    straight, mixed = run(np.arange(TOKENS))[1], run(shuffled)[1]
    assert np.array_equal(straight, mixed[back])


def test_gathers_alone_in_both_directions():
    """No scatter-add, and no scratch beyond the gathered rows, in their dtype and in float32. The
    fused programs for GPUs hold none at all: test_compiled.py asserts the cases' `temp`."""
    for case in cases.CASES:
        if case.name.startswith("V2-Lite") and "plan" not in case.name:
            lowered = jax.jit(case.bind("xla")).lower(*case.abstract())
            assert "scatter" not in lowered.as_text()
            assert lowered.compile().memory_analysis().temp_size_in_bytes < 6.1 * 4096 * 6 * 2048


@pytest.mark.parametrize("case", [c for c in cases.CASES if c.name.startswith("nano")])
def test_cases_measure_what_they_compare(case):
    inputs = case.inputs(0)
    out = case.outputs(case.bind("xla")(*inputs))
    assert error(out, case.reference(*jax.tree.map(np.asarray, inputs))) < 5e-3


def test_no_tokens():
    rows = plan(jnp.zeros((0, 2), jnp.int32), 4)
    assert rows.group_sizes.tolist() == [0, 0, 0, 0]
    out, back = jax.vjp(lambda x: dispatch(x, rows), jnp.zeros((0, 3)))
    assert out.shape == (0, 3) and back(out)[0].shape == (0, 3)
    assert combine(out, jnp.zeros((0, 2)), rows).shape == (0, 3)


def test_what_does_not_belong_together_is_refused():
    rows = plan(jnp.zeros((4, 2), jnp.int32), 3)
    with pytest.raises(ValueError, match=r"integer indices \[M, K\]"):
        plan(jnp.zeros((4,), jnp.int32), 3)
    with pytest.raises(ValueError, match=r"M \* K = 8 pairs"):
        dispatch(jnp.zeros((3, 5)), rows)
    with pytest.raises(ValueError, match="weights"):
        combine(jnp.zeros((8, 5)), jnp.zeros((4, 3)), rows)


def test_experts_are_a_weighted_sum_of_chosen_products_with_its_gradients():
    """plan, dispatch, grouped_matmul and combine together, against every expert for every token."""
    x, w = normal(7, 5), normal(4, 5, 5, seed=1)
    indices = np.random.default_rng(2).permuted(np.tile(np.arange(4), (7, 1)), axis=1)[:, :2]
    weights, cotangent = normal(7, 2, seed=3), normal(7, 5, seed=4)

    def ours(x, w, weights):
        rows = plan(jnp.asarray(indices, jnp.int32), 4)
        out = grouped_matmul(dispatch(x, rows), w, rows.group_sizes)
        return combine(out, weights, rows)

    def dense(x, w, weights):
        every = jnp.einsum("md,efd->mef", x, w)
        chosen = jnp.take_along_axis(every, jnp.asarray(indices)[..., None], axis=1)
        return (chosen * weights[..., None]).sum(axis=1)

    (got, back), (want, dense_back) = (jax.vjp(f, x, w, weights) for f in (ours, dense))
    assert error(got, np.asarray(want, np.float64)) < 1e-6
    for a, b in zip(back(cotangent), dense_back(cotangent), strict=True):
        assert error(a, np.asarray(b, np.float64)) < 1e-6
