"""Block FP8: quantisers byte for byte, products and gradients of every form against float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepzoo.kernels import block_fp8
from deepzoo.kernels.block_fp8 import (
    FP8_MAX,
    dequantize,
    matmul,
    matmul_fp8,
    quantize,
    quantize_activations,
    reference,
    triton,
)
from deepzoo.kernels.dispatch import UnsupportedError

F8 = ml_dtypes.float8_e4m3fn
BF16 = ml_dtypes.bfloat16


def weights(rows, columns):
    rng = np.random.default_rng(rows)
    spread = np.exp(rng.standard_normal((rows, columns)) * 2)  # blocks of very different size
    return (rng.standard_normal((rows, columns)) * spread).astype(np.float32)


def quantised(n, k):
    """A weight as NumPy: its values and scales."""
    return reference.quantize(weights(n, k))


def rows(m, k, dtype=BF16):
    return np.random.default_rng(m + k).standard_normal((m, k)).astype(dtype)


def distance(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.isfinite(got).all()
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("shape", [(128, 128), (130, 257), (576, 100), (1, 1)])
def test_bytes_and_scales_equal_the_reference(shape):
    w = weights(*shape)
    values, scale = quantize(jnp.asarray(w))
    expected, expected_scale = reference.quantize(w)
    # XLA may divide by a constant through its reciprocal, one unit in the last place away.
    assert np.allclose(np.asarray(scale), expected_scale, rtol=2e-7, atol=0)
    same = np.asarray(values).view(np.uint8) == expected.view(np.uint8)
    assert same.mean() > 0.9995
    wide = reference.dequantize(np.asarray(values), np.asarray(scale))
    assert np.allclose(np.asarray(dequantize(values, scale, jnp.float32)), wide, rtol=2e-7, atol=0)
    # half a step of e4m3 (2^-4 relative), or of its smallest number, 2^-9 of the scale
    step = np.maximum(
        np.abs(w) / 16, np.repeat(np.repeat(scale, 128, 0), 128, 1)[: len(w), : w.shape[1]] / 1024
    )
    assert (np.abs(wide - w) <= step * 1.001).all()


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("shape", [(3, 128), (5, 300), (2, 1)])
def test_activations_are_quantised_per_128_of_a_row(shape, ue8m0):
    x = weights(*shape)
    values, scale = quantize_activations(jnp.asarray(x), ue8m0=ue8m0)
    expected, expected_scale = reference.quantize_activations(x, ue8m0=ue8m0)
    assert scale.shape == expected_scale.shape and scale.dtype == jnp.float32
    assert np.allclose(np.asarray(scale), expected_scale, rtol=0 if ue8m0 else 2e-7, atol=0)
    same = np.asarray(values).view(np.uint8) == expected.view(np.uint8)
    assert same.mean() > 0.995
    wide = reference.dequantize_activations(np.asarray(values), np.asarray(scale))
    assert distance(wide, x) < 0.04


def test_a_zero_block_stays_zero():
    w = weights(256, 128)
    w[:128] = 0
    values, scale = quantize(jnp.asarray(w))
    assert scale[0, 0] == 1.0
    assert (np.asarray(dequantize(values, scale, jnp.float32))[:128] == 0).all()
    values, scale = quantize_activations(jnp.asarray(w))
    assert (np.asarray(scale)[:128] == 1.0).all() and (np.asarray(values)[:128] == 0).all()


def test_activations_near_zero_become_zeros_and_what_is_not_a_number_stays_so():
    x = jnp.asarray([[1e-37] * 128, [jnp.nan] + [1.0] * 127], jnp.float32)
    values, scale = quantize_activations(x)
    assert scale[0, 0] == 1.0 and (np.asarray(values[0], np.float32) == 0).all()
    assert np.isnan(np.asarray(values[1, 0], np.float32))


@pytest.mark.parametrize("exact", [1.0, 2.0**-7, 2.0**5])
def test_ue8m0_scales_are_powers_of_two_that_hold_the_block(exact):
    w = weights(256, 256)
    w[:128, :128] *= 448 * exact / np.abs(w[:128, :128]).max()  # a scale that is one already
    values, scale = quantize(jnp.asarray(w), ue8m0=True)
    exponent = np.log2(np.asarray(scale))
    assert np.array_equal(exponent, np.round(exponent))
    blocks = np.abs(w).reshape(2, 128, 2, 128).max(axis=(1, 3))
    assert (blocks <= np.asarray(scale) * FP8_MAX * (1 + 1e-7)).all()
    assert (blocks > np.asarray(scale) * FP8_MAX / 2.001).all()
    assert np.isfinite(np.asarray(values).astype(np.float32)).all()
    expected, expected_scale = reference.quantize(w, ue8m0=True)
    assert np.array_equal(np.asarray(scale), expected_scale)
    assert np.array_equal(np.asarray(values).view(np.uint8), expected.view(np.uint8))


def test_matmul_is_the_product_with_the_dequantised_weight():
    w, scale = quantize(jnp.asarray(weights(130, 257)))
    x = np.random.default_rng(5).standard_normal((3, 257)).astype(np.float32)
    wide = reference.dequantize(np.asarray(w).astype(F8), np.asarray(scale))
    expected = x.astype(np.float64) @ wide.T
    error = np.abs(np.asarray(matmul(jnp.asarray(x), w, scale)) - expected).max()
    assert error < 1e-5 * np.abs(expected).max()
    gradient = jax.grad(lambda x: matmul(x, w, scale).sum())(jnp.asarray(x))
    assert np.abs(np.asarray(gradient) - wide.sum(axis=0)).max() < 1e-5 * np.abs(wide).sum(0).max()


def test_keeping_activations_gives_the_bits_of_dequantising_by_hand():
    """What the zoo's parity rests on: no other arithmetic than a plain product."""
    w, scale = (jnp.asarray(a) for a in quantised(200, 300))
    x = jnp.asarray(rows(6, 300)).reshape(2, 3, 300)
    by_hand = jax.lax.dot_general(
        x, dequantize(w, scale), (((2,), (1,)), ((), ())), preferred_element_type=jnp.float32
    ).astype(x.dtype)
    assert np.array_equal(np.asarray(matmul(x, w, scale)), np.asarray(by_hand))


