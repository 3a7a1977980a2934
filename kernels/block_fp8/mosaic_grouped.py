"""Sorted rows times per-group FP8 matrices, FP8 x FP8, dropless, for Hopper (Mosaic GPU).

The kernel is `mosaic.multiply`; here is the list of tiles it works through. TMA moves rows in
eights, so the groups' rows are first gathered to starts that are multiples of eight (at most 7
spare rows a group, against half a tile of waste that tiles at fixed places would cost); the result
is stored at the rows' own places, exactly as many as there are. Rows after the last group are one
more group, whose tiles are zeros.
M rows  N output width  K input width  E groups
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from deepzoo.kernels.block_fp8.mosaic import BLOCK, Config, Tile, config, multiply
from deepzoo.kernels.block_fp8.xla import quantize_activations

_ALIGN = 8


def grouped_config(m: int, n: int, groups: int) -> Config:
    """Tiles of 128 rows where groups have that many, else of 64 rows and twice the columns."""
    many = m > 192 * groups
    columns = BLOCK if many else 2 * BLOCK
    return config(BLOCK if many else 64, columns, 2 if n % (2 * columns) == 0 else 1)


def layout(group_sizes: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Where each group's rows lie once their starts are multiples of eight.

    Returns:
        The starts, int32 [E], and for each of the padded rows the row it is a copy of, int32.
    """
    sizes = group_sizes.astype(jnp.int32)
    padded = (sizes + _ALIGN - 1) // _ALIGN * _ALIGN
    ends = jnp.cumsum(padded)
    starts = ends - padded
    total = (rows + (_ALIGN - 1) * sizes.shape[0] + _ALIGN - 1) // _ALIGN * _ALIGN
    place = jnp.arange(total, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(ends, place, side="right"), sizes.shape[0] - 1)
    inside = jnp.minimum(place - starts[group], jnp.maximum(sizes[group] - 1, 0))
    first = jnp.cumsum(sizes) - sizes
    return starts, jnp.clip(first[group] + inside, 0, max(rows - 1, 0)).astype(jnp.int32)


def schedule(
    group_sizes: jax.Array, starts: jax.Array, rows: int, height: int
) -> tuple[jax.Array, ...]:
    """The tiles: group, first row in the padded rows, first row in the result, rows, is it zeros.

    Each int32 [ceil(M / height) + E]; unused entries have no rows.
    """
    groups = group_sizes.shape[0]
    sizes = group_sizes.astype(jnp.int32)
    spare = jnp.maximum(rows - sizes.sum(), 0)
    sizes = jnp.concatenate([sizes, spare[None]])
    starts = jnp.concatenate([starts, jnp.zeros((1,), jnp.int32)])
    first = jnp.cumsum(sizes) - sizes
    tiles = (sizes + height - 1) // height
    ends = jnp.cumsum(tiles)
    index = jnp.arange(pl.cdiv(rows, height) + groups, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(ends, index, side="right"), groups).astype(jnp.int32)
    inside = (index - (ends - tiles)[group]) * height
    count = jnp.clip(sizes[group] - inside, 0, height)
    zeros = (group == groups).astype(jnp.int32)
    return (
        jnp.minimum(group, groups - 1),
        jnp.where(zeros == 1, 0, starts[group] + inside),
        first[group] + inside,
        count,
        zeros,
    )


def matmul(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    group_sizes: jax.Array,
    dtype: Any,
    *,
    interpret: Any = None,
    cut: Config | None = None,
) -> jax.Array:
    """e4m3 rows [M, K] times their group's e4m3 matrix [E, N, K] transposed -> [M, N] in `dtype`.

    Args:
        x, x_scale: rows sorted by group, and their float32 scales [M, K / 128].
        w, w_scale: matrices, and their float32 scales [E, ceil(N / 128), K / 128].
        group_sizes: int32 [E].
        dtype: bfloat16 or float16.
        interpret: `plgpu.InterpretGPUParams` to run on a CPU.
        cut: overrides the choice of tiles.
    """
    m, (groups, n, k) = x.shape[0], w.shape
    cut = cut or grouped_config(m, n, groups)
    starts, source = layout(group_sizes, m)
    table = schedule(group_sizes, starts, m, cut.rows)
    blocks = k // BLOCK

    def tile(refs: Any, index: jax.Array) -> Tile:
        group, first, target, count, zeros = (ref[index] for ref in refs)
        work = (count > 0) & (zeros == 0)
        todo = jnp.where(work, jnp.int32(blocks), jnp.int32(0))
        return Tile(group, pl.multiple_of(first, _ALIGN), target, count, todo)

    scales = jnp.pad(x_scale[source], ((0, cut.rows), (0, 0))).T
    return multiply(
        cut, table[0].shape[0], tile, x[source], scales, w, w_scale, table, m, dtype, interpret
    )


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    group_sizes: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Rows in bfloat16 or float16, quantised on the way in: the entry for `kernels.grouped_matmul`.

    `interpret` runs the kernel in the GPU interpreter, which watches for races.
    """
    values, scales = quantize_activations(x)
    how = plgpu.InterpretGPUParams(detect_races=True) if interpret else None
    return matmul(values, scales, w, w_scale, group_sizes, x.dtype, interpret=how)
