"""Quantise, dequantise and multiply in XLA; the dequantised matrix exists only inside the matmul.

M rows of x  N output width  K input width
"""

import jax
import jax.numpy as jnp

BLOCK = 128
FP8_MAX = 448.0  # largest finite float8_e4m3fn


def _spread(scale: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeats a scale for every element of its block, cutting partial edge blocks."""
    rows, columns = shape[-2:]
    wide = jnp.repeat(jnp.repeat(scale, BLOCK, axis=-2), BLOCK, axis=-1)
    return wide[..., :rows, :columns]


def dequantize(w: jax.Array, scale: jax.Array, dtype=jnp.bfloat16) -> jax.Array:
    """float8_e4m3fn [..., N, K] times its float32 block scales [..., ceil(N/128), ceil(K/128)], in
    `dtype`."""
    return (w.astype(jnp.float32) * _spread(scale, w.shape)).astype(dtype)


def quantize(w: jax.Array, *, ue8m0: bool = False) -> tuple[jax.Array, jax.Array]:
    """Rounds [..., N, K] to float8_e4m3fn with one float32 scale per 128 x 128 block, amax / 448.

    Args:
        w: float array; a block of zeros gets scale 1.
        ue8m0: round scales up to powers of two, as V3.1 stores them.

    Returns:
        The float8 array of the same shape, and its scales [..., ceil(N/128), ceil(K/128)].
    """
    rows, columns = w.shape[-2:]
    pad = [(0, 0)] * (w.ndim - 2) + [(0, -rows % BLOCK), (0, -columns % BLOCK)]
    blocks = jnp.pad(w.astype(jnp.float32), pad)
    blocks = blocks.reshape(
        *w.shape[:-2], blocks.shape[-2] // BLOCK, BLOCK, blocks.shape[-1] // BLOCK, BLOCK
    )
    amax = jnp.abs(blocks).max(axis=(-3, -1))
    scale = jnp.where(amax > 0, amax / FP8_MAX, 1.0)
    if ue8m0:
        scale = jnp.exp2(jnp.ceil(jnp.log2(scale)))
    scaled = w.astype(jnp.float32) / _spread(scale, w.shape)
    return jnp.clip(scaled, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn), scale


def matmul(x: jax.Array, w: jax.Array, scale: jax.Array) -> jax.Array:
    """x [..., K] times a quantised weight [N, K] transposed -> [..., N] in x's dtype, float32
    accumulation.

    Differentiable in x; the quantised weight is frozen.
    """
    w, scale = jax.lax.stop_gradient((w, scale))
    dense = dequantize(w, scale, x.dtype)
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, dense, contract, preferred_element_type=jnp.float32).astype(
        x.dtype
    )
