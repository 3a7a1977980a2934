"""Latent prefill attention: the XLA form, the gradient and `merge`, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepzoo.kernels.dispatch import UnsupportedError
from deepzoo.kernels.mla_prefill import merge, mla_prefill, reference, xla

SCALE = 0.3


def inputs(batch=2, queries=37, keys=37, heads=3, nope=8, rope=4, value=6):
    shapes = [(batch, queries, heads, nope), (batch, queries, heads, rope)]
    shapes += [(batch, keys, heads, nope), (batch, keys, rope), (batch, keys, heads, value)]
    rng = np.random.default_rng(0)
    return [rng.standard_normal(s).astype(np.float32) for s in shapes]


def packed(batch, tokens, documents=3, seed=3):
    """Segment ids of several documents in a row."""
    marks = np.random.default_rng(seed).integers(0, documents, (batch, tokens))
    return np.sort(marks, axis=1).astype(np.int32)


def assert_close(out, expected, bound=2e-6):
    for a, b in zip(out, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b)
        assert np.array_equal(np.isneginf(a), np.isneginf(b))
        finite = np.isfinite(b)
        assert np.abs(a[finite] - b[finite]).max() < bound * max(1.0, np.abs(b[finite]).max())


def padded(batch, tokens):
    """Segment ids of rows that end in padding, one of them early."""
    marks = packed(batch, tokens)
    marks[0, tokens // 3 :], marks[1:, -2:] = -1, -1
    return marks


MIXED = np.random.default_rng(5).integers(0, 3, (2, 37)).astype(np.int32)
CASES = {
    "plain": ({}, {}),
    "segments": ({}, {"q_segments": packed(2, 37), "k_segments": packed(2, 37)}),
    "segments and padding": ({}, {"q_segments": padded(2, 37), "k_segments": padded(2, 37)}),
    "segments that come again": ({}, {"q_segments": MIXED, "k_segments": MIXED}),
    "segments of a later part": (
        {"queries": 9, "keys": 37},
        {"q_segments": packed(2, 37)[:, 28:], "k_segments": packed(2, 37), "q_offset": 28},
    ),
    "offset": ({"queries": 9, "keys": 20}, {"q_offset": 11}),
    "fewer keys than queries see": ({"queries": 20, "keys": 9}, {"q_offset": 0}),
    "nothing to see at first": ({}, {"q_offset": -5}),
    "traced offsets": ({"queries": 9, "keys": 20}, {"q_offset": np.array([11, 3], np.int32)}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("spans", [1, 3])
def test_forward_and_backward_equal_the_reference(case, spans):
    sizes, options = CASES[case]
    arrays = inputs(**sizes)
    exact = {"q_offset": 0, "q_segments": None, "k_segments": None} | options
    segments = [exact["q_segments"], exact["k_segments"]]
    settings = {"scale": SCALE, "q_offset": exact["q_offset"], "chunk": 4, "spans": spans}
    out, lse = xla.forward(*arrays, *segments, **settings)
    assert_close((out, lse), reference.mla_prefill(*arrays, scale=SCALE, **exact))
    rng = np.random.default_rng(1)
    d_out, d_lse = (rng.standard_normal(a.shape).astype(np.float32) for a in (out, lse))
    expected = reference.backward(*arrays, d_out, d_lse, scale=SCALE, **exact)
    gradients = xla.backward(*arrays, *segments, out, lse, d_out, d_lse, **settings)
    assert_close(gradients, expected, 1e-5)
    public = mla_prefill(*arrays, scale=SCALE, **options)
    assert_close(public, (out, lse))


@pytest.mark.parametrize(
    ("marks", "exact"), [(packed(4, 60, 5), True), (padded(4, 60), True), (MIXED, False)]
)
def test_what_is_read_begins_with_the_first_segment_that_is_seen(marks, exact):
    """In blocks of 4 keys: the first block with a key of a segment of the queries."""
    found = np.asarray(xla._first_block(marks, marks, 4))
    blocks = [marks[:, i : i + 4] for i in range(0, marks.shape[1], 4)]
    for row in range(len(marks)):
        for i, block in enumerate(blocks):
            seen = [j for j, b in enumerate(blocks) if np.isin(b[row], block[row]).any()]
            assert found[row, i] == seen[0] if exact else found[row, i] <= seen[0]


def test_the_reference_gradient_equals_finite_differences():
    arrays = [a.astype(np.float64) for a in inputs(batch=1, queries=6, keys=6, heads=2)]
    rng = np.random.default_rng(9)
    d_out, d_lse = rng.standard_normal((1, 6, 2, 6)), rng.standard_normal((1, 6, 2))

    def loss(arrays):
        out, lse = reference.mla_prefill(*arrays, scale=SCALE)
        return (out * d_out).sum() + (lse * d_lse).sum()

    gradients = reference.backward(*arrays, d_out, d_lse, scale=SCALE)
    for n, gradient in enumerate(gradients):
        direction = rng.standard_normal(arrays[n].shape)
        ends = []
        for sign in (1, -1):
            moved = list(arrays)
            moved[n] = arrays[n] + sign * 1e-5 * direction
            ends.append(loss(moved))
        assert abs((gradient * direction).sum() - (ends[0] - ends[1]) / 2e-5) < 1e-7


def test_gradients_flow_through_both_results():
    arrays = [jnp.asarray(a) for a in inputs()]
    marks = packed(2, 37)
    rng = np.random.default_rng(1)
    d_out = rng.standard_normal((2, 37, 3, 6)).astype(np.float32)
    d_lse = rng.standard_normal((2, 37, 3)).astype(np.float32)

    def loss(*arrays):
        out, lse = mla_prefill(*arrays, scale=SCALE, q_segments=marks, k_segments=marks)
        return (out * d_out).sum() + (lse * d_lse).sum()

    exact = {"scale": SCALE, "q_segments": marks, "k_segments": marks}
    expected = reference.backward(*arrays, d_out, d_lse, **exact)
    assert_close(jax.jit(jax.grad(loss, argnums=tuple(range(5))))(*arrays), expected, 1e-5)


def test_merge_is_attention_over_both_parts():
    arrays = inputs()
    whole = reference.mla_prefill(*arrays, scale=SCALE)
    rng = np.random.default_rng(1)
    d_out = rng.standard_normal((2, 37, 3, 6)).astype(np.float32)
    d_lse = rng.standard_normal((2, 37, 3)).astype(np.float32)
    marks = (np.arange(37) >= 20).astype(np.int32)[None].repeat(2, 0)

    def union(*arrays):
        # Every query against the keys of one mark: early queries see nothing of the second.
        parts = [
            mla_prefill(*arrays, scale=SCALE, q_segments=np.full((2, 37), mark), k_segments=marks)
            for mark in (0, 1)
        ]
        return merge(*parts[0], *parts[1])

    result, pullback = jax.vjp(union, *map(jnp.asarray, arrays))
    assert_close(result, whole)
    expected = reference.backward(*arrays, d_out, d_lse, scale=SCALE)
    assert_close(pullback((jnp.asarray(d_out), jnp.asarray(d_lse))), expected, 1e-5)


def test_memory_grows_linearly_with_the_sequence():
    def scratch(tokens):
        shapes = [(1, tokens, 2, 16), (1, tokens, 2, 8), (1, tokens, 2, 16)]
        shapes += [(1, tokens, 8), (1, tokens, 2, 16)]
        arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]

        def loss(*arrays):
            return mla_prefill(*arrays, scale=SCALE)[0].sum()

        compiled = jax.jit(jax.grad(loss, argnums=tuple(range(5)))).lower(*arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert scratch(4096) < 2.5 * scratch(2048)


def test_a_checkpoint_that_keeps_the_results_runs_no_second_forward():
    arrays = inputs()

    def loss(*arrays):
        return mla_prefill(*arrays, scale=SCALE)[0].sum()

    keep = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    counts = []
    for policy in (keep, None):
        program = jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy)))(*arrays)
        counts.append(str(program).count("reduce_max"))
    assert counts[0] < counts[1]


def test_mistakes_are_named():
    arrays = inputs()
    with pytest.raises(ValueError, match="come together"):
        mla_prefill(*arrays, scale=1.0, q_segments=np.zeros((2, 37), np.int32))
    with pytest.raises(ValueError, match=r"k_segments must be int32 \[2, 37\], got \(2, 36\)"):
        mla_prefill(*arrays, scale=1.0, q_segments=np.zeros((2, 37)), k_segments=np.ones((2, 36)))
    with pytest.raises(ValueError, match=r"k_rope \[B, S, R\]"):
        mla_prefill(*arrays[:3], arrays[3][:, :, None], arrays[4], scale=1.0)
    with pytest.raises(ValueError, match=r"q_offset must be a number or \[2\], got \(3,\)"):
        mla_prefill(*arrays, scale=1.0, q_offset=np.zeros(3, np.int32))
    with pytest.raises(UnsupportedError, match="no implementation 'cudnn'"):
        mla_prefill(*arrays, scale=1.0, implementation="cudnn")
