"""Latent decode attention in Pallas-Triton, interpreted."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from decode_inputs import Sizes, check, cosine_difference, error
from hypothesis import given, settings
from hypothesis import strategies as st

from deepzoo.kernels.mla_decode import mla_decode, reference, splits, triton, xla

SCALE = 0.06


def exact(clean):
    return reference.mla_decode(*clean[:5], scale=SCALE, pages=clean[5], latent_scale=clean[6])


@partial(jax.jit, static_argnames=("splits", "by_bits"))
def kernel(arrays, splits=None, by_bits=None):
    return triton.mla_decode(*arrays, scale=SCALE, interpret=True, splits=splits, by_bits=by_bits)


@jax.jit
def same_in_xla(arrays):
    return xla.mla_decode(*arrays, scale=SCALE)


CONFIGS = {
    "V2-Lite": (Sizes(latent=512, rope=64, capacity=150), {"splits": 2}),
    "V2-Lite, pages": (Sizes(latent=512, rope=64, capacity=192, page=64), {"splits": 1}),
    "V2-Lite, pages, float8": (
        Sizes(latent=512, rope=64, capacity=192, page=64, fp8=True), {"splits": 2}
    ),
    "float8 by bits": (Sizes(heads=4, queries=2, fp8=True), {"splits": 1, "by_bits": True}),
    "odd sizes, small pages, several queries": (
        Sizes(heads=5, queries=3, latent=24, rope=8, capacity=80, page=16), {"splits": 3}
    ),
    "less room than a block": (Sizes(heads=2, capacity=21), {"splits": 1}),
    "float32": (Sizes(heads=3, queries=2, dtype=jnp.float32), {"splits": 3}),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=5, deadline=None, database=None)
@given(data=st.data())
def test_equals_the_reference_whatever_the_lengths(name, data):
    sizes, options = CONFIGS[name]
    count = sizes.batch * sizes.queries
    lengths = data.draw(st.lists(st.integers(0, sizes.capacity), min_size=count, max_size=count))
    arrays, clean = sizes.inputs(lengths, seed=data.draw(st.integers(0, 99)))
    expected = exact(clean)
    result = kernel(arrays, **options)
    check(result, expected, bound=2e-6 if sizes.dtype == jnp.float32 else 1e-2)
    peer = same_in_xla(arrays)
    assert error(result[0], expected[0]) <= 1.5 * error(peer[0], expected[0]) + 1e-6


def test_a_single_float8_token_is_not_moved_to_one_side():
    """Its scaled weight is rounded to bfloat16, and no other token evens that out."""
    sizes, options = CONFIGS["V2-Lite, pages, float8"]
    for seed in (*range(8), 86):
        arrays, clean = sizes.inputs([1, 0, 0], seed)
        assert cosine_difference(kernel(arrays, **options)[0], exact(clean)[0]) < 2.5e-6


def test_a_float8_token_of_zeros_has_no_scale_to_divide_by():
    sizes, options = CONFIGS["V2-Lite, pages, float8"]
    arrays, clean = (list(made) for made in sizes.inputs([70, 1, 0], 3))
    first = clean[5][:2, 0]  # pages of the rows that have a token
    for made in (arrays, clean):
        for i in (2, 6):  # latent and its scales
            made[i] = np.array(made[i])
            made[i][first, 0] = 0
    check(kernel(tuple(arrays), **options), exact(clean), bound=1e-2)


@pytest.mark.parametrize("name", CONFIGS)
def test_full_empty_and_one_token_rows(name):
    sizes, options = CONFIGS[name]
    lengths = np.resize([sizes.capacity, 0, 1], (sizes.batch, sizes.queries))
    arrays, clean = sizes.inputs(lengths)
    bound = 2e-6 if sizes.dtype == jnp.float32 else 1e-2
    check(kernel(arrays, **options), exact(clean), bound=bound)


@pytest.mark.parametrize("heads", [1, 7, 33, 100, 128])
def test_any_number_of_heads(heads):
    sizes = Sizes(heads=heads, capacity=72, batch=2)
    arrays, clean = sizes.inputs([72, 9])
    check(kernel(arrays), exact(clean), bound=1e-2)


def test_a_sequence_gives_the_same_bits_wherever_it_lies_in_the_batch():
    arrays, _ = Sizes(capacity=96, page=32, heads=6).inputs([77, 77, 20])
    arrays = list(arrays)
    for i in (0, 1, 4, 5):
        arrays[i] = arrays[i].copy()
        arrays[i][1] = arrays[i][0]
    out, lse = kernel(tuple(arrays), splits=2)
    assert np.array_equal(np.asarray(out)[0], np.asarray(out)[1])
    assert np.array_equal(np.asarray(lse)[0], np.asarray(lse)[1])


@pytest.mark.parametrize("parts", [2, 5, 13])
def test_its_combine_is_the_definition(parts):
    rng = np.random.default_rng(parts)
    out = jnp.asarray(rng.standard_normal((2, parts, 3, 24)), jnp.float32)
    lse = rng.standard_normal((2, parts, 3)).astype(np.float32) * 5
    lse[0, 1:, 0] = lse[1, :, 2] = -np.inf
    out = jnp.where(jnp.isneginf(lse)[..., None], 0, out)
    mine = triton.combine(out, jnp.asarray(lse), jnp.float32, interpret=True)
    theirs = splits.combine(out, jnp.asarray(lse), jnp.float32)
    assert error(mine[0], theirs[0]) < 1e-6
    assert not np.asarray(mine[0])[1, 2].any() and np.isneginf(mine[1][1, 2])
    finite = np.isfinite(np.asarray(theirs[1]))
    assert np.allclose(np.asarray(mine[1])[finite], np.asarray(theirs[1])[finite], atol=1e-6)
    assert np.array_equal(np.isneginf(mine[1]), ~finite)


def test_every_float8_number_is_widened_exactly():
    bits = np.arange(256, dtype=np.uint8)
    bits = bits[(bits & 0x7F) != 0x7F]  # the two NaNs
    wide = triton.widen_bits(jnp.asarray(bits), jnp.bfloat16)
    assert np.array_equal(
        np.asarray(wide, np.float32), bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    )


def test_the_public_entry_runs_it():
    arrays, clean = Sizes(page=32).inputs([96, 40, 0])
    result = mla_decode(
        *arrays[:5], scale=SCALE, pages=arrays[5], implementation="triton", interpret=True
    )
    check(result, exact(clean), bound=1e-2)
