"""Latent prefill attention in Pallas-Triton, forward: NVIDIA GPUs from sm_80 on.

One program per block of queries and head walks over the blocks of keys with a running maximum and
sum (FlashAttention-2, arXiv 2307.08691, algorithm 1). Scores are the sum of two products, nope and
rope, so that the rope key is read as it is, [S, R], by every head. Blocks of keys that no query of
the block sees are not visited: by causality, and with segments by comparing ranges of ids.
Grouped-query attention is the same kernel: no rope parts (None), and fewer heads of keys than of
queries.
B batch  T query  S key  H heads  N nope  R rope  V value
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from deepzoo.kernels.dispatch import compute_capability

LOG2_E = math.log2(math.e)
# Starts the running maximum: finite, so that a row without any visible key has exp2(-inf - it) = 0.
LOWEST = -1e30
_DTYPES = ("bfloat16", "float16", "float32")


class Tile(NamedTuple):
    """How a kernel is cut: queries and keys of a block, warps, stages of its loads."""

    queries: int
    keys: int
    warps: int
    stages: int


class Setting(NamedTuple):
    """What a kernel is specialised to. offset is None where it is an array."""

    scale: float
    offset: int | None
    tile: Tile
    interpret: bool


def refusals(
    q_nope, q_rope, k_nope, k_rope, v, q_segments, k_segments, *, scale, q_offset, interpret
) -> list[str]:
    """Every reason why neither kernel can run these arguments on a GPU that can run any."""
    del q_segments, k_segments, q_offset, interpret
    reasons = []
    given = [a for a in (q_nope, q_rope, k_nope, k_rope, v) if a is not None]
    dtypes = {str(a.dtype) for a in given}
    if len(dtypes) > 1 or dtypes - set(_DTYPES):
        reasons.append(f"needs one dtype of {', '.join(_DTYPES)}, got {', '.join(sorted(dtypes))}")
    widths = [a.shape[-1] for a in given]
    if max(widths) > 128:
        reasons.append(f"needs head sizes up to 128, got {max(widths)}")
    if scale <= 0:
        reasons.append(f"needs a positive scale, got {scale}")
    return reasons


def forward(
    q_nope, q_rope, k_nope, k_rope, v, q_segments, k_segments, *, scale, q_offset,
    interpret=False, tile=None,
):  # fmt: skip
    """(out, lse), see `api.mla_prefill`; `tile` overrides the choice, for tests and tuning."""
    batch, queries, heads, _ = q_nope.shape
    tile = tile or _tile(q_nope.dtype, max(q_nope.shape[-1], v.shape[-1]))
    tile = clipped(tile, queries, k_nope.shape[1])
    static = q_offset if isinstance(q_offset, int) else None
    ranges = None
    if q_segments is not None:
        ranges = block_ranges(q_segments, k_segments, tile.queries, tile.keys)
    return pl.pallas_call(
        partial(_kernel, setting=Setting(scale, static, tile, interpret)),
        grid=(heads, pl.cdiv(queries, tile.queries), batch),
        out_shape=(
            jax.ShapeDtypeStruct((batch, queries, heads, v.shape[-1]), v.dtype),
            jax.ShapeDtypeStruct((batch, queries, heads), jnp.float32),
        ),
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="mla_prefill_forward",
    )(
        q_nope, q_rope, k_nope, k_rope, v, q_segments, k_segments,
        q_offset if static is None else None, ranges,
    )  # fmt: skip


def _kernel(
    q_nope, q_rope, k_nope, k_rope, v, q_segments, k_segments, q_offset, ranges, out, lse, *,
    setting: Setting,
):  # fmt: skip
    tile = setting.tile
    head, batch = pl.program_id(0), pl.program_id(2)
    # The last queries see most keys: they start first, so that no long block runs alone at the end.
    block = pl.num_programs(1) - 1 - pl.program_id(1)
    start = block * tile.queries
    factor = setting.scale * LOG2_E
    offset = q_offset[batch] if setting.offset is None else setting.offset
    of_keys = head // (q_nope.shape[2] // k_nope.shape[2])
    queries = read_parts(q_nope, q_rope, batch, start, tile.queries, head, head)
    marks = None if q_segments is None else read_row(q_segments, (batch,), start, tile.queries, -1)

    def step(masked, j, carry):
        mixed, top, total = carry
        first = j * tile.keys
        keys = read_parts(k_nope, k_rope, batch, first, tile.keys, of_keys, None)
        score = product(queries, keys)
        seen = visible(
            start, first, tile, offset if masked else None, k_nope.shape[1],
            marks, None if marks is None else read_row(k_segments, (batch,), first, tile.keys, -2),
        )  # fmt: skip
        if seen is not None:
            score = jnp.where(seen, score, -jnp.inf)
        new = jnp.maximum(top, score.max(axis=1))
        fade = exp2((top - new) * factor, setting.interpret)
        weight = exp2(score * factor - (new * factor)[:, None], setting.interpret)
        values = read(v, batch, first, tile.keys, of_keys)
        mixed = mixed * fade[:, None] + plt.dot(weight.astype(values.dtype), values)
        return mixed, new, total * fade + weight.sum(axis=1)

    full, end = key_blocks(start + offset, tile, k_nope.shape[1])
    first = 0
    if ranges is not None:
        first, last = ranges[batch, block, 0], ranges[batch, block, 1]
        end = jnp.minimum(end, last)
        full = jnp.clip(full, first, end)
    carry = (
        jnp.zeros((tile.queries, padded(v.shape[-1])), jnp.float32),
        jnp.full((tile.queries,), LOWEST, jnp.float32),
        jnp.zeros((tile.queries,), jnp.float32),
    )
    carry = jax.lax.fori_loop(first, full, partial(step, False), carry)
    mixed, top, total = jax.lax.fori_loop(full, end, partial(step, True), carry)
    empty = total == 0
    safe = jnp.where(empty, 1.0, total)
    write(out, (mixed / safe[:, None]).astype(out.dtype), batch, start, head)
    log = jnp.where(empty, -jnp.inf, top * setting.scale + jnp.log(safe))
    write_row(lse, log, batch, start, head)


def _tile(dtype: Any, width: int) -> Tile:
    if jnp.dtype(dtype).itemsize > 2:  # exact products, without tensor cores
        return Tile(64, 32, 4, 2) if width <= 64 else Tile(32, 32, 8, 2)
    # Where it is not Hopper or Blackwell: 90 KiB of shared memory, which sm_86 to sm_89 have too.
    major = (compute_capability() or (8, 0))[0]
    return {9: Tile(128, 128, 8, 2), 10: Tile(128, 64, 8, 3)}.get(major, Tile(128, 64, 8, 2))


# ---------------------------------------------------------------------------
# What the forward and the backward kernels share.


def clipped(tile: Tile, queries: int, keys: int) -> Tile:
    """`tile` with blocks no longer than the arrays need; Triton's products want 16 rows."""
    return tile._replace(
        queries=min(tile.queries, max(16, pl.next_power_of_2(queries))),
        keys=min(tile.keys, max(16, pl.next_power_of_2(keys))),
    )


