"""Latent prefill attention in Pallas Mosaic GPU: which blocks it reads, and its forward and
backward passes in the GPU interpreter, with race detection and NaN in memory nobody wrote.

The interpreter's three threads block threads of XLA's pool while they wait for each other, and on a
machine of two cores wait forever: the kernels run in a child process that is told of more.
"""

import json

import child
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepzoo.kernels.mla_prefill import mosaic, mosaic_backward


def visible_pairs(q_segments, k_segments, queries, keys, offset):
    seen = np.arange(keys) <= np.arange(queries)[:, None] + offset
    if q_segments is not None:
        seen &= q_segments[:, None] == k_segments
    return seen


SIZES = [(1, 1), (300, 300), (130, 700), (700, 513)]  # few, so that few programs are compiled


@st.composite
def problems(draw):
    queries, keys = draw(st.sampled_from(SIZES))
    offset = draw(st.integers(-200, 800))
    kind = draw(st.sampled_from(["none", "packed", "any order"]))
    if kind == "none":
        return None, None, queries, keys, offset
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    documents = draw(st.integers(1, 6))
    q_segments, k_segments = (rng.integers(0, documents, n) for n in (queries, keys))
    if kind == "packed":
        q_segments, k_segments = np.sort(q_segments), np.sort(k_segments)
    return q_segments.astype(np.int32), k_segments.astype(np.int32), queries, keys, offset


block_bounds = jax.jit(mosaic.block_bounds, static_argnums=(2, 3, 5, 6))
step_bounds = jax.jit(mosaic_backward.step_bounds, static_argnums=(2, 3, 5))


def tiles_hold(pairs, bounds, rows, columns, clip):
    """Every visible pair is in a block that is read, and blocks that are not masked see all."""
    for tile, (first, full, last_full, end, _) in enumerate(bounds):
        part = pairs[tile * rows : (tile + 1) * rows]
        assert 0 <= first <= end and end * columns < pairs.shape[1] + columns
        outside = part.copy()
        outside[:, first * columns : end * columns] = False
        assert not outside.any()
        full, last_full = max(full, first), min(last_full, end)
        if full < last_full:
            run = part[:, full * columns : min(last_full * columns, clip)]
            assert run.all()


def batched(a):
    return None if a is None else jnp.asarray(a)[None]


@given(problems())
@pytest.mark.parametrize("tile_k", [128, 64])
def test_query_tiles_read_what_they_see(tile_k, problem):
    q_segments, k_segments, queries, keys, offset = problem
    pairs = visible_pairs(*problem)
    bounds = np.asarray(
        block_bounds(batched(q_segments), batched(k_segments), queries, keys, offset, 1, tile_k)
    )[0]
    assert (bounds[:, 0] < bounds[:, 3]).all() and (bounds[:, 4] == offset).all()
    assert (np.minimum(bounds[:, 2], bounds[:, 3]) * tile_k <= keys).all() or q_segments is None
    tiles_hold(pairs, bounds, mosaic.TILE_Q, tile_k, keys)


@given(problems())
def test_key_tiles_are_read_by_those_that_see_them(problem):
    q_segments, k_segments, queries, keys, offset = problem
    pairs = visible_pairs(*problem).T
    bounds = np.asarray(
        step_bounds(batched(q_segments), batched(k_segments), queries, keys, offset, 1)
    )[0]
    assert (bounds[:, :3] <= bounds[:, 1:4]).all()
    tiles_hold(pairs, bounds, mosaic.TILE_K, mosaic_backward.STEP, queries)


@pytest.mark.parametrize("packed", [False, True])
def test_long_runs_need_no_mask(packed):
    marks = batched(np.zeros(1024, np.int32)) if packed else None
    bounds = np.asarray(mosaic.block_bounds(marks, marks, 1024, 1024, 0, 1))[0]
    assert [tuple(row[:4]) for row in bounds] == [(0, 0, i, i + 1) for i in range(8)]
    steps = np.asarray(mosaic_backward.step_bounds(marks, marks, 1024, 1024, 0, 1))[0]
    assert [tuple(row[:4]) for row in steps] == [(2 * i, 2 * i + 2, 16, 16) for i in range(8)]


@pytest.mark.parametrize("heads, tiles, together", [(6, 3, 2), (16, 5, 4), (1, 2, 1)])
def test_every_tile_has_one_block(heads, tiles, together):
    places = {
        tuple(int(x) for x in mosaic.place(jnp.int32(i), heads, tiles, together))
        for i in range(2 * heads * tiles)
    }
    assert places == {(b, h, t) for b in range(2) for h in range(heads) for t in range(tiles)}


