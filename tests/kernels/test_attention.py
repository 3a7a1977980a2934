"""Latent decode attention against its float64 reference."""

import jax.numpy as jnp
import numpy as np
import pytest

from deepzoo.kernels.mla_decode import mla_decode
from deepzoo.kernels.mla_decode import reference as decode_reference

SCALE = 0.3


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_close(out, expected, bound=2e-6):
    for a, b in zip(out, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b)
        assert np.array_equal(np.isneginf(a), np.isneginf(b))
        finite = np.isfinite(b)
        assert np.abs(a[finite] - b[finite]).max() < bound * max(1.0, np.abs(b[finite]).max())


@pytest.mark.parametrize("capacity", [40, 600])
@pytest.mark.parametrize("queries", [1, 3])
def test_decode_sees_exactly_its_lengths(capacity, queries):
    rng = np.random.default_rng(capacity)
    lengths = rng.integers(0, capacity + 1, (4, queries))
    lengths[0], lengths[1] = 0, capacity
    q_latent, q_rope = normal(4, queries, 5, 16), normal(4, queries, 5, 4, seed=1)
    latent, k_rope = normal(4, capacity, 16, seed=2), normal(4, capacity, 4, seed=3)
    expected = decode_reference.mla_decode(q_latent, q_rope, latent, k_rope, lengths, scale=SCALE)
    for row in range(4):  # what nobody may see
        latent[row, lengths[row].max() :] = np.nan
        k_rope[row, lengths[row].max() :] = np.nan
    out = mla_decode(q_latent, q_rope, latent, k_rope, lengths, scale=SCALE)
    assert_close(out, expected)
    again = mla_decode(q_latent, q_rope, latent, k_rope, lengths, scale=SCALE)
    assert np.array_equal(np.asarray(out[0]), np.asarray(again[0]))


def test_decode_in_bfloat16_is_within_its_rounding():
    arrays = [normal(2, 1, 4, 32), normal(2, 1, 4, 8, seed=1), normal(2, 300, 32, seed=2)]
    arrays.append(normal(2, 300, 8, seed=3))
    rounded = [jnp.asarray(a, jnp.bfloat16) for a in arrays]
    lengths = np.array([300, 111])
    out, lse = mla_decode(*rounded, lengths, scale=SCALE)
    wide = [np.asarray(a, np.float64) for a in rounded]
    expected, expected_lse = decode_reference.mla_decode(*wide, lengths, scale=SCALE)
    error = np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected)
    assert error < 1e-2
    assert np.abs(np.asarray(lse) - expected_lse).max() < 1e-2