def exp2(x: jax.Array, interpret: bool) -> jax.Array:
    """2^x in one instruction: the library function adds three more for denormal results."""
    if interpret:
        return jnp.exp2(x)
    (y,) = plt.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return y


def key_blocks(position, tile: Tile, keys: int):
    """(number of blocks of keys that all queries see whole, of those that some query sees) for a
    block of queries whose first one stands at `position` among the keys."""
    whole = jnp.clip(position + 1, 0, keys) // tile.keys
    some = pl.cdiv(jnp.clip(position + tile.queries, 0, keys), tile.keys)
    return whole, some


def visible(start, first, tile: Tile, offset, keys: int, marks, key_marks):
    """Mask [queries, keys] of a block, None where all of it is seen; offset None: causality and
    the end of the keys do not cut this block."""
    seen = None
    if offset is not None:
        rows = start + jnp.arange(tile.queries)[:, None] + offset
        columns = first + jnp.arange(tile.keys)[None, :]
        seen = rows >= columns
        if keys % tile.keys:
            seen &= columns < keys
    if marks is not None:
        same = marks[:, None] == key_marks[None, :]
        seen = same if seen is None else seen & same
    return seen


def block_ranges(marks, other_marks, size: int, other_size: int) -> jax.Array:
    """int32 [B, blocks, 2]: the first and behind-the-last of the other side's blocks whose range
    of segment ids meets that of a block. Exact for packed documents in order, never too small."""

    def bounds(a, size):
        spare = -a.shape[1] % size
        parts = jnp.pad(a, ((0, 0), (0, spare)), mode="edge").reshape(a.shape[0], -1, size)
        return parts.min(axis=-1), parts.max(axis=-1)

    low, high = bounds(marks, size)
    other_low, other_high = bounds(other_marks, other_size)
    meets = (low[:, :, None] <= other_high[:, None]) & (other_low[:, None] <= high[:, :, None])
    some = meets.any(axis=-1)
    first = jnp.where(some, jnp.argmax(meets, axis=-1), 0)
    last = jnp.where(some, meets.shape[-1] - jnp.argmax(meets[..., ::-1], axis=-1), 0)
    return jnp.stack([first, last], axis=-1).astype(jnp.int32)


