"""Latent prefill attention in Pallas-Triton, interpreted on the CPU, against float64."""

from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepzoo.kernels.dispatch import UnsupportedError
from deepzoo.kernels.mla_prefill import mla_prefill, reference, triton, triton_backward, xla
from deepzoo.kernels.mla_prefill.triton import Tile

SCALE = 0.2
SMALL = Tile(16, 32, 4, 2)


def inputs(batch, queries, keys, heads, nope, rope, value, dtype=jnp.float32, seed=0):
    shapes = [(batch, queries, heads, nope), (batch, queries, heads, rope)]
    shapes += [(batch, keys, heads, nope), (batch, keys, rope), (batch, keys, heads, value)]
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


def cotangents(arrays, dtype=jnp.float32):
    rng = np.random.default_rng(1)
    shape = (*arrays[0].shape[:3], arrays[4].shape[-1])
    d_lse = jnp.asarray(rng.standard_normal(shape[:3]), jnp.float32)
    return jnp.asarray(rng.standard_normal(shape), dtype), d_lse


@partial(jax.jit, static_argnames=("tile", "offset"))
def run(arrays, segments, gradients, offset=0, traced=None, tile=SMALL):
    """Both results and the five gradients, all of the Triton form."""
    settings = {"scale": SCALE, "q_offset": offset if traced is None else traced}
    results = triton.forward(*arrays, *segments, **settings, interpret=True, tile=tile)
    backward = partial(triton_backward.backward, interpret=True, tiles=tile and (tile, tile))
    return *results, *backward(*arrays, *segments, *results, *gradients, **settings)


def expected(arrays, segments, gradients, offset=0):
    wide = [np.asarray(a, np.float64) for a in arrays]
    options = {"q_segments": segments[0], "k_segments": segments[1], "q_offset": offset}
    results = reference.mla_prefill(*wide, scale=SCALE, **options)
    return *results, *reference.backward(*wide, *gradients, scale=SCALE, **options)


def assert_close(found, exact, bound=1e-5):
    for a, b in zip(found, exact, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b)
        assert a.shape == b.shape
        assert np.array_equal(np.isneginf(a), np.isneginf(b))
        seen = np.isfinite(b)
        assert np.abs(a[seen] - b[seen]).max(initial=0) < bound * np.abs(b[seen]).max(initial=1.0)


SIZES = {  # batch, queries, keys, heads, nope, rope, value; offset
    "nano": ((2, 40, 40, 2, 32, 16, 32), 0),
    "one head, one query": ((1, 1, 1, 1, 16, 16, 16), 0),
    "odd sizes": ((2, 37, 37, 3, 24, 8, 20), 0),
    "whole blocks": ((1, 64, 64, 2, 16, 16, 16), 0),
    "later chunk": ((1, 33, 100, 2, 16, 16, 16), 67),
    "sees past the end": ((1, 40, 50, 2, 16, 16, 16), 25),
    "sees nothing at first": ((1, 50, 40, 2, 16, 16, 16), -20),
    "128 heads": ((1, 18, 18, 128, 16, 16, 16), 0),
}


@pytest.mark.parametrize("size", SIZES)
def test_equals_the_reference(size):
    sizes, offset = SIZES[size]
    arrays = inputs(*sizes)
    gradients = cotangents(arrays)
    found = run(arrays, (None, None), gradients, offset)
    assert_close(found, expected(arrays, (None, None), gradients, offset))
    again = run(arrays, (None, None), gradients, offset)
    for a, b in zip(found, again, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))


@hypothesis.settings(max_examples=25)
@hypothesis.given(st.data())
def test_any_segments_and_offsets(data):
    batch, queries, keys = 2, 40, 72
    arrays = inputs(batch, queries, keys, 2, 16, 16, 16)
    gradients = cotangents(arrays)
    ids = st.integers(-1, 3)
    rows = {
        "any": lambda n: st.lists(ids, min_size=n, max_size=n),
        "one": lambda n: ids.map(lambda i: [i] * n),
        "packed": lambda n: st.lists(ids, min_size=n, max_size=n).map(sorted),
    }
    kind = rows[data.draw(st.sampled_from(sorted(rows)))]
    segments = tuple(
        np.array([data.draw(kind(n)) for _ in range(batch)], np.int32) for n in (queries, keys)
    )
    offset = np.array([data.draw(st.integers(-queries - 5, keys + 5)) for _ in range(batch)])
    offset = offset.astype(np.int32)
    found = run(arrays, segments, gradients, traced=offset)
    assert_close(found, expected(arrays, segments, gradients, offset))


def test_bfloat16_is_as_near_as_the_xla_form():
    arrays = inputs(1, 96, 96, 2, 128, 64, 128, jnp.bfloat16)
    gradients = cotangents(arrays, jnp.bfloat16)
    exact = expected(arrays, (None, None), gradients)
    settings = {"scale": SCALE, "q_offset": 0}
    plain = xla.forward(*arrays, None, None, **settings)
    plain += xla.backward(*arrays, None, None, *plain, *gradients, **settings)
    # Blocks of whole documents so that several meet: the running maximum has to move.
    found = run(arrays, (None, None), gradients, tile=Tile(32, 32, 4, 2))
    for name, a, b, true in zip(
        ("out", "lse", "dq_nope", "dq_rope", "dk_nope", "dk_rope", "dv"),
        found, plain, exact, strict=True,
    ):  # fmt: skip
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        size = np.linalg.norm(true)
        error, theirs = np.linalg.norm(a - true) / size, np.linalg.norm(b - true) / size
        assert error < 1e-2, name
        assert error < 1.5 * theirs + 1e-6, name
        difference = 1 - 2 * (a * true).sum() / ((a * a).sum() + (true * true).sum())
        assert difference < (5e-6 if name in ("out", "lse") else 2e-5), name


def test_a_segment_at_the_end_of_long_keys_skips_what_it_cannot_see():
    marks = np.repeat([[0, 1, 2, 3]], 64, axis=1).reshape(1, -1).astype(np.int32)
    marks.sort(axis=1)
    found = np.asarray(triton.block_ranges(marks, marks, 32, 16))
    assert found[0].tolist() == [[4 * (i // 2), 4 * (i // 2) + 4] for i in range(8)]
    nothing = np.asarray(triton.block_ranges(marks, marks + 9, 32, 16))
    assert (nothing == 0).all()


def test_the_public_entry_runs_it_by_name():
    arrays = inputs(2, 37, 37, 3, 24, 8, 20)
    gradients = cotangents(arrays)
    named = partial(mla_prefill, scale=SCALE, implementation="triton", interpret=True)
    results, pullback = jax.vjp(named, *arrays)
    exact = expected(arrays, (None, None), gradients)
    assert_close((*results, *pullback(gradients)), exact)


def test_every_reason_for_refusal_is_listed():
    arrays = inputs(1, 4, 4, 1, 160, 16, 16)
    arrays[4] = arrays[4].astype(jnp.bfloat16)
    with pytest.raises(
        UnsupportedError, match=r"bfloat16, float32; needs head.*got 160; needs.*scale"
    ):
        mla_prefill(*arrays, scale=-1.0, implementation="triton", interpret=True)
    with pytest.raises(UnsupportedError, match="runs on NVIDIA GPUs only"):
        mla_prefill(*inputs(1, 4, 4, 1, 16, 16, 16), scale=1.0, implementation="triton")
