"""Grouped-query attention against its float64 reference, every form."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepzoo.kernels.dispatch import UnsupportedError
from deepzoo.kernels.gqa_attention import gqa_attention, gqa_decode, reference, triton
from deepzoo.kernels.mla_prefill.triton import Tile

SCALE = 0.3
MARKS = np.array([[0] * 4 + [1] * 7 + [2] * 12, [0] * 15 + [1] * 8], np.int32)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def inputs(tokens=23, heads=6, groups=2, size=16):
    shapes = [(2, tokens, heads, size), *[(2, tokens, groups, size)] * 2]
    return [normal(*s, seed=n) for n, s in enumerate(shapes)]


def assert_close(out, expected, bound=2e-6):
    a, b = np.asarray(out, np.float64), np.asarray(expected)
    assert a.shape == b.shape
    assert np.abs(a - b).max() < bound * max(1.0, np.abs(b).max())


@pytest.mark.parametrize("capacity", [24, 600])
def test_decode_equals_the_reference(capacity):
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


def test_the_reference_of_whole_sequences_is_that_of_decode():
    q, k, v = inputs()
    lengths = np.broadcast_to(np.arange(1, 24), (2, 23))
    expected = reference.gqa_decode(q, k, v, lengths, scale=SCALE)
    assert_close(reference.gqa_attention(q, k, v, scale=SCALE), expected, 1e-12)


@pytest.mark.parametrize("form", ["auto", "triton"])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("segments", [None, MARKS])
def test_values_and_gradients_equal_the_reference(form, groups, segments):
    arrays = inputs(groups=groups)
    d_out = normal(*arrays[0].shape, seed=9)
    options = {"scale": SCALE, "segments": segments}

    @jax.jit
    def both(*arrays):
        attend = partial(gqa_attention, **options, implementation=form, interpret=form != "auto")
        out, pullback = jax.vjp(attend, *arrays)
        return out, *pullback(d_out)

    out, *gradients = both(*arrays)
    assert_close(out, reference.gqa_attention(*arrays, **options))
    exact = reference.backward(*arrays, d_out, **options)
    for found, expected in zip(gradients, exact, strict=True):
        assert_close(found, expected, 1e-5)


def test_bfloat16_kernels_are_as_near_as_the_xla_form():
    arrays = [jnp.asarray(a, jnp.bfloat16) for a in inputs(tokens=96, size=128)]
    exact = reference.gqa_attention(*(np.asarray(a, np.float64) for a in arrays), scale=SCALE)
    found, _ = triton.forward(*arrays, None, scale=SCALE, interpret=True, tile=Tile(32, 32, 4, 2))
    plain = gqa_attention(*arrays, scale=SCALE, implementation="xla")
    errors = [
        np.linalg.norm(np.asarray(a, np.float64) - exact) / np.linalg.norm(exact)
        for a in (found, plain)
    ]
    assert errors[0] < 1e-2
    assert errors[0] < 1.5 * errors[1]


def test_whole_sequences_in_bfloat16_go_to_cudnn_where_there_is_a_gpu(monkeypatch):
    # There is neither here: the process pretends, and lowering shows what would be called.
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    arrays = [jnp.asarray(a, jnp.bfloat16) for a in inputs(tokens=24)]

    def calls(backend, dtype=jnp.bfloat16, segments=None):
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        jax.clear_caches()

        def loss(*arrays):
            return gqa_attention(*arrays, scale=SCALE, segments=segments).astype(float).sum()

        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(
            *(a.astype(dtype) for a in arrays)
        )
        found = {}
        for platform in ("cpu", "cuda") if segments is None and dtype != jnp.float32 else ("cpu",):
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            found[platform] = sorted(set(re.findall(r"custom_call @(__cudnn\$\w+)", text)))
        return found

    both = ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    assert calls("gpu") == {"cpu": [], "cuda": both}
    assert calls("gpu", jnp.float32) == {"cpu": []}
    assert calls("gpu", segments=np.zeros((2, 24), np.int32)) == {"cpu": []}
    monkeypatch.undo()
    jax.clear_caches()
    with pytest.raises(UnsupportedError, match=r"only where there is a GPU; cuDNN has no segments"):
        gqa_attention(*arrays, scale=SCALE, segments=np.zeros((2, 24)), implementation="cudnn")


def test_memory_grows_linearly_with_the_sequence():
    def scratch(tokens):
        arrays = [jax.ShapeDtypeStruct((1, tokens, heads, 16), jnp.float32) for heads in (4, 2, 2)]

        def loss(*arrays):
            return gqa_attention(*arrays, scale=SCALE).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert scratch(2048) < 2.5 * scratch(1024)


def test_mistakes_are_named():
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"k and v \[B, T, G, D\]"):
        gqa_attention(q, k[..., :8], v, scale=SCALE)
    with pytest.raises(ValueError, match="4 query heads are no multiple of 3"):
        gqa_attention(q[:, :, :4], q[:, :, :3], q[:, :, :3], scale=SCALE)
    with pytest.raises(ValueError, match=r"segments must be int32 \[2, 23\], got \(2, 22\)"):
        gqa_attention(q, k, v, scale=SCALE, segments=np.zeros((2, 22)))
    with pytest.raises(UnsupportedError, match="no implementation 'mosaic'"):
        gqa_attention(q, k, v, scale=SCALE, implementation="mosaic")  # pyright: ignore[reportArgumentType]