def padded(width: int) -> int:
    """Columns of a block: a power of two, and no less than Triton's products take."""
    return max(16, pl.next_power_of_2(width))


def _index(ref, batch, start, size: int, head):
    """Indices of rows start.. of a head in ref [B, L, H, W] or [B, L, W], and their mask or None:
    columns are filled up to `padded`, rows up to `size`."""
    length, width = ref.shape[1], ref.shape[-1]
    columns = padded(width)
    # A slice that is known to end beyond the array is refused, so it starts at a traced zero.
    rows = pl.ds(start, size)
    across = pl.ds(0 if columns == width else batch * 0, columns)
    index = (batch, rows, across) if head is None else (batch, rows, head, across)
    mask = None
    if length % size:
        mask = jnp.broadcast_to((start + jnp.arange(size) < length)[:, None], (size, columns))
    if columns != width:
        inside = jnp.broadcast_to((jnp.arange(columns) < width)[None], (size, columns))
        mask = inside if mask is None else mask & inside
    return index, mask


def read(ref, batch, start, size: int, head=None) -> jax.Array:
    """[size, W or padded], zeros beyond the array."""
    index, mask = _index(ref, batch, start, size, head)
    if mask is None:
        return plt.load(ref.at[index])
    return plt.load(ref.at[index], mask=mask, other=0.0)


def read_parts(nope, rope, batch, start, size: int, head, rope_head) -> tuple[jax.Array, ...]:
    """The parts that scores are sums over: nope, and rope where there is one."""
    first = read(nope, batch, start, size, head)
    return (first,) if rope is None else (first, read(rope, batch, start, size, rope_head))


def product(left: tuple[jax.Array, ...], right: tuple[jax.Array, ...]) -> jax.Array:
    """[rows of left, rows of right]: the products of their parts, summed."""
    return sum(
        (plt.dot(a, b, trans_b=True) for a, b in zip(left[1:], right[1:], strict=True)),
        plt.dot(left[0], right[0], trans_b=True),
    )


def write(ref, value: jax.Array, batch, start, head=None) -> None:
    """Writes what of [size, W or padded] lies inside the array."""
    index, mask = _index(ref, batch, start, value.shape[0], head)
    plt.store(ref.at[index], value, mask=mask)


def read_row(ref, index: tuple, start, size: int, other) -> jax.Array:
    """[size] from ref[*index, start:], `other` beyond its end."""
    where = ref.at[(*index, pl.ds(start, size))]
    if ref.shape[-1] % size == 0:
        return plt.load(where)
    return plt.load(where, mask=start + jnp.arange(size) < ref.shape[-1], other=other)


def write_row(ref, value: jax.Array, batch, start, head) -> None:
    """Writes [size] to ref[batch, start:, head], up to its end."""
    size, length = value.shape[0], ref.shape[1]
    mask = start + jnp.arange(size) < length if length % size else None
    plt.store(ref.at[batch, pl.ds(start, size), head], value, mask=mask)
