"""Quantise, dequantise and multiply in XLA.

M rows of x  N output width  K input width  E groups
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


def _power_of_two(scale: jax.Array) -> jax.Array:
    """The least power of two that is not smaller; by bits, since log2 rounds."""
    bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
    return jax.lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)


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
        scale = _power_of_two(scale)
    scaled = w.astype(jnp.float32) / _spread(scale, w.shape)
    return jnp.clip(scaled, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn), scale


def quantize_activations(x: jax.Array, *, ue8m0: bool = False) -> tuple[jax.Array, jax.Array]:
    """Rounds [..., K] to float8_e4m3fn with one float32 scale per 128 of a row, amax / 448 (V3
    report 3.3.2, fine-grained quantisation).

    Args:
        x: float array. A block whose scale would be below the least normal float32 gets scale 1,
            and so becomes zeros.
        ue8m0: round scales up to powers of two.

    Returns:
        The float8 array of the same shape, and its scales [..., ceil(K/128)].
    """
    columns = x.shape[-1]
    wide = x.astype(jnp.float32)
    blocks = jnp.pad(wide, [(0, 0)] * (x.ndim - 1) + [(0, -columns % BLOCK)])
    blocks = blocks.reshape(*x.shape[:-1], -(-columns // BLOCK), BLOCK)
    scale = jnp.abs(blocks).max(axis=-1) / FP8_MAX
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)
    if ue8m0:
        scale = _power_of_two(scale)
    scaled = jnp.clip(blocks / scale[..., None], -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn)
    return scaled.reshape(*x.shape[:-1], -1)[..., :columns], scale


def matmul(x: jax.Array, w: jax.Array, scale: jax.Array, *, transposed: bool = False) -> jax.Array:
    """x [M, K] times the dequantised w [N, K] transposed -> [M, N] in x's dtype, float32 sums; with
    `transposed`, x [M, N] times it as it lies. The dequantised matrix lives for this product."""
    dense = dequantize(w, scale, x.dtype)
    contract = (((x.ndim - 1,), (0 if transposed else 1,)), ((), ()))
    return jax.lax.dot_general(x, dense, contract, preferred_element_type=jnp.float32).astype(
        x.dtype
    )


def matmul_fp8(
    x: jax.Array, x_scale: jax.Array, w: jax.Array, w_scale: jax.Array, dtype
) -> jax.Array:
    """e4m3 [M, K] times e4m3 [N, K] transposed -> [M, N] in `dtype`: one product per 128 of K, each
    scaled and added in float32.

    The operands of each product are exact in bfloat16, and so are its terms in float32.
    """
    (m, k), n = x.shape, w.shape[0]
    spare = -k % BLOCK
    x, w = (jnp.pad(a, ((0, 0), (0, spare))) for a in (x, w))
    # Scales of a row block, repeated for its rows; [blocks, ...] for the scan.
    of_w = jnp.repeat(w_scale, BLOCK, axis=0)[:n].T
    parts = (
        x.reshape(m, -1, BLOCK).swapaxes(0, 1),
        w.reshape(n, -1, BLOCK).swapaxes(0, 1),
        x_scale.T,
        of_w,
    )

    def add(total, part):
        a, b, of_a, of_b = part
        sums = jax.lax.dot_general(
            a.astype(jnp.bfloat16),
            b.astype(jnp.bfloat16),
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        return total + sums * of_a[:, None] * of_b[None, :], None

    return jax.lax.scan(add, jnp.zeros((m, n), jnp.float32), parts)[0].astype(dtype)


def grouped_matmul_fp8(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    group_sizes: jax.Array,
    dtype,
) -> jax.Array:
    """e4m3 rows [M, K] times their group's e4m3 matrix [E, N, K] transposed -> [M, N] in `dtype`.

    Both sides are dequantised to float32, a group at a time, and multiplied there: the promoted sum
    but for its order.
    """
    # grouped_matmul's own module imports this one.
    from deepzoo.kernels.grouped_matmul.xla import rows_times_groups

    wide = jnp.repeat(x_scale, BLOCK, axis=-1)[:, : x.shape[1]]
    with jax.default_matmul_precision("highest"):
        out = rows_times_groups(x.astype(jnp.float32) * wide, w, w_scale, group_sizes)
    return out.astype(dtype)
