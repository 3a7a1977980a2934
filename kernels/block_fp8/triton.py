"""Products with block FP8 weights in Pallas-Triton: NVIDIA GPUs from sm_80 on, interpretable.

Float8 values are exact in bfloat16 and float16, so a tile is widened as it lies and multiplied by
the tensor cores; each 128 of the sum is then multiplied by its scales and added in float32. So a
weight is never rounded a second time, unlike in a product with the dequantised matrix, and rows
that are float8 themselves give the promoted sums of the V3 report (arXiv 2412.19437), 3.3.2.
M rows  N output width  K input width
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from deepzoo.kernels.dispatch import compute_capability

BLOCK = 128
_WHOLE = pl.BlockSpec(memory_space=pl.ANY)


class Tile(NamedTuple):
    """rows, columns: of the result, powers of two; columns at most 128, so that one scale covers
    them. depth: of a step, 64 or 128. warps, stages: of Triton."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def tile_for(m: int, n: int) -> Tile:
    """Narrow tiles for few rows, where every core must read weights; large ones for many."""
    if m > 64:
        return Tile(128, 128, 64, 8, 3)
    rows = max(16, 1 << (m - 1).bit_length())
    columns = 32 if n <= 64 * 108 else 64
    return Tile(rows, columns, 128, 4, 4)


def matmul(
    x: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    x_scale: jax.Array | None = None,
    *,
    transposed: bool = False,
    dtype=None,
    interpret: bool = False,
    tile: Tile | None = None,
) -> jax.Array:
    """x [M, K] times w [N, K] transposed -> [M, N]; with `transposed`, x [M, N] times w -> [M, K].

    Args:
        x: bfloat16 or float16, or float8_e4m3fn with `x_scale`.
        w, w_scale: float8_e4m3fn and its float32 scales [ceil(N / 128), ceil(K / 128)].
        x_scale: float32 [M, ceil(K / 128)] for float8 rows (then never transposed).
        transposed: the gradient to x, w as it lies.
        dtype: of the result; x's by default.
        interpret: run in Pallas's interpreter.
        tile: overrides the choice.
    """
    rows = x.shape[0]
    columns, depth = w.shape[::-1] if transposed else w.shape
    dtype = dtype or x.dtype
    if rows == 0:
        return jnp.zeros((0, columns), dtype)
    tile = tile or tile_for(rows, columns)
    quantised = x_scale is not None
    product_dtype = jnp.bfloat16 if quantised else x.dtype
    # GPUs before sm_89 lack the type, and Triton's compiler aborts the process where it meets it.
    capability = compute_capability()
    bits = capability is None or capability < (8, 9)

    def plain(a):
        as_bits = bits and a.dtype == jnp.float8_e4m3fn
        return jax.lax.bitcast_convert_type(a, jnp.int8) if as_bits else a

    def kernel(*refs):
        _kernel(
            *refs,
            tile=tile,
            shape=(rows, columns, depth),
            transposed=transposed,
            quantised=quantised,
            product_dtype=product_dtype,
        )

    arrays = [plain(x), plain(w), w_scale] + ([x_scale] if quantised else [])
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, columns), dtype),
        grid=(pl.cdiv(rows, tile.rows) * pl.cdiv(columns, tile.columns),),
        in_specs=[_WHOLE] * len(arrays),
        out_specs=_WHOLE,
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="block_fp8_matmul",
    )(*arrays)


def widen(values: jax.Array, dtype) -> tuple[jax.Array, float]:
    """A float8 tile, or its bits as int8, in `dtype`, and the factor that the result still lacks.

    The bits shifted left by 7 are a float16 smaller by 2 ** 8, subnormals included; only the
    pattern of NaN needs care.
    """
    if values.dtype != jnp.int8:
        return values.astype(dtype), 1.0
    wide = values.astype(jnp.int16)
    half = jax.lax.bitcast_convert_type(((wide & 127) << 7) | (wide & -32768), jnp.float16)
    return jnp.where((wide & 127) == 127, jnp.nan, half.astype(jnp.float32)).astype(dtype), 256.0


def _at(ref, rows, columns):
    shape = (rows.shape[0], columns.shape[0])
    return ref.at[jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(columns[None, :], shape)]


def _load(ref, rows, columns, keep):
    """A tile; zeros where `keep` (None, or a mask that broadcasts) is false."""
    if keep is None:
        return plt.load(_at(ref, rows, columns))
    mask = jnp.broadcast_to(keep, (rows.shape[0], columns.shape[0]))
    # An integer zero cannot become a float8 in Triton.
    other = jnp.zeros(mask.shape, jnp.float32).astype(ref.dtype)
    return plt.load(_at(ref, rows, columns), mask=mask, other=other)


def _kernel(*refs, tile: Tile, shape, transposed, quantised, product_dtype):
    """One tile of the result."""
    rows, columns, depth = shape
    x_ref, w_ref, w_scale_ref, *more, out_ref = refs
    across, down = pl.cdiv(columns, tile.columns), pl.cdiv(rows, tile.rows)
    # Neighbouring programs run down 8 row tiles, so that they share columns in the cache.
    band = min(8, down)
    program = pl.program_id(0)
    first = program // (band * across) * band
    height = jnp.minimum(down - first, band)
    inside = jax.lax.rem(program, band * across)
    m0 = (first + jax.lax.rem(inside, height)) * tile.rows
    n0 = inside // height * tile.columns

    ms = m0 + jax.lax.broadcasted_iota(jnp.int32, (tile.rows,), 0)
    ns = n0 + jax.lax.broadcasted_iota(jnp.int32, (tile.columns,), 0)
    safe = jnp.minimum(ms, rows - 1)  # spare rows read the last one again
    keep_n = None if columns % tile.columns == 0 else ns < columns
    ragged = depth % tile.depth != 0

    def step(i, total):
        ks = i * tile.depth + jax.lax.broadcasted_iota(jnp.int32, (tile.depth,), 0)
        keep_k = ks < depth if ragged else None
        x = _load(x_ref, safe, ks, None if keep_k is None else keep_k[None, :])
        keep_w = None
        for keep, own in ((keep_k, transposed), (keep_n, not transposed)):
            if keep is not None:
                keep = keep[:, None] if own else keep[None, :]
                keep_w = keep if keep_w is None else keep_w & keep
        first_w, second_w = (ks, ns) if transposed else (ns, ks)
        w, factor = widen(_load(w_ref, first_w, second_w, keep_w), product_dtype)
        block = i * tile.depth // BLOCK
        where = (block, n0 // BLOCK) if transposed else (n0 // BLOCK, block)
        scale = w_scale_ref[where] * factor
        if not quantised:
            return total + plt.dot(x, w, trans_b=not transposed) * scale
        x, factor = widen(x, product_dtype)
        of_rows = plt.load(more[0].at[safe, jnp.full_like(safe, block)]) * (scale * factor)
        return total + plt.dot(x, w, trans_b=True) * of_rows[:, None]

    total = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    total = jax.lax.fori_loop(0, pl.cdiv(depth, tile.depth), step, total)
    mine = jnp.broadcast_to((ms < rows)[:, None] & (ns < columns)[None, :], total.shape)
    plt.store(_at(out_ref, ms, ns), total.astype(out_ref.dtype), mask=mine)