def test_refusals_name_every_reason():
    arrays = [np.zeros((1, 8, 2, n), np.float32) for n in (64, 64, 64)]
    q_nope, q_rope, k_nope = arrays
    k_rope, v = np.zeros((1, 8, 64), np.float32), k_nope
    reasons = mosaic.refusals(q_nope, q_rope, k_nope, k_rope, v, None, None, scale=-1.0, q_offset=0)
    assert len(reasons) == 3
    assert "128, 64, 128" in reasons[0] and "float32" in reasons[1] and "-1.0" in reasons[2]
    assert mosaic_backward.refusals is mosaic.refusals


RUN = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from deepzoo.kernels.mla_prefill import mosaic, mosaic_backward, reference, xla

batch, queries, keys, heads, offset, documents = json.loads(sys.argv[1])
scale = 0.1
rng = np.random.default_rng(0)
normal = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.bfloat16)
offset = jnp.asarray(offset, jnp.int32) if isinstance(offset, list) else offset


@jax.jit
def forward(arrays, segments):
    return mosaic.forward(*arrays, *segments, scale=scale, q_offset=offset, interpret=True)


@jax.jit
def backward(arrays, segments, *results):
    return mosaic_backward.backward(
        *arrays, *segments, *results, scale=scale, q_offset=offset, interpret=True
    )


def errors(found, expected):
    far = lambda a, b: float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))
    return [far(a, b) for a, b in zip(found, expected)]


for draw in range(2 if documents else 1):  # one compiled program, two packings
    arrays = normal(batch, queries, heads, 128), normal(batch, queries, heads, 64)
    arrays += normal(batch, keys, heads, 128), normal(batch, keys, 64)
    arrays += (normal(batch, keys, heads, 128),)
    segments = None, None
    if documents:
        k = rng.integers(0, documents, (batch, keys)).astype(np.int32)
        k = np.sort(k, axis=1) if draw == 0 else k
        q = k[:, -queries:] if queries <= keys else rng.integers(0, 2, (batch, queries), np.int32)
        segments = jnp.asarray(q), jnp.asarray(k)
    exact = {"scale": scale, "q_segments": segments[0], "k_segments": segments[1]}
    exact["q_offset"] = np.asarray(offset)
    wide = [np.asarray(a, np.float64) for a in arrays]
    exact = {n: None if a is None else np.asarray(a) for n, a in exact.items()}
    expected = reference.mla_prefill(*wide, **exact)
    result = xla.forward(*arrays, *segments, scale=scale, q_offset=offset)
    found = forward(arrays, segments)
    assert np.array_equal(np.isneginf(found[1]), np.isneginf(expected[1])), "who sees nothing"
    seen = np.isfinite(expected[1])
    lse = np.asarray(found[1], np.float64)[seen]
    assert np.abs(lse - expected[1][seen]).max() < 1e-5, "lse"
    a, b = np.asarray(found[0], np.float64), expected[0]
    assert 1 - 2 * (a * b).sum() / ((a * a).sum() + (b * b).sum()) < 5e-6, "cosine"
    assert not get_races().races_found, "races"

    d_out = normal(batch, queries, heads, 128)
    d_lse = jnp.asarray(rng.standard_normal((batch, queries, heads)), jnp.float32)
    found_back = backward(arrays, segments, *result, d_out, d_lse)
    assert not get_races().races_found, "races"
    peer = xla.backward(*arrays, *segments, *result, d_out, d_lse, scale=scale, q_offset=offset)
    d_wide = [np.asarray(a, np.float64) for a in (d_out, d_lse)]
    expected_back = reference.backward(*wide, *d_wide, **exact)
    if not documents:
        again = *forward(arrays, segments), *backward(arrays, segments, *result, d_out, d_lse)
        for a, b in zip((*found, *found_back), again):
            assert np.array_equal(np.asarray(a), np.asarray(b)), "a second run differs"
    expected = expected[0], *expected_back
    print(json.dumps([
        errors((found[0], *found_back), expected), errors((result[0], *peer), expected)
    ]))
"""

# batch, queries, keys, heads, offset, documents
CASES = {
    "packed, chunk of a longer text": (1, 130, 300, 1, 170, 3),
    "own offsets, some see nothing, two heads": (2, 70, 150, 2, [-40, 90], 0),
}


@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernels_equal_the_reference(case):
    done = child.run(RUN, json.dumps(CASES[case]), env={"NPROC": "8"})
    lines = done.stdout.splitlines()
    assert len(lines) == (2 if CASES[case][5] else 1)
    for line in lines:
        found, peer = json.loads(line)
        assert len(found) == 6
        for error, bound in zip(found, peer, strict=True):
            assert error < 1e-2 and error <= 1.5 * bound, (found, peer)
