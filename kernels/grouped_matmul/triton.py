"""Grouped matmul in Pallas-Triton: NVIDIA GPUs from sm_80 on, and complete under interpret.

Every block of threads makes one output tile. The grid is static, `tiles.count` row tiles times the
column tiles; which group and rows a tile has is computed from the group sizes by the block itself,
in a few operations on a vector of E, so that nothing runs before the kernel. Rows that belong to
nobody are one more group, whose product has no steps: zeros. Blocks of a row tile are neighbours,
so that those which run at the same time share rows and matrices in the level-2 cache.

Sums are made by one block in row order: results are the same on every rerun.
M rows  K input width  N output width  E groups
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from deepzoo.kernels.dispatch import compute_capability
from deepzoo.kernels.grouped_matmul import tiles
from deepzoo.kernels.grouped_matmul.tiles import Tile

BLOCK = 128  # of the float8 scales
_WHOLE = pl.BlockSpec(memory_space=pl.ANY)


def rows_times_groups(
    xs: Sequence[jax.Array],
    ws: Sequence[jax.Array],
    scales: Sequence[jax.Array | None],
    group_sizes: jax.Array,
    *,
    transposed: bool = False,
    interpret: bool = False,
    tile: Tile | None = None,
) -> jax.Array:
    """The sum over i of xs[i] [M, K] times ws[i][e] [N, K] transposed -> [M, N]; with `transposed`,
    of xs[i] [M, N] times ws[i][e] -> [M, K]. Matrices are read as they lie."""
    (out,) = _rows(
        xs, ws, scales, group_sizes, transposed=transposed, interpret=interpret, tile=tile
    )
    return out


def swiglu(
    x: jax.Array,
    ws: tuple[jax.Array, jax.Array],
    scales: tuple[jax.Array | None, jax.Array | None],
    group_sizes: jax.Array,
    *,
    keep: bool = False,
    interpret: bool = False,
    tile: Tile | None = None,
) -> tuple[jax.Array, ...]:
    """silu(x gate[e]^T) * (x up[e]^T) -> ([M, N],), and with `keep` the two products as well."""
    return _rows(
        (x,), ws, scales, group_sizes, halves=True, keep=keep, interpret=interpret, tile=tile
    )


def _group(size_ref, rows: int, groups: int, height, tile):
    """Group, first row and end of a row tile; group `groups` is the rows of nobody, and a greater
    one means that there is nothing to do."""
    wide = 1 << groups.bit_length()  # groups + 1 at least
    lane = jax.lax.broadcasted_iota(jnp.int32, (wide,), 0)
    sizes = plt.load(size_ref.at[lane], mask=lane < groups, other=0)
    sizes = jnp.where(lane == groups, jnp.maximum(rows - sizes.sum(), 0), sizes)
    needed = (sizes + (height - 1)) // height
    group = (jnp.cumsum(needed) <= tile).astype(jnp.int32).sum()
    before = lane < group
    first_tile = jnp.where(before, needed, 0).sum()
    start = jnp.where(before, sizes, 0).sum()
    size = jnp.where(lane == group, sizes, 0).sum()
    return group, start + (tile - first_tile) * height, start + size


def _at(ref, *index):
    """A tile of `ref`: leading scalars, then a column of rows and a row of columns."""
    *lead, rows, columns = index
    shape = (rows.shape[0], columns.shape[0])
    lead = [jnp.broadcast_to(i, shape) for i in lead]
    return ref.at[
        (*lead, jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(columns[None], shape))
    ]


def _load(ref, *index, rows_end: Any, columns_end: Any):
    """A tile of `ref`, zeros beyond the ends that are given."""
    *_, rows, columns = index
    masks = [
        keep
        for keep in (
            None if rows_end is None else rows[:, None] < rows_end,
            None if columns_end is None else columns[None] < columns_end,
        )
        if keep is not None
    ]
    if not masks:
        return plt.load(_at(ref, *index))
    mask = masks[0] if len(masks) == 1 else masks[0] & masks[1]
    mask = jnp.broadcast_to(mask, (rows.shape[0], columns.shape[0]))
    return plt.load(_at(ref, *index), mask=mask, other=0)


def _from_bits(bits: jax.Array, dtype) -> jax.Array:
    """int8 bit patterns of float8_e4m3fn -> the values, for GPUs without the type.

    Shifted left by 7 the bits are a float16 that is smaller by 2 ** 8, subnormals included; only
    the pattern of NaN needs care.
    """
    wide = bits.astype(jnp.int16)
    half = jax.lax.bitcast_convert_type(((wide & 127) << 7) | (wide & -32768), jnp.float16)
    value = half.astype(jnp.float32) * 256.0
    return jnp.where((wide & 127) == 127, jnp.nan, value).astype(dtype)


def _rows_kernel(*refs, tile: Tile, shape, transposed, quantised, halves, keep, products, dtype):
    """One tile of the output: see `_rows`. refs: sizes, xs, ws, scales if quantised, then outputs.

    shape: (rows, groups, columns, depth). products: number of matrices.
    """
    rows, groups, columns, depth = shape
    inputs = 1 if halves else products
    size_ref, *refs = refs
    x_refs, refs = refs[:inputs], refs[inputs:]
    w_refs, refs = refs[:products], refs[products:]
    scale_refs, out_refs = (refs[:products], refs[products:]) if quantised else ([], refs)

    across = pl.cdiv(columns, tile.columns)
    block = pl.program_id(0)
    group, first, end = _group(size_ref, rows, groups, tile.rows, block // across)
    column = jax.lax.rem(block, across) * tile.columns
    ns = column + jax.lax.broadcasted_iota(jnp.int32, (tile.columns,), 0)
    ms = first + jax.lax.broadcasted_iota(jnp.int32, (tile.rows,), 0)
    # Spare rows read the group's last row again: in bounds, and in the cache.
    safe = jnp.maximum(jnp.minimum(ms, end - 1), 0)
    n_end = columns if columns % tile.columns else None
    k_end = depth if depth % tile.depth else None

    def step(pairs, i, sums):
        ks = i * tile.depth + jax.lax.broadcasted_iota(jnp.int32, (tile.depth,), 0)
        x = _load(x_refs[pairs[0][0]], safe, ks, rows_end=None, columns_end=k_end)
        made = []
        for _, p in pairs:
            if transposed:
                w = _load(w_refs[p], group, ks, ns, rows_end=k_end, columns_end=n_end)
            else:
                w = _load(w_refs[p], group, ns, ks, rows_end=n_end, columns_end=k_end)
            w = _from_bits(w, x.dtype) if w.dtype == jnp.int8 else w.astype(x.dtype)
            if tile.swapped:  # [columns, rows]
                part = plt.dot(w, x, trans_a=transposed, trans_b=True)
            else:
                part = plt.dot(x, w, trans_b=not transposed)
            if quantised:  # the block's scale, applied to float32 sums: weights are not rounded
                where = (i, column // BLOCK) if transposed else (column // BLOCK, i)
                part = part * scale_refs[p][(group, *where)]
            made.append(part)
        return tuple(a + b for a, b in zip(sums, made, strict=True))

    @pl.when(group <= groups)
    def _():
        blank = (tile.columns, tile.rows) if tile.swapped else (tile.rows, tile.columns)
        sums = tuple(jnp.zeros(blank, jnp.float32) for _ in range(2 if halves else 1))
        steps = (group < groups).astype(jnp.int32) * pl.cdiv(depth, tile.depth)
        # SwiGLU's two products share each step's rows; a sum of products is one loop after another,
        # so that a step's operands take no more shared memory than those of a single product.
        for pairs in (((0, 0), (0, 1)),) if halves else tuple(((p, p),) for p in range(products)):
            sums = jax.lax.fori_loop(0, steps, partial(step, pairs), sums)
        results = sums
        if halves:
            gate, up = sums
            product = gate / (1 + jnp.exp(-gate)) * up
            results = (product, gate, up) if keep else (product,)
        mine = jnp.broadcast_to((ms < end)[:, None] & (ns < columns)[None], (tile.rows, ns.size))
        for ref, result in zip(out_refs, results, strict=True):
            if tile.swapped:
                at = ref.at[
                    jnp.broadcast_to(ms[None], result.shape),
                    jnp.broadcast_to(ns[:, None], result.shape),
                ]
                plt.store(at, result.astype(dtype), mask=mine.T)
            else:
                plt.store(_at(ref, ms, ns), result.astype(dtype), mask=mine)


def _rows(
    xs, ws, scales, group_sizes, *, transposed=False, halves=False, keep=False, interpret, tile
) -> tuple[jax.Array, ...]:
    rows, groups, dtype = xs[0].shape[0], ws[0].shape[0], xs[0].dtype
    columns, depth = (ws[0].shape[i] for i in ((2, 1) if transposed else (1, 2)))
    outputs = 3 if halves and keep else 1
    if rows == 0:
        return (jnp.zeros((0, columns), dtype),) * outputs
    quantised = scales[0] is not None
    capability = compute_capability()
    tile = tile or tiles.for_rows(
        rows, groups, columns, depth, dtype,
        quantised=quantised, halves=halves, capability=capability,
    )  # fmt: skip
    arrays = [group_sizes, *xs]
    for w in ws:
        native = capability is not None and capability >= (8, 9)
        if w.dtype == jnp.float8_e4m3fn and not native:
            w = jax.lax.bitcast_convert_type(w, jnp.int8)
        arrays.append(w)
    arrays += scales if quantised else []

    def kernel(*refs):
        _rows_kernel(
            *refs,
            tile=tile,
            shape=(rows, groups, columns, depth),
            transposed=transposed,
            quantised=quantised,
            halves=halves,
            keep=keep,
            products=len(ws),
            dtype=dtype,
        )

    return tuple(
        pl.pallas_call(
            kernel,
            out_shape=[jax.ShapeDtypeStruct((rows, columns), dtype)] * outputs,
            grid=(tiles.count(rows, groups + 1, tile.rows) * pl.cdiv(columns, tile.columns),),
            in_specs=[_WHOLE] * len(arrays),
            out_specs=[_WHOLE] * outputs,
            compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
            interpret=interpret,
            name="grouped_swiglu" if halves else "grouped_matmul",
        )(*arrays)
    )


def _outer_kernel(size_ref, left_ref, right_ref, out_ref, *, tile: Tile, groups: int):
    """One tile of one group's matrix: its rows' outer products, `tile.depth` rows in a step."""
    high, wide = out_ref.shape[1:]
    across, down = pl.cdiv(wide, tile.columns), pl.cdiv(high, tile.rows)
    block = pl.program_id(0)
    group, inside = block // (across * down), jax.lax.rem(block, across * down)
    lane = jax.lax.broadcasted_iota(jnp.int32, (1 << max(groups - 1, 1).bit_length(),), 0)
    sizes = plt.load(size_ref.at[lane], mask=lane < groups, other=0)
    start = jnp.where(lane < group, sizes, 0).sum()
    size = jnp.where(lane == group, sizes, 0).sum()
    size = jnp.clip(size, 0, left_ref.shape[0] - start)
    ns = inside // across * tile.rows + jax.lax.broadcasted_iota(jnp.int32, (tile.rows,), 0)
    ks = jax.lax.rem(inside, across) * tile.columns
    ks = ks + jax.lax.broadcasted_iota(jnp.int32, (tile.columns,), 0)
    n_end = high if high % tile.rows else None
    k_end = wide if wide % tile.columns else None

    def step(i, total):
        rows = start + i * tile.depth + jax.lax.broadcasted_iota(jnp.int32, (tile.depth,), 0)
        # Rows of other groups may hold anything, NaN too: both sides are cut.
        left = _load(left_ref, rows, ns, rows_end=start + size, columns_end=n_end)
        right = _load(right_ref, rows, ks, rows_end=start + size, columns_end=k_end)
        return total + plt.dot(left, right, trans_a=True)

    total = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    total = jax.lax.fori_loop(0, pl.cdiv(size, tile.depth), step, total)
    mine = jnp.broadcast_to((ns < high)[:, None] & (ks < wide)[None], total.shape)
    plt.store(_at(out_ref, group, ns, ks), total.astype(out_ref.dtype), mask=mine)


def group_outer(
    left: jax.Array,
    right: jax.Array,
    group_sizes: jax.Array,
    dtype,
    *,
    interpret: bool = False,
    tile: Tile | None = None,
) -> jax.Array:
    """Gradient to the matrices: left [M, N], right [M, K] -> [E, N, K], each group's own outer
    products, float32 sums; empty groups get zeros."""
    rows, groups = left.shape[0], group_sizes.shape[0]
    shape = (groups, left.shape[1], right.shape[1])
    if rows == 0:
        return jnp.zeros(shape, dtype)
    tile = tile or tiles.for_matrices(
        rows, groups, *shape[1:], left.dtype, capability=compute_capability()
    )

    def kernel(*refs):
        _outer_kernel(*refs, tile=tile, groups=groups)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        grid=(groups * pl.cdiv(shape[1], tile.rows) * pl.cdiv(shape[2], tile.columns),),
        in_specs=[_WHOLE] * 3,
        out_specs=_WHOLE,
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="grouped_outer",
    )(group_sizes, left, right)
