"""Dispatch and grouped matmul against float64 references and dense formulations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepzoo.kernels.block_fp8 import dequantize, quantize
from deepzoo.kernels.grouped_matmul import grouped_matmul
from deepzoo.kernels.grouped_matmul import reference as grouped_reference
from deepzoo.kernels.moe_dispatch import combine, dispatch, plan


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_dispatch_and_combine_are_a_weighted_sum_with_its_gradients():
    x, w = normal(7, 5), normal(4, 5, 5, seed=1)
    indices = np.random.default_rng(2).permuted(np.tile(np.arange(4), (7, 1)), axis=1)[:, :2]
    weights = normal(7, 2, seed=3)

    def ours(x, w, weights):
        rows = plan(jnp.asarray(indices, jnp.int32), 4)
        out = grouped_matmul(dispatch(x, rows), w, rows.group_sizes)
        return combine(out, weights, rows)

    def dense(x, w, weights):
        every = jnp.einsum("md,efd->mef", x, w)
        chosen = jnp.take_along_axis(every, jnp.asarray(indices)[..., None], axis=1)
        return (chosen * weights[..., None]).sum(axis=1)

    assert np.allclose(ours(x, w, weights), dense(x, w, weights), atol=1e-5)
    cotangent = normal(7, 5, seed=4)
    got = jax.grad(lambda *a: (ours(*a) * cotangent).sum(), argnums=(0, 1, 2))(x, w, weights)
    want = jax.grad(lambda *a: (dense(*a) * cotangent).sum(), argnums=(0, 1, 2))(x, w, weights)
    for a, b in zip(got, want, strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() < 1e-4


@pytest.fixture(scope="module")
def compiled():
    """One compiled program a shape, so that hypothesis only changes data."""
    return jax.jit(grouped_matmul), jax.jit(
        lambda x, w, sizes, g: jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)[1](g)
    )


@given(
    rows=st.sampled_from([6, 90]),
    shares=st.lists(st.integers(0, 9), min_size=5, max_size=5).filter(any),
    spare=st.integers(0, 3),
)
@settings(max_examples=30, deadline=None)
def test_grouped_matmul_equals_the_reference(compiled, rows, shares, spare):
    """Empty groups, one group with everything, and rows that belong to nobody."""
    forward, backward = compiled
    real = rows - spare
    sizes = np.floor(np.cumsum(shares) / sum(shares) * real).astype(np.int32)
    sizes = np.diff(sizes, prepend=0).astype(np.int32)
    x, w, g = normal(rows, 12, seed=rows), normal(5, 7, 12, seed=1), normal(rows, 7, seed=2)
    expected = grouped_reference.grouped_matmul(x, w, sizes)
    x[real:] = np.nan
    out = np.asarray(forward(x, w, sizes))
    assert np.abs(out - expected).max() < 1e-5
    assert (out[real:] == 0).all()
    assert np.array_equal(out, np.asarray(forward(x, w, sizes)))
    to_x, to_w = (np.asarray(a) for a in backward(np.nan_to_num(x), w, sizes, g))
    start = 0
    for e, size in enumerate(sizes):
        mine = slice(start, start + size)
        assert np.abs(to_x[mine] - g[mine] @ w[e]).max(initial=0) < 1e-4
        assert np.abs(to_w[e] - g[mine].T @ np.nan_to_num(x)[mine]).max(initial=0) < 1e-4
        start += size
    assert (to_x[real:] == 0).all()


@pytest.mark.parametrize("rows", [4, 64])
def test_grouped_matmul_multiplies_fp8_groups(rows):
    w, scale = quantize(jnp.asarray(normal(3, 130, 140)))
    sizes, x = np.array([1, 0, rows - 1], np.int32), normal(rows, 140, seed=1)
    out = grouped_matmul(jnp.asarray(x), w, sizes, scale)
    dense = np.asarray(dequantize(w, scale, jnp.float32))
    assert np.abs(out - grouped_reference.grouped_matmul(x, dense, sizes)).max() < 1e-3


def test_wrong_shapes_and_lonely_scales_are_refused():
    x, w = jnp.zeros((4, 3)), jnp.zeros((2, 5, 3))
    with pytest.raises(ValueError, match=r"group_sizes \[E\]"):
        grouped_matmul(x, w, jnp.zeros((3,), jnp.int32))
    with pytest.raises(ValueError, match="together"):
        grouped_matmul(x, w, jnp.zeros((2,), jnp.int32), jnp.ones((2, 1, 1)))
