"""Latent decode attention for NVIDIA GPUs in Pallas-Triton: one pass over the cache, cut in splits.

A thread block holds up to 64 rows (queries x heads of one sequence) and walks over its share of
the cache; each block of keys is loaded once and serves as key and value. A running maximum (arXiv
1805.02867) keeps the softmax online. The work is bound by the cache's bytes up to about 32 rows,
where the loads run `stages` blocks ahead of the arithmetic.
B batch  T query  H heads  R rows (T * H)  S cache capacity  C latent  Q rope  Z splits
P pages of the pool  L tokens a page  N pages a row
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from deepzoo.kernels.dispatch import compute_capability
from deepzoo.kernels.mla_decode.splits import choose_splits, multiprocessors

_LOG2E = math.log2(math.e)
# Finite, so that a block in which a row sees nothing leaves exp2(lowest - lowest) = 1, not NaN.
_LOWEST = float(jnp.finfo(jnp.float32).min)
_TINY = 1e-30  # a scale that can be divided by


class Tiles(NamedTuple):
    """Static sizes of a launch.

    rows: rows of a thread block, a power of two from 16 on.
    keys: cache entries of one step, a power of two from 16 on; divides a page.
    warps, stages: of the Triton compiler.
    resident: thread blocks a multiprocessor is counted on to hold.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    resident: int


def choose_tiles(
    rows: int, width: int, dtype: jnp.dtype, page_size: int | None, fp8: bool
) -> Tiles:
    """For R `rows` of `dtype` over entries of `width` numbers; fp8: of which most are float8.

    Shared memory holds the queries and `stages` - 1 key blocks. 32 keys of 576 bfloat16 are 36.9
    KB, so up to 32 rows an H200 (227 KB) holds two thread blocks with 74 KB each on their way or in
    use, several times what latency x bandwidth asks for (4.3 TB/s x 0.7 us / 132 = 23 KB). From 64
    rows on one thread block fills the registers (64 x 512 float32 are half of them). The sizes are
    the largest that ptxas compiles without spills.
    """
    capability = compute_capability() or (9, 0)
    tile = min(64, max(16, pl.next_power_of_2(rows)))
    keys = 32 if width * dtype.itemsize > 512 else 64
    if dtype == jnp.float32:
        tile, keys, warps, stages, resident = min(tile, 32), keys // 2, 8, 2, 1
    elif tile < 64:
        warps = 8 if fp8 or tile == 32 else 4
        stages = 3 if capability >= (9, 0) or fp8 else 2
        resident = 1 if fp8 else 2
    elif fp8:
        tile, warps, stages, resident = 32, 8, 2, 1
    elif capability == (9, 0):  # products of 64 rows through wgmma
        keys, warps, stages, resident = keys // 2, 8, 4, 1
    else:
        warps, stages, resident = 8, 2, 1
    return Tiles(tile, min(keys, page_size or keys), warps, stages, resident)


def _padded(size: int, held: int):
    """A slice of `size` from 0 on along an axis of `held`; the caller masks the difference.

    A traced start, since Pallas checks the end of a static one; the compiler folds it.
    """
    return pl.ds(0, size) if size == held else pl.ds(pl.program_id(0) * 0, size)