@pytest.mark.parametrize(("m", "n", "k"), [(5, 130, 257), (64, 576, 384), (1, 8, 16)])
def test_promoted_product_in_xla_is_exact_to_float32(m, n, k):
    x, x_scale = reference.quantize_activations(rows(m, k, np.float32))
    w, w_scale = quantised(n, k)
    out = matmul_fp8(x, x_scale, w, w_scale, dtype=jnp.float32, implementation="xla")
    assert distance(out, reference.matmul_fp8(x, x_scale, w, w_scale)) < 1e-6


@pytest.mark.parametrize("form", ["xla", "auto"])
def test_quantising_activations_is_the_product_of_both_quantised(form):
    w, scale = quantised(200, 300)
    x = rows(6, 300)
    values, factors = quantize_activations(jnp.asarray(x))
    expected = reference.matmul_fp8(np.asarray(values), np.asarray(factors), w, scale)
    out = matmul(x.reshape(2, 3, 300), w, scale, activations="quantize", implementation=form)
    assert out.shape == (2, 3, 200) and out.dtype == jnp.bfloat16
    assert distance(out.reshape(6, 200), expected) < 3e-3
    # and not the product of the kept ones, from which it is some percent away
    assert 0.01 < distance(out.reshape(6, 200), reference.matmul(x, w, scale)) < 0.06


@pytest.mark.parametrize("bits", [True, False])
def test_every_float8_is_widened_exactly(bits):
    patterns = np.arange(256, dtype=np.uint8)
    want = patterns.view(F8).astype(np.float32)
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        got, factor = triton.widen(jnp.asarray(patterns.view(np.int8 if bits else F8)), dtype)
        wide = np.asarray(got.astype(jnp.float32)) * factor
        assert np.array_equal(wide, want, equal_nan=True)


