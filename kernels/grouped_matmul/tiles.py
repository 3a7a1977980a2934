"""Tile sizes of the grouped matmul's kernels, by rows per group, and how rows are cut into tiles.

A tile holds rows of one group only, so each group's last tile has spare rows: half a tile on
average. At V2-Lite's training shape (384 rows a group) tiles of 128 cost 17% more arithmetic, at
V3's (128 rows a group) tiles of 64 cost 25%, which its memory-bound product hides. Decode (4 to 12
rows a group) reads every matrix for a handful of rows: its kernels take tiles of 16 rows, put the
matrix on the tall side of the tensor cores, and are judged by bytes.
M rows  K input width  N output width  E groups
"""

from typing import NamedTuple

import jax.numpy as jnp


class Tile(NamedTuple):
    """What one block of threads computes.

    rows, columns: of the output.
    depth: of the contracted width, in one step.
    warps, stages: threads / 32, and steps whose operands are in flight.
    swapped: whether the matrix is the left operand of the tensor cores.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    swapped: bool = False


def count(rows: int, groups: int, tile: int) -> int:
    """The most tiles that `groups` groups of `rows` rows together can need.

    A group of s > 0 rows needs 1 + (s - 1) // tile; with every group in use the first terms sum to
    `groups`, and the second to (rows - groups) // tile at most.
    """
    used = min(rows, groups)
    return used + (rows - used) // tile


def rows_of_a_tile(rows: int, groups: int) -> int:
    """16 to 128 rows: near a third of the mean group, where groups are large enough."""
    mean = rows / groups
    for bound, tile in ((16, 16), (48, 32), (200, 64)):
        if mean <= bound:
            return tile
    return 128


def for_rows(
    rows: int,
    groups: int,
    columns: int,
    depth: int,
    dtype,
    *,
    quantised: bool,
    halves: bool,
    capability: tuple[int, int] | None,
) -> Tile:
    """The Triton tile of rows times matrices.

    Args:
        rows, groups, columns, depth: the whole product's.
        dtype: of the rows.
        quantised: whether the matrices are float8 with block scales: then a step is one block of
            128 deep, and the tile's columns lie within one.
        halves: whether two products are made side by side (SwiGLU), each half as wide.
        capability: of the GPU; None is taken for the least of them.
    """
    tall, size, large = rows_of_a_tile(rows, groups), jnp.dtype(dtype).itemsize, _large(capability)
    few = tall <= 32
    if size == 4:  # no tensor cores for float32: registers decide
        tile = Tile(min(tall, 32), 64, 128 if quantised else 32, 4, 1 if quantised else 2)
    elif few:
        deeper = 4 if large and not quantised else 3
        # A third step of float8 spills on Blackwell (ptxas 13.5), and eight blocks share a core.
        stages = 2 if quantised and capability is not None and capability >= (10, 0) else deeper
        tile = Tile(tall, 128 if halves else 64, 128, 4, stages, True)
    elif quantised:
        # Before Hopper the dequantised operand lives in registers: larger tiles spill.
        tile = Tile(tall, 128, 128, 8, 3) if large else Tile(64, 64, 128, 4, 3)
    else:
        deep = 64 if _shared(capability) > 160_000 else 32
        tile = Tile(tall, 256 if large else 128, deep, 8, 4)
    bytes_of_a_step = tile.depth * (tile.rows * size + tile.columns * (1 if quantised else size))
    stages = max(2, (_shared(capability) - 4096) // bytes_of_a_step)
    wide = tile.columns // 2 if halves else tile.columns
    return tile._replace(
        columns=min(wide, _power_above(columns)),
        depth=tile.depth if quantised else min(tile.depth, _power_above(depth)),
        stages=min(tile.stages, stages),
    )


def for_matrices(
    rows: int, groups: int, left: int, right: int, dtype, *, capability: tuple[int, int] | None
) -> Tile:
    """The Triton tile of the gradient to the matrices: `rows` x `columns` of one [left, right]
    matrix, `depth` rows of the group in a step."""
    if jnp.dtype(dtype).itemsize == 4:
        tile = Tile(64, 64, 32, 4, 2)
    elif rows / groups <= 16:  # decode-sized batches: writing the matrices is all there is
        tile = Tile(64, 128, 16, 4, 2)
    elif _large(capability):
        tile = Tile(128, 256, 64 if rows / groups > 96 else 32, 8, 4)
    else:
        tile = Tile(128, 128, 32, 8, 4)
    return tile._replace(
        rows=min(tile.rows, _power_above(left)), columns=min(tile.columns, _power_above(right))
    )


def _shared(capability: tuple[int, int] | None) -> int:
    """Bytes of shared memory that a block may take."""
    return {(8, 0): 166912, (9, 0): 232448, (10, 0): 232448}.get(capability or (0, 0), 101376)


def _large(capability: tuple[int, int] | None) -> bool:
    """Whether tensor cores take their operands from shared memory (Hopper and data-centre
    Blackwell): then a block of 256 threads can hold 128 x 256 sums."""
    return capability in ((9, 0), (10, 0))


def _power_above(width: int) -> int:
    """The least power of two >= width, and >= 16, the least a tensor core takes."""
    return max(16, 1 << (width - 1).bit_length())
