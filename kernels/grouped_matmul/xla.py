"""Grouped matmul in XLA without the dense blow-up of `jax.lax.ragged_dot`.

Rows are cut into tiles that belong to one group each and a loop runs over exactly the tiles there
are (its trip count depends on the group sizes), slicing one group's matrix at a time. Tiles are
visited in row order, so the spare rows at the end of a group's last tile are overwritten by the
next group, and nothing needs to be masked on the way out. Few rows (decode) take a loop of
matrix-vector products instead, which reads each matrix once and wastes no row.
M rows  K input width  N output width  E groups
"""

import jax
import jax.numpy as jnp

from deepzoo.kernels.block_fp8.xla import dequantize


def rows_times_groups(
    x: jax.Array,
    w: jax.Array,
    w_scale: jax.Array | None,
    group_sizes: jax.Array,
    *,
    transposed: bool = False,
) -> jax.Array:
    """x [M, K] times w[e] [N, K] transposed -> [M, N]; with `transposed`, x [M, N] times w[e] ->
    [M, K]."""
    rows, groups = x.shape[0], w.shape[0]
    if rows == 0:
        return jnp.zeros((0, w.shape[2 if transposed else 1]), x.dtype)
    if rows <= 2 * groups:
        return _row_by_row(x, w, w_scale, group_sizes, transposed)
    return _tile_by_tile(x, w, w_scale, group_sizes, transposed)


def _matrix(w: jax.Array, w_scale: jax.Array | None, group: jax.Array, dtype) -> jax.Array:
    matrix = jax.lax.dynamic_index_in_dim(w, group, 0, keepdims=False)
    if w_scale is None:
        return matrix.astype(dtype)
    return dequantize(
        matrix, jax.lax.dynamic_index_in_dim(w_scale, group, 0, keepdims=False), dtype
    )


def _row_by_row(x, w, w_scale, group_sizes, transposed):
    ends = jnp.cumsum(group_sizes)
    group_of = jnp.searchsorted(ends, jnp.arange(x.shape[0]), side="right").astype(jnp.int32)
    width = w.shape[2 if transposed else 1]
    contract = ((0,), (0 if transposed else 1,))

    def body(row, out):
        matrix = _matrix(w, w_scale, group_of[row], x.dtype)
        y = jax.lax.dot_general(
            x[row], matrix, (contract, ((), ())), preferred_element_type=jnp.float32
        )
        return jax.lax.dynamic_update_slice(out, y.astype(x.dtype)[None], (row, 0))

    return jax.lax.fori_loop(
        0, jnp.minimum(ends[-1], x.shape[0]), body, jnp.zeros((x.shape[0], width), x.dtype)
    )


def _block(rows: int, groups: int) -> int:
    """Tile height: near the mean group, so that few rows are spare, and large enough to feed a
    matmul."""
    return min(max(1 << max(rows // groups - 1, 1).bit_length(), 16), 128)


def _tiles(group_sizes: jax.Array, block: int):
    """Last tile (exclusive) and first row of each group."""
    starts = jnp.cumsum(group_sizes) - group_sizes
    return jnp.cumsum((group_sizes + block - 1) // block), starts


def _tile(tile, ends, starts, group_sizes, block):
    """Group, first row and number of real rows of a tile."""
    group = jnp.searchsorted(ends, tile, side="right").astype(jnp.int32)
    count = (group_sizes[group] + block - 1) // block
    inside = (tile - (ends[group] - count)) * block
    return group, starts[group] + inside, group_sizes[group] - inside


def _tile_by_tile(x, w, w_scale, group_sizes, transposed):
    rows, groups = x.shape[0], w.shape[0]
    block = _block(rows, groups)
    ends, starts = _tiles(group_sizes, block)
    width = w.shape[2 if transposed else 1]
    contract = ((1,), (0 if transposed else 1,))
    padded = jnp.pad(x, ((0, block), (0, 0)))

    def body(tile, out):
        group, first, _ = _tile(tile, ends, starts, group_sizes, block)
        part = jax.lax.dynamic_slice_in_dim(padded, first, block)
        matrix = _matrix(w, w_scale, group, x.dtype)
        y = jax.lax.dot_general(
            part, matrix, (contract, ((), ())), preferred_element_type=jnp.float32
        )
        return jax.lax.dynamic_update_slice(out, y.astype(x.dtype), (first, 0))

    out = jax.lax.fori_loop(0, ends[-1], body, jnp.zeros((rows + block, width), x.dtype))
    # The last tile's spare rows reach past the sum of the sizes: they are nobody's.
    return jnp.where(
        (jnp.arange(rows) < group_sizes.sum())[:, None], out[:rows], jnp.zeros((), x.dtype)
    )


def group_outer(left: jax.Array, right: jax.Array, group_sizes: jax.Array, dtype) -> jax.Array:
    """Gradient to the matrices: left [M, N], right [M, K] -> [E, N, K], each group's own outer
    products, float32 sums."""
    rows, groups = left.shape[0], group_sizes.shape[0]
    shape = (groups, left.shape[1], right.shape[1])
    if rows == 0:
        return jnp.zeros(shape, dtype)
    block = _block(rows, groups)
    ends, starts = _tiles(group_sizes, block)
    left, right = (jnp.pad(a, ((0, block), (0, 0))) for a in (left, right))

    def body(tile, out):
        group, first, count = _tile(tile, ends, starts, group_sizes, block)
        mine = (jnp.arange(block) < count)[:, None]
        a = jnp.where(mine, jax.lax.dynamic_slice_in_dim(left, first, block), 0)
        b = jnp.where(mine, jax.lax.dynamic_slice_in_dim(right, first, block), 0)
        part = jax.lax.dot_general(
            a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        old = jax.lax.dynamic_index_in_dim(out, group, 0, keepdims=True)
        return jax.lax.dynamic_update_slice(out, old + part[None], (group, 0, 0))

    return jax.lax.fori_loop(0, ends[-1], body, jnp.zeros(shape, jnp.float32)).astype(dtype)