SHAPES = [(1, 8, 16), (37, 130, 257), (70, 576, 384), (130, 128, 96)]


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_triton_keeps_rows_as_exactly_as_xla(m, n, k, native, monkeypatch):
    if native:  # GPUs that have the type load it as it is
        monkeypatch.setattr(triton, "compute_capability", lambda: (9, 0))
    w, scale = quantised(n, k)
    x, g = rows(m, k), rows(m, n)
    out = triton.matmul(x, w, scale, interpret=True)
    want = reference.matmul(x, w, scale)
    plain = matmul(x, w, scale, implementation="xla")
    assert distance(out, want) < min(1.5 * distance(plain, want), 1e-2)
    back = triton.matmul(g, w, scale, transposed=True, interpret=True)
    wide = reference.dequantize(w, scale)
    assert distance(back, g.astype(np.float64) @ wide) < 4e-3
    assert np.array_equal(out, triton.matmul(x, w, scale, interpret=True))


@pytest.mark.parametrize("dtype", [BF16, np.float16])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_triton_promotes_quantised_rows(m, n, k, dtype):
    x, x_scale = reference.quantize_activations(rows(m, k, np.float32))
    w, w_scale = quantised(n, k)
    w_scale = w_scale / np.float32(np.abs(w_scale).max())  # float16 results stay finite
    out = matmul_fp8(x, x_scale, w, w_scale, dtype=dtype, implementation="triton", interpret=True)
    assert out.dtype == dtype
    assert distance(out, reference.matmul_fp8(x, x_scale, w, w_scale)) < 3e-3


def test_triton_gives_a_row_the_same_bits_in_any_company():
    w, scale = quantised(130, 257)
    x = rows(37, 257)
    together = triton.matmul(x, w, scale, interpret=True, tile=triton.tile_for(37, 130))
    for row in (0, 17, 36):
        alone = np.zeros_like(x)
        alone[3] = x[row]
        assert np.array_equal(triton.matmul(alone, w, scale, interpret=True)[3], together[row])


@pytest.mark.parametrize("activations", ["keep", "quantize"])
@pytest.mark.parametrize(("form", "interpret"), [("auto", False), ("xla", False), ("triton", True)])
def test_gradient_is_the_dequantised_weights_and_none_reaches_them(activations, form, interpret):
    w, scale = (jnp.asarray(a) for a in quantised(130, 257))
    x, g = rows(6, 257).reshape(2, 3, 257), rows(6, 130).reshape(2, 3, 130)

    def loss(x, scale):
        y = matmul(x, w, scale, activations=activations, implementation=form, interpret=interpret)
        return (y.astype(jnp.float32) * g.astype(np.float32)).sum()

    to_x, to_scale = jax.grad(loss, argnums=(0, 1))(jnp.asarray(x), scale)
    want = g.astype(np.float64) @ reference.dequantize(np.asarray(w), np.asarray(scale))
    assert to_x.dtype == jnp.bfloat16 and distance(to_x, want) < 5e-3
    assert (np.asarray(to_scale) == 0).all()


def test_rows_map_over_a_batch():
    w, scale = (jnp.asarray(a) for a in quantised(24, 40))
    x = jnp.asarray(rows(6, 40)).reshape(2, 3, 40)
    for activations in ("keep", "quantize"):
        each = jax.vmap(lambda x, how=activations: matmul(x, w, scale, activations=how))(x)
        assert np.array_equal(each, matmul(x, w, scale, activations=activations))


def sizes_of(shares, total):
    edges = np.floor(np.cumsum(shares) / max(sum(shares), 1) * total).astype(np.int32)
    return np.diff(edges, prepend=0).astype(np.int32)


