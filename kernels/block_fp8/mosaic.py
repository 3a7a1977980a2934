"""FP8 x FP8 matmul with float32 promotion per 128 of K, for Hopper's tensor cores (Mosaic GPU).

V3 report (arXiv 2412.19437) 3.3.2: the tensor cores add e4m3 products with about 14 bits, so only
128 of K are summed there; each partial sum is multiplied by its two scales and added in float32
registers. The multiply-adds of that promotion cost a quarter of the products' time for one
warpgroup, so two of them take turns: while one promotes, the other's products run.

A block holds three warpgroups and stays on its core: one issues TMA copies, two multiply. A tile
has 128 rows, 64 for each consumer, or, where rows are few, 64 rows whose columns they share.
Blocks can form clusters of two neighbours in N, which read the rows once for both. All operands
come from shared memory, so the kernel interprets on a CPU as it is.
M rows  N output width  K input width  E groups (1 in the dense product)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from deepzoo.kernels.dispatch import core_count

BLOCK = 128
_HALF = 64  # rows of one wgmma
_CONSUMERS = 2
_SHARED = 227 * 1024 - 1024  # bytes of shared memory a block may take, less barriers
_i32 = jnp.int32


class Config(NamedTuple):
    """How the product is cut.

    rows: of a tile, 128 (64 for each consumer) or 64 (the consumers halve its columns).
    columns: of a tile; the part of one consumer lies inside one block of 128.
    stages: K blocks in flight.
    cluster: neighbouring blocks in N that share the copies of the rows, 1 or 2.
    """

    rows: int
    columns: int
    stages: int
    cluster: int

    @property
    def mine(self) -> int:
        """Columns of one consumer."""
        return self.columns if self.rows == BLOCK else self.columns // _CONSUMERS


class Tile(NamedTuple):
    """One tile of the result, all int32 scalars.

    group: whose matrix.
    source: first row of it in the (padded) rows.
    target: first row of it in the result.
    count: rows of it that exist; 0 for a tile without work.
    blocks: K blocks to add; 0 for a tile of zeros.
    """

    group: Any
    source: Any
    target: Any
    count: Any
    blocks: Any


def config(rows: int, columns: int, cluster: int) -> Config:
    """Fills in as many stages as shared memory holds."""
    shape = Config(rows, columns, 0, cluster)
    stage = (rows + columns) * BLOCK
    free = _SHARED - _CONSUMERS * _HALF * shape.mine * 2
    return shape._replace(stages=max(2, min(12, free // stage)))


def dense_config(m: int, n: int, cores: int) -> Config:
    """Large tiles where there is arithmetic, narrow ones where all cores must read weights."""
    rows = _HALF if m <= _HALF else BLOCK
    row_tiles = pl.cdiv(m, rows)

    def waves(columns: int) -> tuple[int, int]:
        return pl.cdiv(row_tiles * pl.cdiv(n, columns), cores) * columns, -columns

    columns = BLOCK if m > 4 * BLOCK else min((32, 64, 128), key=waves)
    return config(rows, columns, 2 if n % (2 * columns) == 0 else 1)


def matmul(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    dtype: Any,
    *,
    interpret: Any = None,
    cut: Config | None = None,
) -> jax.Array:
    """e4m3 [M, K] times e4m3 [N, K] transposed -> [M, N] in `dtype`.

    Args:
        x, x_scale: rows and their float32 scales [M, K / 128].
        w, w_scale: weight and its float32 scales [ceil(N / 128), K / 128].
        dtype: bfloat16 or float16.
        interpret: `plgpu.InterpretGPUParams` to run on a CPU.
        cut: overrides the choice of tiles.
    """
    m, n = x.shape[0], w.shape[0]
    spare = -m % 8  # TMA moves rows in eights
    x = jnp.pad(x, ((0, spare), (0, 0)))
    cut = cut or dense_config(m, n, core_count())
    row_tiles = pl.cdiv(m, cut.rows)
    scales = jnp.pad(x_scale, ((0, row_tiles * cut.rows - m), (0, 0))).T
    blocks = w.shape[1] // BLOCK

    def tile(_: Any, row: jax.Array) -> Tile:
        first = row * cut.rows
        return Tile(_i32(0), first, first, _i32(cut.rows), _i32(blocks))

    out = multiply(
        cut, row_tiles, tile, x, scales, w[None], w_scale[None], (), m + spare, dtype, interpret
    )
    return out[:m]


def multiply(
    cut: Config,
    row_tiles: int,
    tile: Callable[[Any, jax.Array], Tile],
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    schedule: tuple[jax.Array, ...],
    out_rows: int,
    dtype: Any,
    interpret: Any,
) -> jax.Array:
    """Runs the kernel.

    `tile(schedule refs, index)` says what tile of rows number `index` is. w is [E, N, K], x_scale
    [K / 128, M] with an M that holds every row a tile covers. With a schedule, tiles end anywhere
    and exactly their rows are stored; without, what reaches beyond the result is clipped.
    """
    n = w.shape[1]
    exact = bool(schedule)
    mine = cut.mine
    column_tiles = pl.cdiv(n, cut.columns * cut.cluster)
    tiles = row_tiles * column_tiles
    programs = min(max(core_count() // cut.cluster, 1), tiles)
    last_scale, last_block = w_scale.shape[1] - 1, w_scale.shape[2] - 1
    # Tiles run down 16 row tiles before they move on in N, so that those which run at one time
    # read few distinct rows and columns. Tiles of one group must stay neighbours instead.
    band = 1 if exact else min(16, row_tiles)

    def place(index: Any) -> tuple[Any, Any]:
        """(tile of rows, tile of columns)"""
        if exact:
            return lax.div(index, _i32(column_tiles)), lax.rem(index, _i32(column_tiles))
        return plgpu.planar_snake(index, (row_tiles, column_tiles), 0, band)

    def body(x_ref, sx_ref, w_ref, sw_ref, *rest):
        *table, out_ref, a, b, staged, full, empty = rest
        wg, program = lax.axis_index("wg"), lax.axis_index("sm")
        cta = lax.axis_index("cluster") if cut.cluster > 1 else _i32(0)
        turns = lax.div(tiles - 1 - program, _i32(programs)) + 1

        def each_tile(work: Callable[[Tile, Any, Any], Any]) -> Any:
            """Runs `work(tile, first column, K blocks so far)` for this program's tiles."""

            def turn(i, done):
                row, column = place(program + i * programs)
                now = tile(table, row)
                first = (column * cut.cluster + cta) * cut.columns
                if exact:
                    pl.when(now.count > 0)(lambda: work(now, first, done))
                else:
                    work(now, first, done)
                return done + now.blocks

            return lax.fori_loop(0, turns, turn, _i32(0))

        @pl.when(wg == _CONSUMERS)
        def _produce():
            plgpu.set_max_registers(40, action="decrease")

            def work(now: Tile, first, done):
                def load(block, _):
                    step = done + block
                    slot = lax.rem(step, _i32(cut.stages))

                    @pl.when(step >= cut.stages)
                    def _free():
                        plgpu.barrier_wait(empty.at[slot])

                    inner = pl.ds(block * BLOCK, BLOCK)
                    plgpu.copy_gmem_to_smem(
                        x_ref.at[pl.ds(now.source, cut.rows), inner],
                        a.at[slot],
                        full.at[slot],
                        collective_axes=None if cut.cluster == 1 else "cluster",
                    )
                    plgpu.copy_gmem_to_smem(
                        w_ref.at[now.group, pl.ds(first, cut.columns), inner],
                        b.at[slot],
                        full.at[slot],
                    )

                lax.fori_loop(0, now.blocks, load, None)

            done = each_tile(work)

            def drain(step, _):
                plgpu.barrier_wait(empty.at[lax.rem(step, _i32(cut.stages))])

            # Nobody may still write to this block's barriers when it ends.
            lax.fori_loop(jnp.maximum(done - cut.stages, 0), done, drain, None)

        @pl.when(wg < _CONSUMERS)
        def _consume():
            plgpu.set_max_registers(232, action="increase")
            by_rows = cut.rows == BLOCK
            my_rows = pl.ds(wg * _HALF, _HALF) if by_rows else pl.ds(0, _HALF)
            my_columns = pl.ds(0, mine) if by_rows else pl.ds(wg * mine, mine)
            tile_row = wg * _HALF if by_rows else _i32(0)
            tile_column = _i32(0) if by_rows else wg * mine

            def work(now: Tile, first, done):
                column = first + tile_column
                scale_row = jnp.minimum(lax.div(column, _i32(BLOCK)), _i32(last_scale))
                source = now.source + tile_row

                def factors(block):
                    """Scales of a K block: of these 64 rows, and of the weight's block."""
                    rows = plgpu.load(
                        sx_ref.at[block, pl.ds(source, _HALF)],
                        layout=plgpu.Layout.WGMMA.reduce(1),
                        optimized=False,  # refused for global memory by jax 0.11 otherwise
                    )
                    return rows, sw_ref[now.group, scale_row, block]

                def promote(block, carry):
                    total, (x_factor, w_factor) = carry
                    slot = lax.rem(done + block, _i32(cut.stages))
                    factor = x_factor * w_factor
                    # The next block's scales travel while this block is multiplied. They are asked
                    # for once this block's are used up, so that they land in the same registers: a
                    # copy between registers would wait for them before the product.
                    following = factors(jnp.minimum(block + 1, _i32(last_block)))
                    plgpu.barrier_wait(full.at[slot])

                    def product(sums):
                        plgpu.wgmma(
                            sums, a.at[slot, my_rows], b.at[slot, my_columns].transpose((1, 0))
                        )
                        return sums[...]

                    sums = pl.run_scoped(
                        product, plgpu.WGMMAAccumulatorRef((_HALF, mine), jnp.float32)
                    )
                    plgpu.barrier_arrive(empty.at[slot])
                    return total + sums * lax.broadcast_in_dim(factor, sums.shape, [0]), following

                zeros = plgpu.layout_cast(jnp.zeros((_HALF, mine), jnp.float32), plgpu.Layout.WGMMA)
                total, _ = lax.fori_loop(0, now.blocks, promote, (zeros, factors(_i32(0))))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                staged[pl.ds(wg * _HALF, _HALF)] = total.astype(dtype)
                plgpu.commit_smem()
                target = now.target + tile_row
                columns = pl.ds(column, mine)
                if not exact:
                    plgpu.copy_smem_to_gmem(
                        staged.at[pl.ds(wg * _HALF, _HALF)],
                        out_ref.at[pl.ds(target, _HALF), columns],
                    )
                    return
                count = jnp.clip(now.count - tile_row, 0, _HALF)
                # A TMA copy has a fixed size: rows leave in chunks of powers of two.
                for chunk in (64, 32, 16, 8, 4, 2, 1):
                    start = 0 if chunk == _HALF else count & ~(2 * chunk - 1)

                    @pl.when((count & chunk) != 0)
                    def _store(chunk=chunk, start=start):
                        plgpu.copy_smem_to_gmem(
                            staged.at[pl.ds(wg * _HALF + start, chunk)],
                            out_ref.at[pl.ds(target + start, chunk), columns],
                        )

            each_tile(work)
            plgpu.wait_smem_to_gmem(0)

    def tiled(columns: int, swizzle: int) -> tuple[Any, ...]:
        # Both are dataclasses that pyright takes for abstract.
        tiling: Any = plgpu.TilingTransform
        swizzled: Any = plgpu.SwizzleTransform
        return tiling((8, columns)), swizzled(swizzle)

    operands = tiled(BLOCK, BLOCK)
    wide = min(mine, 64)
    results = tiled(wide, wide * 2)
    empty: Any = plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=cut.stages)
    if cut.cluster > 1:
        empty = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=_CONSUMERS, num_barriers=cut.stages
        )
    clusters = {} if cut.cluster == 1 else {"cluster": (2,), "cluster_names": ("cluster",)}
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((out_rows, n), dtype),
        scratch_types=[
            plgpu.SMEM((cut.stages, cut.rows, BLOCK), x.dtype, transforms=operands),
            plgpu.SMEM((cut.stages, cut.columns, BLOCK), w.dtype, transforms=operands),
            plgpu.SMEM((_CONSUMERS * _HALF, mine), dtype, transforms=() if exact else results),
            plgpu.Barrier(num_arrivals=2, num_barriers=cut.stages),
            empty,
        ],
        grid=(programs,),
        grid_names=("sm",),
        num_threads=_CONSUMERS + 1,
        thread_name="wg",
        interpret=interpret,
        **clusters,
    )(x, x_scale, w, w_scale, *schedule)
