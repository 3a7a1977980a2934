"""Grouped matmul for CPUs: no loop over experts, and no copy of an expert's matrix.

XLA:CPU runs a loop over groups on one core and copies the matrix that it slices out before each
product. Two forms avoid both:

* few rows (decode): every row's matrix is read where it lies, by a gather inside one fused loop of
  elementwise products over all rows, which uses all cores. The sum over K is unrolled over chunks
  whose lanes fill a vector register, since XLA gathers element by element into a buffer of its own
  in front of a dot or a reduction.
* many rows (prefill, training): the first `room` rows of every group are one batched product, on
  all cores; the rows beyond go through the tile loop of xla.py, which mostly has none.

M rows  K input width  N output width  E groups  C room  J chunks  L lanes
"""

import jax
import jax.numpy as jnp

from deepzoo.kernels.grouped_matmul import loops

_CHUNKS = 32  # unrolled; the partial sums written are 1/32 of what is read
_LANES = 16  # at least: one AVX-512 register of float32


def rows_times_groups(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, *, transposed: bool = False
) -> jax.Array:
    """As `loops.rows_times_groups`, for float matrices."""
    rows, groups = x.shape[0], w.shape[0]
    if rows <= 2 * groups:
        if transposed or not _chunks(w.shape[2]):
            return loops.rows_times_groups(x, w, None, group_sizes, transposed=transposed)
        return _row_by_row(x, w, group_sizes)
    return _batched(x, w, group_sizes, transposed)


def _chunks(width: int) -> int:
    """J, the largest divisor of K up to 32 that leaves full registers; 0 if there is none."""
    return next((j for j in range(_CHUNKS, 0, -1) if width % j == 0 and width // j >= _LANES), 0)


def _group_of(ends: jax.Array, rows: int) -> jax.Array:
    """Group of each row, E for nobody's; by comparing, since a binary search is a loop."""
    return (jnp.arange(rows)[:, None] >= ends).sum(axis=1, dtype=jnp.int32)


def _row_by_row(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    rows, width = x.shape
    groups, outputs, _ = w.shape
    chunks = _chunks(width)
    ends = jnp.cumsum(group_sizes)
    group_of = _group_of(ends, rows)
    x_parts = x.reshape(rows, 1, chunks, -1).astype(jnp.float32)
    w_parts = w.reshape(groups, outputs, chunks, -1)
    lanes = jnp.zeros((), jnp.float32)
    for j in range(chunks):
        mine = w_parts[:, :, j].at[group_of].get(mode="clip").astype(jnp.float32)
        lanes += x_parts[:, :, j] * mine
    # Without the barrier XLA merges both sums into one reduction, which is four times slower.
    y = jax.lax.optimization_barrier(lanes).sum(axis=-1)
    return jnp.where((jnp.arange(rows) < ends[-1])[:, None], y, 0.0).astype(x.dtype)


def _room(rows: int, groups: int) -> int:
    """C: the mean group and a quarter, in whole register tiles."""
    return -(-5 * rows // (4 * groups * 8)) * 8


def _windows(x: jax.Array, starts: jax.Array, room: int) -> jax.Array:
    """The first C rows of each group [E, C, K]; behind a smaller group stand rows of others."""
    index = starts[:, None] + jnp.arange(room)
    return x.at[index].get(mode="clip")


def _batched(x, w, group_sizes, transposed):
    rows, groups = x.shape[0], w.shape[0]
    room = _room(rows, groups)
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    contract = ((2,), (1 if transposed else 2,))
    y = jax.lax.dot_general(
        _windows(x, starts, room), w, (contract, ((0,), (0,))), preferred_element_type=jnp.float32
    ).astype(x.dtype)
    index = jnp.arange(rows)
    group_of = jnp.minimum(_group_of(ends, rows), groups - 1)
    place = jnp.minimum(index - starts[group_of], room - 1)
    out = y.reshape(groups * room, -1)[group_of * room + place]
    out = jnp.where((index < ends[-1])[:, None], out, jnp.zeros((), x.dtype))
    return jax.lax.cond(
        (group_sizes > room).any(),
        lambda: loops.add_tiles(out, x, w, None, group_sizes, skip=room, transposed=transposed),
        lambda: out,
    )


def group_outer(left: jax.Array, right: jax.Array, group_sizes: jax.Array, dtype) -> jax.Array:
    """As `loops.group_outer`."""
    rows, groups = left.shape[0], group_sizes.shape[0]
    room = _room(rows, groups)
    starts = jnp.cumsum(group_sizes) - group_sizes
    mine = (jnp.arange(room) < group_sizes[:, None])[..., None]
    a, b = (jnp.where(mine, _windows(side, starts, room), 0) for side in (left, right))
    out = jax.lax.dot_general(
        a, b, (((1,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32
    )
    return jax.lax.cond(
        (group_sizes > room).any(),
        lambda: loops.add_outer(out, left, right, group_sizes, skip=room),
        lambda: out,
    ).astype(dtype)
