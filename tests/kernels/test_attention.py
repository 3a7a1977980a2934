"""Latent and grouped-query attention against their float64 references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepzoo.kernels.gqa_attention import gqa_attention, gqa_decode
from deepzoo.kernels.gqa_attention import reference as gqa_reference
from deepzoo.kernels.mla_decode import mla_decode
from deepzoo.kernels.mla_decode import reference as decode_reference
from deepzoo.kernels.mla_prefill import merge, mla_prefill
from deepzoo.kernels.mla_prefill import reference as prefill_reference
from deepzoo.kernels.mla_prefill import xla as prefill_xla

SCALE = 0.3


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def prefill_inputs(batch=2, queries=37, keys=37, heads=3):
    shapes = [(batch, queries, heads, 8), (batch, queries, heads, 4), (batch, keys, heads, 8)]
    shapes += [(batch, keys, 4), (batch, keys, heads, 6)]
    return [normal(*s, seed=i) for i, s in enumerate(shapes)]


def assert_close(out, expected, bound=2e-6):
    for a, b in zip(out, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b)
        assert np.array_equal(np.isneginf(a), np.isneginf(b))
        finite = np.isfinite(b)
        assert np.abs(a[finite] - b[finite]).max() < bound * max(1.0, np.abs(b[finite]).max())


def test_prefill_equals_the_reference():
    arrays = prefill_inputs()
    assert_close(
        mla_prefill(*arrays, scale=SCALE), prefill_reference.mla_prefill(*arrays, scale=SCALE)
    )


def test_prefill_keeps_segments_apart():
    arrays = prefill_inputs()
    segments = np.sort(np.random.default_rng(3).integers(0, 4, (2, 37)), axis=1)
    options = {"scale": SCALE, "q_segments": segments, "k_segments": segments}
    assert_close(mla_prefill(*arrays, **options), prefill_reference.mla_prefill(*arrays, **options))


def test_prefill_with_an_offset_sees_earlier_keys():
    arrays = prefill_inputs(queries=9, keys=20)
    options = {"scale": SCALE, "q_offset": 11}
    assert_close(mla_prefill(*arrays, **options), prefill_reference.mla_prefill(*arrays, **options))


@pytest.mark.parametrize("unrolled", [16, 1])
def test_prefill_in_chunks_is_the_same(monkeypatch, unrolled):
    monkeypatch.setattr(prefill_xla, "_CHUNK", 8)
    monkeypatch.setattr(prefill_xla, "_UNROLLED", unrolled)
    arrays = prefill_inputs()
    segments = np.sort(np.random.default_rng(3).integers(0, 3, (2, 37)), axis=1)
    options = {"scale": SCALE, "q_segments": segments, "k_segments": segments}
    assert_close(mla_prefill(*arrays, **options), prefill_reference.mla_prefill(*arrays, **options))


def test_prefill_gradient_equals_finite_differences():
    arrays = [jnp.asarray(a) for a in prefill_inputs(batch=1, queries=6, keys=6, heads=2)]
    cotangent = normal(1, 6, 2, 6, seed=9).astype(np.float64)

    def loss(*arrays):
        return (mla_prefill(*arrays, scale=SCALE)[0] * cotangent).sum()

    def exact(*arrays):
        return (prefill_reference.mla_prefill(*arrays, scale=SCALE)[0] * cotangent).sum()

    gradients = jax.grad(loss, argnums=tuple(range(5)))(*arrays)
    for n, gradient in enumerate(gradients):
        direction = normal(*arrays[n].shape, seed=20 + n).astype(np.float64)
        wide = [np.asarray(a, np.float64) for a in arrays]
        ends = []
        for sign in (1, -1):
            moved = list(wide)
            moved[n] = wide[n] + sign * 1e-5 * direction
            ends.append(exact(*moved))
        slope = (ends[0] - ends[1]) / 2e-5
        assert abs((np.asarray(gradient) * direction).sum() - slope) < 2e-4 * max(1.0, abs(slope))


def test_merge_is_attention_over_both_parts():
    q_nope, q_rope, k_nope, k_rope, v = prefill_inputs()
    whole = prefill_reference.mla_prefill(q_nope, q_rope, k_nope, k_rope, v, scale=SCALE)
    keys = np.arange(37)
    marks = (keys >= 20).astype(np.int32)[None].repeat(2, 0)
    # Every query against the keys of one mark: the late queries see both parts.
    parts = [
        mla_prefill(
            q_nope, q_rope, k_nope, k_rope, v, scale=SCALE,
            q_segments=np.full((2, 37), mark), k_segments=marks,
        )
        for mark in (0, 1)
    ]  # fmt: skip
    assert_close(merge(*parts[0], *parts[1]), whole)


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


@pytest.mark.parametrize("capacity", [24, 600])
def test_gqa_decode_equals_the_reference(capacity):
    q, k, v = (
        normal(3, 2, 6, 8),
        normal(3, capacity, 2, 8, seed=1),
        normal(3, capacity, 2, 8, seed=2),
    )
    lengths = np.array([[1, 2], [capacity - 1, capacity], [7, 8]])
    expected = gqa_reference.gqa_decode(q, k, v, lengths, scale=SCALE)
    for row in range(3):
        k[row, lengths[row].max() :] = v[row, lengths[row].max() :] = np.nan
    assert_close([gqa_decode(q, k, v, lengths, scale=SCALE)], [expected])


def test_gqa_whole_sequences_equal_the_reference():
    q, k, v = normal(2, 11, 6, 8), normal(2, 11, 2, 8, seed=1), normal(2, 11, 2, 8, seed=2)
    lengths = np.broadcast_to(np.arange(1, 12), (2, 11))
    expected = gqa_reference.gqa_decode(q, k, v, lengths, scale=SCALE)
    assert_close([gqa_attention(q, k, v, scale=SCALE)], [expected])
    segments = np.array([[0] * 4 + [1] * 7] * 2)
    out = gqa_attention(q, k, v, scale=SCALE, segments=segments)
    tail = gqa_reference.gqa_decode(q[:, 4:], k[:, 4:], v[:, 4:], lengths[:, :7], scale=SCALE)
    assert_close([out[:, 4:]], [tail])


def test_one_segment_array_alone_is_refused():
    with pytest.raises(ValueError, match="come together"):
        mla_prefill(*prefill_inputs(), scale=1.0, q_segments=np.zeros((2, 37), np.int32))
