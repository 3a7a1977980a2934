"""Block FP8 against its reference, byte for byte."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from deepzoo.kernels.block_fp8 import FP8_MAX, dequantize, matmul, quantize, reference


def weights(rows, columns):
    rng = np.random.default_rng(rows)
    spread = np.exp(rng.standard_normal((rows, columns)) * 2)  # blocks of very different size
    return (rng.standard_normal((rows, columns)) * spread).astype(np.float32)


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


def test_a_zero_block_stays_zero():
    w = weights(256, 128)
    w[:128] = 0
    values, scale = quantize(jnp.asarray(w))
    assert scale[0, 0] == 1.0
    assert (np.asarray(dequantize(values, scale, jnp.float32))[:128] == 0).all()


def test_ue8m0_scales_are_powers_of_two_that_hold_the_block():
    w = weights(256, 256)
    values, scale = quantize(jnp.asarray(w), ue8m0=True)
    exponent = np.log2(np.asarray(scale))
    assert np.array_equal(exponent, np.round(exponent))
    blocks = np.abs(w).reshape(2, 128, 2, 128).max(axis=(1, 3))
    assert (blocks <= np.asarray(scale) * FP8_MAX).all()
    assert (blocks > np.asarray(scale) * FP8_MAX / 2.001).all()
    assert np.isfinite(np.asarray(values).astype(np.float32)).all()


def test_matmul_is_the_product_with_the_dequantised_weight():
    w, scale = quantize(jnp.asarray(weights(130, 257)))
    x = np.random.default_rng(5).standard_normal((3, 257)).astype(np.float32)
    wide = reference.dequantize(np.asarray(w).astype(ml_dtypes.float8_e4m3fn), np.asarray(scale))
    expected = x.astype(np.float64) @ wide.T
    error = np.abs(np.asarray(matmul(jnp.asarray(x), w, scale)) - expected).max()
    assert error < 1e-5 * np.abs(expected).max()
    gradient = jax.grad(lambda x: matmul(x, w, scale).sum())(jnp.asarray(x))
    assert np.abs(np.asarray(gradient) - wide.sum(axis=0)).max() < 1e-5 * np.abs(wide).sum(0).max()