def _mask(outer: jax.Array, size: int, held: int) -> jax.Array:
    """Of a load [outer, size], where the last axis really holds `held`."""
    mask = outer[:, None]
    if size != held:
        mask &= jnp.arange(size)[None, :] < held
    return jnp.broadcast_to(mask, (outer.size, size))


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Contracts a's last axis with `axis` of b; float32 operands keep their precision."""
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def widen_bits(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """e4m3 numbers given as uint8 -> `dtype`, for GPUs that lack the conversion (before sm_89).

    The seven low bits, shifted to their places in a float32 and with the exponent's bias changed,
    are the number itself; a subnormal one (below 8) then reads 2^-7 (1 + m / 8) in place of
    2^-6 m / 8. No subnormal float32 comes up on the way: hardware may flush those.
    """
    wide = bits.astype(jnp.int32)
    size = wide & 0x7F
    value = jax.lax.bitcast_convert_type((size << 20) + (120 << 23), jnp.float32)
    value = jnp.where(size < 8, 2 * value - 2.0**-6, value)
    return jnp.where(wide < 128, value, -value).astype(dtype)


def _attend(*refs, heads: int, scale: float, tiles: Tiles, splits: int, paged: bool, scaled: bool):
    """One tile of rows, one split, one sequence. Grid (row tiles, Z, B), tiles fastest, so that
    the tiles of one sequence run together and share its cache in L2.
    """
    refs = list(refs)
    q_ref, q_rope_ref, latent_ref, k_rope_ref, lengths_ref = refs[:5]
    pages_ref = refs[5] if paged else None
    latent_scale_ref = refs[5 + paged] if scaled else None
    out_ref, lse_ref = refs[-2:]
    rows, width = q_ref.shape[1:]
    rope = q_rope_ref.shape[2]
    capacity = latent_ref.shape[1] * (1 if pages_ref is None else pages_ref.shape[1])
    columns, rope_columns = (max(16, pl.next_power_of_2(n)) for n in (width, rope))
    tile, split, batch = (pl.program_id(i) for i in range(3))

    row = tile * tiles.rows + jnp.arange(tiles.rows)
    row_held = row < rows
    here = pl.ds(tile * tiles.rows, tiles.rows)
    every, every_rope = _padded(columns, width), _padded(rope_columns, rope)
    query_held = _mask(row_held, columns, width)
    q = plt.load(q_ref.at[batch, here, every], mask=query_held, other=0.0)
    q_rope = plt.load(
        q_rope_ref.at[batch, here, every_rope],
        mask=_mask(row_held, rope_columns, rope),
        other=0.0,
    )
    query = jnp.minimum(row // heads, lengths_ref.shape[1] - 1)
    length = plt.load(lengths_ref.at[batch, query], mask=row_held, other=0)
    length = jnp.minimum(length, capacity)
    end = length.max()

    blocks = pl.cdiv(end, tiles.keys)
    share = pl.cdiv(blocks, splits)
    first = split * share
    last = jnp.minimum(first + share, blocks)

    def page_of(index):
        # Of a block that is visited; beyond them no entry of the table is read.
        assert pages_ref is not None
        at = index * tiles.keys // latent_ref.shape[1]
        return plt.load(pages_ref.at[batch, at], mask=index < last, other=0)

    def step(index, carry):
        top, total, mass, out, owner = carry
        start = index * tiles.keys
        position = start + jnp.arange(tiles.keys)
        offset = start if pages_ref is None else start % latent_ref.shape[1]
        there = pl.ds(offset, tiles.keys)
        held = position < end
        # Nobody sees what lies behind `end`; as a value it is multiplied by 0, so it must not be
        # NaN.
        latent = plt.load(
            latent_ref.at[owner, there, every],
            mask=_mask(held, columns, width),
            other=0.0 if jnp.issubdtype(latent_ref.dtype, jnp.floating) else 0,
        )
        k_rope = plt.load(
            k_rope_ref.at[owner, there, every_rope],
            mask=_mask(held, rope_columns, rope),
            other=0.0,
        )
        if latent_ref.dtype == jnp.uint8:
            latent = widen_bits(latent, q.dtype)
        elif scaled:
            latent = latent.astype(q.dtype)
        score = _dot(q, latent, 1)
        token_scale = None
        if latent_scale_ref is not None:
            token_scale = plt.load(latent_scale_ref.at[owner, there], mask=held, other=1.0)
            token_scale = jnp.maximum(token_scale, _TINY)  # a token of zeros may have 0
            score *= token_scale[None, :]
        score += _dot(q_rope, k_rope, 1)
        visible = position[None, :] < length[:, None]
        score = jnp.where(visible, score * (scale * _LOG2E), -jnp.inf)
        new_top = jnp.maximum(top, score.max(axis=1))
        decay = jnp.exp2(top - new_top)
        weight = jnp.exp2(score - new_top[:, None])
        total = total * decay + weight.sum(axis=1)
        if token_scale is None:
            mass, rounded = total, weight.astype(latent.dtype)
        else:
            # Rounding a scaled weight may move all it stands for to one side, and where few tokens
            # count, nothing evens that out: so the sum that divides is of the rounded weights.
            rounded = (weight * token_scale[None, :]).astype(latent.dtype)
            used = rounded.astype(jnp.float32) * (1 / token_scale)[None, :]
            mass = mass * decay + used.sum(axis=1)
        out = out * decay[:, None] + _dot(rounded, latent, 0)
        # One step ahead: a load whose address is itself being loaded is not pipelined by Triton.
        return new_top, total, mass, out, owner if pages_ref is None else page_of(index + 1)

    start = (
        jnp.full((tiles.rows,), _LOWEST, jnp.float32),
        jnp.zeros((tiles.rows,), jnp.float32),
        jnp.zeros((tiles.rows,), jnp.float32),
        jnp.zeros((tiles.rows, columns), jnp.float32),
        batch if pages_ref is None else page_of(first),
    )
    top, total, mass, out, _ = jax.lax.fori_loop(first, last, step, start)
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    lse = jnp.where(seen, (top + jnp.log2(safe)) / _LOG2E, -jnp.inf)
    out = out * (1 / jnp.where(seen, mass, 1.0))[:, None]
    plt.store(
        out_ref.at[batch, split, here, every], out.astype(out_ref.dtype),
        mask=query_held,
    )  # fmt: skip
    plt.store(lse_ref.at[batch, split, here], lse, mask=row_held)


def _combine(out_ref, lse_ref, mixed_ref, total_ref, *, chunk: int):
    """One row of one sequence: Z parts of C numbers, `chunk` parts at a time."""
    splits, _, width = out_ref.shape[1:]
    columns = pl.next_power_of_2(width)
    row, batch = pl.program_id(0), pl.program_id(1)
    every = _padded(columns, width)
    padded = pl.next_power_of_2(splits)
    lse = plt.load(
        lse_ref.at[batch, _padded(padded, splits), row],
        mask=jnp.arange(padded) < splits,
        other=-jnp.inf,
    )
    top = lse.max()
    base = jnp.where(top == -jnp.inf, 0.0, top)
    total = jnp.exp(lse - base).sum()
    column_held = jnp.arange(columns) < width

    def step(index, mixed):
        part = index * chunk + jnp.arange(chunk)
        here = pl.ds(index * chunk, chunk)
        held = part < splits
        part_lse = plt.load(lse_ref.at[batch, here, row], mask=held, other=-jnp.inf)
        out = plt.load(
            out_ref.at[batch, here, row, every],
            mask=_mask(held, columns, width),
            other=0.0,
        )
        return mixed + (out * jnp.exp(part_lse - base)[:, None]).sum(axis=0)

    mixed = jax.lax.fori_loop(0, pl.cdiv(splits, chunk), step, jnp.zeros((columns,), jnp.float32))
    safe = jnp.where(total > 0, total, 1.0)
    plt.store(
        mixed_ref.at[batch, row, every], (mixed / safe).astype(mixed_ref.dtype),
        mask=column_held,
    )  # fmt: skip
    total_ref[batch, row] = jnp.where(total > 0, jnp.log(safe) + base, -jnp.inf)


def combine(
    out: jax.Array, lse: jax.Array, dtype: jnp.dtype, *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """`splits.combine` in one launch."""
    batch, splits, rows, width = out.shape
    return pl.pallas_call(
        partial(_combine, chunk=min(8, pl.next_power_of_2(splits))),
        grid=(rows, batch),
        out_shape=(
            jax.ShapeDtypeStruct((batch, rows, width), dtype),
            jax.ShapeDtypeStruct((batch, rows), jnp.float32),
        ),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="mla_decode_combine",
    )(out, lse)


def mla_decode(
    q_latent: jax.Array,
    q_rope: jax.Array,
    latent: jax.Array,
    k_rope: jax.Array,
    lengths: jax.Array,
    pages: jax.Array | None = None,
    latent_scale: jax.Array | None = None,
    *,
    scale: float,
    interpret: bool = False,
    splits: int | None = None,
    by_bits: bool | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Arguments and results as of `api.mla_decode`, with lengths int32 [B, T].

    splits: chosen by `splits.choose_splits` if None.
    by_bits: whether e4m3 is widened by `widen_bits`; by the GPU's capability if None.
    """
    batch, queries, heads, width = q_latent.shape
    rows, rope = queries * heads, q_rope.shape[-1]
    page_size = None if pages is None else latent.shape[1]
    tiles = choose_tiles(
        rows, width + rope, q_latent.dtype, page_size, fp8=latent_scale is not None
    )
    row_tiles = pl.cdiv(rows, tiles.rows)
    if splits is None:
        capacity = latent.shape[1] if pages is None else pages.shape[1] * latent.shape[1]
        splits = choose_splits(
            batch * row_tiles,
            pl.cdiv(capacity, tiles.keys),
            multiprocessors() * tiles.resident,
            overhead=4,
        )
    if latent_scale is not None:
        if by_bits is None:
            capability = compute_capability()
            by_bits = capability is not None and capability < (8, 9)
        if by_bits:
            latent = jax.lax.bitcast_convert_type(latent, jnp.uint8)
    dtype = q_latent.dtype if splits == 1 else jnp.float32
    extra = [a for a in (pages, latent_scale) if a is not None]
    out, lse = pl.pallas_call(
        partial(
            _attend,
            heads=heads,
            scale=scale,
            tiles=tiles,
            splits=splits,
            paged=pages is not None,
            scaled=latent_scale is not None,
        ),
        grid=(row_tiles, splits, batch),
        out_shape=(
            jax.ShapeDtypeStruct((batch, splits, rows, width), dtype),
            jax.ShapeDtypeStruct((batch, splits, rows), jnp.float32),
        ),
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="mla_decode",
    )(
        q_latent.reshape(batch, rows, width),
        q_rope.reshape(batch, rows, rope),
        latent,
        k_rope,
        lengths,
        *extra,
    )
    if splits == 1:
        out, lse = out[:, 0], lse[:, 0]
    else:
        out, lse = combine(out, lse, q_latent.dtype, interpret=interpret)
    return out.reshape(q_latent.shape), lse.reshape(batch, queries, heads)
