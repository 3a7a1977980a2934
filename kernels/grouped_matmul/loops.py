"""Grouped matmul in XLA for any platform, without the dense blow-up of `jax.lax.ragged_dot`.

Rows are cut into tiles that belong to one group each and a loop runs over exactly the tiles there
are (its trip count depends on the group sizes), slicing one group's matrix at a time. Few rows
(decode) take a loop of matrix-vector products instead, which wastes no row.
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
    out = jnp.zeros((rows, w.shape[2 if transposed else 1]), x.dtype)
    if rows == 0:
        return out
    if rows <= 2 * groups:
        return _row_by_row(out, x, w, w_scale, group_sizes, transposed)
    return add_tiles(out, x, w, w_scale, group_sizes, transposed=transposed)


def _matrix(w: jax.Array, w_scale: jax.Array | None, group: jax.Array, dtype) -> jax.Array:
    matrix = jax.lax.dynamic_index_in_dim(w, group, 0, keepdims=False)
    if w_scale is None:
        return matrix.astype(dtype)
    return dequantize(
        matrix, jax.lax.dynamic_index_in_dim(w_scale, group, 0, keepdims=False), dtype
    )


def _row_by_row(out, x, w, w_scale, group_sizes, transposed):
    ends = jnp.cumsum(group_sizes)
    group_of = jnp.searchsorted(ends, jnp.arange(x.shape[0]), side="right").astype(jnp.int32)
    contract = ((0,), (0 if transposed else 1,))

    def body(row, out):
        matrix = _matrix(w, w_scale, group_of[row], x.dtype)
        y = jax.lax.dot_general(
            x[row], matrix, (contract, ((), ())), preferred_element_type=jnp.float32
        )
        return jax.lax.dynamic_update_slice(out, y.astype(x.dtype)[None], (row, 0))

    return jax.lax.fori_loop(0, jnp.minimum(ends[-1], x.shape[0]), body, out)


def _block(rows: int, groups: int, skip: int = 0) -> int:
    """Tile height: near the mean group, so that few rows are spare, and large enough to feed a
    matmul; half of it for what is left of groups that were cut."""
    block = 1 << max(rows // groups - 1, 1).bit_length()
    return min(max(block // 2 if skip else block, 16), 128)


def _tiles(group_sizes: jax.Array, skip: int, block: int):
    """The groups' ends counted in tiles, and tile -> (group, first row, number of real rows); the
    first `skip` rows of each group are in no tile."""
    first_rows = jnp.cumsum(group_sizes) - group_sizes + skip
    sizes = jnp.maximum(group_sizes - skip, 0)
    counts = (sizes + block - 1) // block
    ends = jnp.cumsum(counts)

    def find(tile):
        group = jnp.searchsorted(ends, tile, side="right").astype(jnp.int32)
        inside = (tile - (ends[group] - counts[group])) * block
        return group, first_rows[group] + inside, sizes[group] - inside

    return ends, find


def add_tiles(
    out: jax.Array,
    x: jax.Array,
    w: jax.Array,
    w_scale: jax.Array | None,
    group_sizes: jax.Array,
    *,
    skip: int = 0,
    transposed: bool = False,
) -> jax.Array:
    """Overwrites in `out` [M, N] the rows of each group from its `skip`-th on with their products;
    the others stay."""
    rows, groups = x.shape[0], w.shape[0]
    block = _block(rows, groups, skip)
    ends, find = _tiles(group_sizes, skip, block)
    contract = ((1,), (0 if transposed else 1,))
    x, out = (jnp.pad(a, ((0, block), (0, 0))) for a in (x, out))

    def body(tile, out):
        group, first, count = find(tile)
        part = jax.lax.dynamic_slice_in_dim(x, first, block)
        matrix = _matrix(w, w_scale, group, x.dtype)
        y = jax.lax.dot_general(
            part, matrix, (contract, ((), ())), preferred_element_type=jnp.float32
        )
        old = jax.lax.dynamic_slice_in_dim(out, first, block)
        mine = (jnp.arange(block) < count)[:, None]
        return jax.lax.dynamic_update_slice(
            out, jnp.where(mine, y.astype(x.dtype), old), (first, 0)
        )

    return jax.lax.fori_loop(0, ends[-1], body, out)[:rows]


def group_outer(left: jax.Array, right: jax.Array, group_sizes: jax.Array, dtype) -> jax.Array:
    """Gradient to the matrices: left [M, N], right [M, K] -> [E, N, K], each group's own outer
    products, float32 sums."""
    shape = (group_sizes.shape[0], left.shape[1], right.shape[1])
    return add_outer(jnp.zeros(shape, jnp.float32), left, right, group_sizes).astype(dtype)


def add_outer(
    out: jax.Array, left: jax.Array, right: jax.Array, group_sizes: jax.Array, *, skip: int = 0
) -> jax.Array:
    """Adds to `out` float32 [E, N, K] the outer products of each group's rows from its `skip`-th
    on."""
    block = _block(left.shape[0], group_sizes.shape[0], skip)
    ends, find = _tiles(group_sizes, skip, block)
    left, right = (jnp.pad(a, ((0, block), (0, 0))) for a in (left, right))

    def body(tile, out):
        group, first, count = find(tile)
        mine = (jnp.arange(block) < count)[:, None]
        a = jnp.where(mine, jax.lax.dynamic_slice_in_dim(left, first, block), 0)
        b = jnp.where(mine, jax.lax.dynamic_slice_in_dim(right, first, block), 0)
        part = jax.lax.dot_general(
            a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        old = jax.lax.dynamic_index_in_dim(out, group, 0, keepdims=True)
        return jax.lax.dynamic_update_slice(out, old + part[None], (group, 0, 0))

    return jax.lax.fori_loop(0, ends[-1], body, out)
