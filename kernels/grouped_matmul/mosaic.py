"""Grouped matmul for Hopper's tensor cores (Mosaic GPU, sm_90): rows times matrices, and SwiGLU.

Blocks stay on their cores and work through output tiles, 128 rows high; each finds its tiles by
walking along the group sizes once, so that nothing runs before the kernel. In a block, one
warpgroup copies operands to shared memory (TMA), four steps of 64 ahead and on into the next tile,
while two multiply, each 64 of the rows: so a tile's copies hide the previous one's stores. A
warpgroup whose rows are all another group's rests, so a group's last tile may cost half a tile.

TMA moves rows in eights: tiles start at the multiple of 8 at or below their group's first row, and
of what they compute exactly the group's rows are stored. 64 rows that are all the group's leave in
one swizzled copy; others in copies of 32, 16, ... 1 rows.

All operands come from shared memory, so the kernel interprets on a CPU as it is.
M rows  K input width  N output width  E groups
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from deepzoo.kernels.dispatch import core_count

HALF = 64  # rows of a multiplying warpgroup
HEIGHT = 2 * HALF
DEPTH = 64  # of a step: 128 bytes, the widest swizzle
CHUNK = 64  # columns that are stored at a time
_ALIGN = 8
_i32 = jnp.int32
plgpu: Any = mosaic_gpu  # its own annotations call its classes abstract and private


class Config(NamedTuple):
    """columns: of a tile, all products together. stages: steps in flight."""

    columns: int
    stages: int = 4


def rows_times_groups(
    xs: Sequence[jax.Array],
    ws: Sequence[jax.Array],
    group_sizes: jax.Array,
    *,
    transposed: bool = False,
    interpret: bool = False,
    config: Config | None = None,
) -> jax.Array:
    """The sum over i of xs[i] [M, K] times ws[i][e] [N, K] transposed -> [M, N]; with `transposed`,
    of xs[i] [M, N] times ws[i][e] -> [M, K]. Matrices are read as they lie."""
    columns = ws[0].shape[2 if transposed else 1]
    config = config or Config(256 if columns % 256 == 0 else 128)
    (out,) = _run(config, xs, ws, group_sizes, 1, transposed, interpret)
    return out


def swiglu(
    x: jax.Array,
    ws: tuple[jax.Array, jax.Array],
    group_sizes: jax.Array,
    *,
    keep: bool = False,
    interpret: bool = False,
    config: Config | None = None,
) -> tuple[jax.Array, ...]:
    """silu(x gate[e]^T) * (x up[e]^T) -> ([M, N],), and with `keep` the two products as well."""
    outputs = 3 if keep else 1
    return _run(
        config or Config(256), (x,), ws, group_sizes, outputs, False, interpret, halves=True
    )


def tile_count(rows: int, groups: int) -> int:
    """The most tiles: as `tiles.count`, with 7 rows of the neighbour in each group's
    first tile."""
    used = min(rows, groups)
    return used + (rows + (_ALIGN - 2) * used) // HEIGHT


class Place(NamedTuple):
    """How far a block has read the group sizes: a group, its first row, the tiles before it, and
    the tiles it needs. Rows of nobody are group E."""

    group: Any
    start: Any
    before: Any
    needed: Any


def find(size_ref: Any, rows: int, groups: int, tile: Any, place: Place) -> tuple[Place, Any]:
    """The place of the group that has a tile, and the group's end, from an earlier place; beyond
    group E if no group has it."""

    def at(group, start, before):
        size = jnp.where(
            group < groups,
            size_ref[jnp.minimum(group, groups - 1)],
            jnp.where(group == groups, jnp.maximum(rows - start, 0), 0),
        )
        above = lax.rem(start, _i32(_ALIGN))  # the neighbour's rows in the first tile
        needed = jnp.where(size > 0, lax.div(size + above + (HEIGHT - 1), _i32(HEIGHT)), 0)
        return Place(group, start, before, needed), start + size

    def further(carry):
        place, end = carry
        return at(place.group + 1, end, place.before + place.needed)

    first = at(place.group, place.start, place.before)
    return lax.while_loop(
        lambda c: (c[0].group <= groups) & (tile >= c[0].before + c[0].needed), further, first
    )


def _run(
    config: Config, xs, ws, group_sizes, outputs, transposed, interpret, *, halves=False
) -> tuple[jax.Array, ...]:
    given, groups, dtype = xs[0].shape[0], ws[0].shape[0], xs[0].dtype
    columns, depth = (ws[0].shape[i] for i in ((2, 1) if transposed else (1, 2)))
    if given == 0:
        return (jnp.zeros((0, columns), dtype),) * outputs
    # Real batches are multiples of 8 rows; others are copied to one.
    rows = max(given + -given % _ALIGN, HEIGHT)
    if rows != given:
        xs = tuple(jnp.pad(x, ((0, rows - given), (0, 0))) for x in xs)
    width = config.columns // 2 if halves else config.columns  # of one product's tile
    across = pl.cdiv(columns, width)
    blocks = pl.cdiv(depth, DEPTH)
    tiles = tile_count(rows, groups + 1) * across
    programs = min(core_count(), tiles)
    # Each loop: which rows, and which matrices are multiplied with them in one step.
    loops = ((0, (0, 1)),) if halves else tuple((p, (p,)) for p in range(len(ws)))
    sums = 2 if halves else 1

    def body(*refs):
        x_refs, refs = refs[: len(xs)], refs[len(xs) :]
        w_refs, refs = refs[: len(ws)], refs[len(ws) :]
        size_ref, *refs = refs
        out_refs, (a, b, swizzled, plain, full, empty) = refs[:outputs], refs[outputs:]
        wg, program = lax.axis_index("wg"), lax.axis_index("sm")
        turns = lax.div(tiles - 1 - program, _i32(programs)) + 1

        def each_tile(work: Callable[..., Any]) -> Any:
            """Runs work(group, row, low, high, first column, steps of a loop, steps so far)."""

            def turn(i, carry):
                done, place = carry
                index = program + i * programs
                tile, column = lax.div(index, _i32(across)), lax.rem(index, _i32(across)) * width
                place, end = find(size_ref, rows, groups, tile, place)
                first = place.start - lax.rem(place.start, _i32(_ALIGN))
                row = first + (tile - place.before) * HEIGHT
                low, high = jnp.maximum(place.start, row), jnp.minimum(end, row + HEIGHT)
                # The last tile moves up, so as not to leave the array.
                row = jnp.clip(row, 0, rows - HEIGHT)
                used = place.group <= groups
                steps = jnp.where(place.group < groups, _i32(blocks), _i32(0))

                @pl.when(used)
                def _():
                    work(
                        place.group, pl.multiple_of(row, _ALIGN), low - row, high - row, column,
                        steps, done,
                    )  # fmt: skip

                return done + steps * len(loops), place

            start = Place(*(_i32(0),) * 4)
            return lax.fori_loop(0, turns, turn, (_i32(0), start))[0]

        def slot_of(step):
            return lax.rem(step, _i32(config.stages))

        @pl.when(wg == 2)
        def _produce():
            plgpu.set_max_registers(40, action="decrease")

            def work(group, row, low, high, column, steps, done):
                for number, (rows_of, matrices) in enumerate(loops):

                    def load(block, _, number=number, rows_of=rows_of, matrices=matrices):
                        step = done + number * steps + block
                        slot = slot_of(step)

                        @pl.when(step >= config.stages)
                        def _free():
                            plgpu.barrier_wait(empty.at[slot])

                        inner = pl.ds(block * DEPTH, DEPTH)
                        plgpu.copy_gmem_to_smem(
                            x_refs[rows_of].at[pl.ds(row, HEIGHT), inner], a.at[slot], full.at[slot]
                        )
                        outer = pl.ds(column, width)
                        for place, p in enumerate(matrices):
                            part = (inner, outer) if transposed else (outer, inner)
                            plgpu.copy_gmem_to_smem(
                                w_refs[p].at[(group, *part)], b.at[slot, place], full.at[slot]
                            )

                    lax.fori_loop(0, steps, load, None)

            done = each_tile(work)

            def drain(step, _):
                plgpu.barrier_wait(empty.at[slot_of(step)])

            # Nobody may still write to this block's barriers when it ends.
            lax.fori_loop(jnp.maximum(done - config.stages, 0), done, drain, None)

        @pl.when(wg < 2)
        def _consume():
            plgpu.set_max_registers(232, action="increase")
            mine = pl.ds(wg * HALF, HALF)

            def multiply(accumulators, steps, done):
                for number, (_, matrices) in enumerate(loops):

                    def step_of(block, _, number=number, matrices=matrices):
                        step = done + number * steps + block
                        slot = slot_of(step)
                        plgpu.barrier_wait(full.at[slot])
                        for place, _p in enumerate(matrices):
                            w = b.at[slot, place]
                            plgpu.wgmma(
                                accumulators[place],
                                a.at[slot, mine],
                                w if transposed else w.transpose((1, 0)),
                            )
                        plgpu.wgmma_wait(len(matrices))  # the previous step's are done

                        @pl.when(number * steps + block > 0)
                        def _release():
                            plgpu.barrier_arrive(empty.at[slot_of(step - 1)])

                    lax.fori_loop(0, steps, step_of, None)
                plgpu.wgmma_wait(0)

                @pl.when(steps > 0)
                def _release_last():
                    plgpu.barrier_arrive(empty.at[slot_of(done + len(loops) * steps - 1)])

            def skip(steps, done):
                def pass_by(step, _):
                    plgpu.barrier_wait(full.at[slot_of(step)])
                    plgpu.barrier_arrive(empty.at[slot_of(step)])

                lax.fori_loop(done, done + len(loops) * steps, pass_by, None)

            def work(group, row, low, high, column, steps, done):
                begin = jnp.clip(low - wg * HALF, 0, HALF)
                count = jnp.clip(high - wg * HALF, 0, HALF) - begin

                @pl.when(count == 0)
                def _():
                    skip(steps, done)

                @pl.when(count > 0)
                def _():
                    def scope(*accumulators):
                        multiply(accumulators, steps, done)
                        return tuple(ref[...] for ref in accumulators)

                    made = pl.run_scoped(
                        scope, *[plgpu.ACC((HALF, width), jnp.float32) for _ in range(sums)]
                    )
                    if halves:
                        gate, up = made
                        made = (gate / (1 + jnp.exp(-gate)) * up, gate, up)[:outputs]
                    for out_ref, values in zip(out_refs, made, strict=True):
                        store(out_ref, values.astype(dtype), row + wg * HALF, begin, count, column)

            def store(out_ref, values, row, begin, count, column):
                for start in range(0, width, CHUNK):
                    chunk = values[:, start : start + CHUNK]
                    place = pl.ds(column + start, CHUNK)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                    @pl.when(count == HALF)
                    def _whole(chunk=chunk, place=place):
                        swizzled[mine] = chunk
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(
                            swizzled.at[mine],
                            out_ref.at[pl.ds(pl.multiple_of(row, _ALIGN), HALF), place],
                        )

                    @pl.when(count < HALF)
                    def _part(chunk=chunk, place=place):
                        plain[mine] = chunk
                        plgpu.commit_smem()
                        for size in (32, 16, 8, 4, 2, 1):  # a copy has a fixed size
                            offset = begin + (count & ~(2 * size - 1))

                            @pl.when((count & size) != 0)
                            def _piece(size=size, offset=offset):
                                plgpu.copy_smem_to_gmem(
                                    plain.at[pl.ds(wg * HALF + offset, size)],
                                    out_ref.at[pl.ds(row + offset, size), place],
                                )

            each_tile(work)
            plgpu.wait_smem_to_gmem(0)

    swizzle = (plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(128))
    w_tile = (DEPTH, width) if transposed else (width, DEPTH)
    out = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((rows, columns), dtype)] * outputs,
        scratch_types=[
            plgpu.SMEM((config.stages, HEIGHT, DEPTH), dtype, transforms=swizzle),
            plgpu.SMEM((config.stages, sums, *w_tile), dtype, transforms=swizzle),
            plgpu.SMEM((HEIGHT, CHUNK), dtype, transforms=swizzle),
            plgpu.SMEM((HEIGHT, CHUNK), dtype),
            plgpu.Barrier(num_arrivals=1 + sums, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
        ],
        grid=(programs,),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        interpret=interpreter() if interpret else None,
    )(*xs, *ws, group_sizes.astype(_i32))
    return tuple(o[:given] for o in out)


def interpreter() -> Any:
    """The interpreter with which the kernel is tested: races and unset memory are seen."""
    return plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