@given(
    shares=st.lists(st.integers(0, 9), min_size=3, max_size=3),
    spare=st.integers(0, 5),
    keep=st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_grouped_product_equals_the_reference(shares, spare, keep):
    m, n, k = 21, 130, 140
    sizes = sizes_of(shares, m - spare)
    x = rows(m, k, np.float32)
    w, w_scale = map(np.stack, zip(*(quantised(n, k) for _ in sizes), strict=True))
    w[1] = w[1][::-1]
    real = int(sizes.sum())
    x[real:] = np.nan
    out = np.asarray(
        block_fp8.grouped_matmul(
            x, w, w_scale, sizes, activations="keep" if keep else "quantize", implementation="xla"
        )
    )
    if keep:
        values, factors = x.astype(np.float64), np.ones((m, 2))
    else:
        values, factors = (np.asarray(a) for a in quantize_activations(jnp.asarray(x)))
    want = reference.grouped_matmul_fp8(values, factors, w, w_scale, sizes)
    assert (out[real:] == 0).all()
    if real:
        assert distance(out, want) < 1e-5


def test_grouped_gradient_is_that_of_kept_rows():
    sizes = np.array([4, 0, 7], np.int32)
    w, w_scale = map(np.stack, zip(*(quantised(130, 140) for _ in sizes), strict=True))
    x, g = rows(12, 140, np.float32), rows(12, 130, np.float32)
    x[11] = np.nan

    def loss(x):
        y = block_fp8.grouped_matmul(x, w, w_scale, sizes, activations="quantize")
        return (y * g).sum()

    to_x = np.asarray(jax.grad(loss)(jnp.asarray(x)))
    want = np.zeros((12, 140))
    want[:4] = g[:4].astype(np.float64) @ reference.dequantize(w[0], w_scale[0])
    want[4:11] = g[4:11].astype(np.float64) @ reference.dequantize(w[2], w_scale[2])
    assert distance(to_x, want) < 1e-5


def test_wrong_arguments_are_told_one_by_one():
    w, scale = (jnp.asarray(a) for a in quantised(130, 257))
    x = jnp.zeros((3, 257), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"float32 \(2, 3\).*got float32 \(1, 3\)"):
        matmul(x, w, scale[:1])
    with pytest.raises(ValueError, match=r"w must be float8_e4m3fn \[N, K\]"):
        matmul(x, w.astype(jnp.bfloat16), scale)
    with pytest.raises(ValueError, match=r"x must be \[..., K\].*\(3, 256\)"):
        matmul(x[:, :256], w, scale)
    with pytest.raises(ValueError, match="'keep' or 'quantize', got 'both'"):
        matmul(x, w, scale, activations="both")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"x must be float8_e4m3fn.*"):
        matmul_fp8(x, jnp.ones((3, 3)), w, scale)
    values, factors = quantize_activations(x)
    with pytest.raises(ValueError, match=r"x_scale must be float32 \(3, 3\)"):
        matmul_fp8(values, factors[:, :2], w, scale)
    with pytest.raises(ValueError, match=r"group_sizes must be \[E\]"):
        block_fp8.grouped_matmul(x, w[None], scale[None], jnp.zeros(2, jnp.int32))


def test_forms_that_cannot_run_list_every_reason():
    w, scale = (jnp.asarray(a) for a in quantised(130, 257))
    values, factors = quantize_activations(jnp.zeros((3, 257), jnp.float32))
    with pytest.raises(UnsupportedError, match=r"Hopper.*; .*whole 128s.*; the result is float32"):
        matmul_fp8(values, factors, w, scale, dtype=jnp.float32, implementation="mosaic")
    with pytest.raises(UnsupportedError, match="float32, not bfloat16"):
        matmul(jnp.zeros((3, 257)), w, scale, implementation="triton", interpret=True)
    with pytest.raises(UnsupportedError, match="no implementation 'mosaic'"):
        matmul(jnp.zeros((3, 257), jnp.bfloat16), w, scale, implementation="mosaic")
