"""Grouped-query attention against its float64 reference."""

import numpy as np
import pytest

from deepzoo.kernels.gqa_attention import gqa_attention, gqa_decode, reference

SCALE = 0.3


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_close(out, expected, bound=2e-6):
    a, b = np.asarray(out, np.float64), np.asarray(expected)
    assert np.abs(a - b).max() < bound * max(1.0, np.abs(b).max())


@pytest.mark.parametrize("capacity", [24, 600])
def test_gqa_decode_equals_the_reference(capacity):
    q, k, v = (
        normal(3, 2, 6, 8),
        normal(3, capacity, 2, 8, seed=1),
        normal(3, capacity, 2, 8, seed=2),
    )
    lengths = np.array([[1, 2], [capacity - 1, capacity], [7, 8]])
    expected = reference.gqa_decode(q, k, v, lengths, scale=SCALE)
    for row in range(3):
        k[row, lengths[row].max() :] = v[row, lengths[row].max() :] = np.nan
    assert_close(gqa_decode(q, k, v, lengths, scale=SCALE), expected)


def test_gqa_whole_sequences_equal_the_reference():
    q, k, v = normal(2, 11, 6, 8), normal(2, 11, 2, 8, seed=1), normal(2, 11, 2, 8, seed=2)
    lengths = np.broadcast_to(np.arange(1, 12), (2, 11))
    expected = reference.gqa_decode(q, k, v, lengths, scale=SCALE)
    assert_close(gqa_attention(q, k, v, scale=SCALE), expected)
    segments = np.array([[0] * 4 + [1] * 7] * 2)
    out = gqa_attention(q, k, v, scale=SCALE, segments=segments)
    tail = reference.gqa_decode(q[:, 4:], k[:, 4:], v[:, 4:], lengths[:, :7], scale=SCALE)
    assert_close(out[:, 4:], tail)
