"""The Hopper form of the grouped matmul in the GPU interpreter: races are watched for, and memory
that nobody wrote is NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepzoo.kernels.block_fp8 import dequantize, quantize
from deepzoo.kernels.grouped_matmul import grouped_matmul, grouped_swiglu, mosaic, reference

INTERPRETED = {"implementation": "mosaic", "interpret": True}
ROWS, WIDTH, INNER = 152, 128, 128


def normal(*shape, seed=0, scale=1.0, dtype=jnp.bfloat16):
    values = np.random.default_rng(seed).standard_normal(shape) * scale
    return np.array(jnp.asarray(values, dtype))


def error(got, expected):
    return np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def product():
    """One compiled program, so that hypothesis only changes data."""
    return jax.jit(lambda x, w, sizes: grouped_matmul(x, w, sizes, **INTERPRETED))


# An even split, a group of all rows, starts off the multiples of 8, nobody's rows, nothing at all.
SIZES = [[70, 0, 53, 9], [0, 152, 0, 0], [1, 2, 3, 140], [64, 8, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_products_equal_the_reference_and_repeat(product, sizes):
    sizes = np.array(sizes, np.int32)
    real = sizes.sum()
    x, w = normal(ROWS, INNER), normal(len(sizes), WIDTH, INNER, seed=1)
    expected = reference.grouped_matmul(x, w, sizes)
    x[real:] = np.nan
    out = product(x, w, sizes)
    assert (np.asarray(out, np.float32)[real:] == 0).all()
    if real:
        assert error(out, expected) < 2e-3  # the rounding to bfloat16
    assert np.array_equal(out, product(x, w, sizes))


@pytest.mark.parametrize("rows", [5, 150])  # copied to 128 and to 152 rows
def test_swiglu_and_its_gradients_equal_the_reference(rows):
    """The gradient to the rows is the transposed product of two pairs; that to the matrices is the
    Triton kernel's."""
    sizes = np.array([rows // 3, 0, rows // 2], np.int32)
    real = sizes.sum()
    x, g = normal(rows, INNER), normal(rows, WIDTH, seed=1)
    gate, up = (normal(3, WIDTH, INNER, seed=i, scale=0.1) for i in (2, 3))
    expected = reference.grouped_swiglu(x, gate, up, sizes)
    gradients = reference.swiglu_gradients(x, gate, up, sizes, g)
    x[real:], g[real:] = np.nan, np.nan
    out, back = jax.vjp(lambda *a: grouped_swiglu(*a, sizes, **INTERPRETED), x, gate, up)
    found = back(g)
    assert error(out, expected) < 3e-3
    for ours, want in zip(found, gradients, strict=True):
        assert error(ours, want) < 5e-3
    assert (np.asarray(out, np.float32)[real:] == 0).all()
    assert (np.asarray(found[0], np.float32)[real:] == 0).all()


def test_wide_tiles_over_more_steps_than_are_in_flight():
    """Two tiles across, six steps of 64 with four in flight, float16."""
    sizes = np.array([100, 36], np.int32)
    x, w = normal(136, 384, dtype=jnp.float16), normal(2, 512, 384, seed=1, dtype=jnp.float16)
    out = grouped_matmul(x, w, sizes, **INTERPRETED)
    assert error(out, reference.grouped_matmul(x, w, sizes)) < 4e-4


def test_float8_matrices_go_to_the_float8_kernel():
    """Rows are rounded to float8 as well: a few per cent of error."""
    x, sizes = normal(72, 128), np.array([40, 0, 30], np.int32)
    w, scale = quantize(jnp.asarray(normal(3, 128, 128, seed=1), jnp.float32))
    out = grouped_matmul(x, w, sizes, scale, **INTERPRETED)
    dense = np.asarray(dequantize(w, scale, jnp.float32))
    assert 1e-3 < error(out, reference.grouped_matmul(x, dense, sizes)) < 6e-2


@given(sizes=st.lists(st.integers(0, 300), min_size=1, max_size=6), spare=st.integers(0, 200))
@settings(max_examples=200)
def test_tiles_that_blocks_find_cover_every_row_once(sizes, spare):
    """`find` by hand: every row, and nobody's, is in one tile of the static count."""
    rows = max(-(-(sum(sizes) + spare) // 8) * 8, mosaic.HEIGHT)
    groups, owner = len(sizes), np.full(rows, -1)
    walk = _walker(groups, rows)
    tiles = mosaic.tile_count(rows, groups + 1)
    for tile, (group, start, before, end) in enumerate(zip(*walk(np.array(sizes)), strict=True)):
        assert tile < tiles
        if group > groups:
            continue
        first = start - start % 8 + (tile - before) * mosaic.HEIGHT
        mine = slice(max(start, first), min(end, first + mosaic.HEIGHT))
        assert mine.stop > mine.start and (owner[mine] == -1).all()
        owner[mine] = group
    expected = np.repeat(range(groups), sizes)
    assert np.array_equal(owner[: len(expected)], expected)
    assert (owner[len(expected) :] == groups).all()


_WALKERS = {}


def _walker(groups, rows):
    """Places of all tiles; compiled once per number of groups, with rows as data."""
    most = 2048

    def run(sizes, rows):
        def step(place, tile):
            place, end = mosaic.find(sizes, rows, groups, tile, place)
            return place, (place.group, place.start, place.before, end)

        zero = mosaic.Place(*(jnp.int32(0),) * 4)
        return jax.lax.scan(step, zero, jnp.arange(most // mosaic.HEIGHT + 2 * groups))[1]

    if groups not in _WALKERS:
        _WALKERS[groups] = jax.jit(run)
    count = mosaic.tile_count(rows, groups + 1)
    return lambda sizes: [
        np.asarray(a)[:count] for a in _WALKERS[groups](jnp.asarray(sizes, jnp.int32), rows)
    ]
