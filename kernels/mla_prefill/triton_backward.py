"""Latent prefill attention in Pallas-Triton, backward: NVIDIA GPUs from sm_80 on.

Two kernels, which recompute the probabilities from the log-sum-exp (FlashAttention-2, arXiv
2307.08691, algorithm 2): one owns a block of queries and walks over the keys, one owns a block of
keys and walks over the queries. Nothing is added up by atomics, so that a rerun gives the same
bits; the gradient of the rope key is written per head and summed over the heads afterwards.
B batch  T query  S key  H heads  N nope  R rope  V value
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from deepzoo.kernels.dispatch import compute_capability
from deepzoo.kernels.mla_prefill import xla
from deepzoo.kernels.mla_prefill.triton import (
    LOG2_E,
    Setting,
    Tile,
    block_ranges,
    clipped,
    exp2,
    key_blocks,
    product,
    read,
    read_parts,
    read_row,
    visible,
    write,
)  # fmt: skip


def backward(
    q_nope, q_rope, k_nope, k_rope, v, q_segments, k_segments, out, lse, d_out, d_lse, *,
    scale, q_offset, interpret=False, tiles=None,
):  # fmt: skip
    """(dq_nope, dq_rope, dk_nope, dk_rope, dv), see `api`; `tiles` overrides the choice.

    Without rope parts their gradients are None. With fewer heads of keys than of queries, the
    gradients to keys and values are written per query head too, and summed.
    """
    batch, queries, heads, _ = q_nope.shape
    keys = k_nope.shape[1]
    # [B, H, T], so that a block of a head's rows is contiguous.
    lse, delta = (a.swapaxes(1, 2) for a in xla.row_terms(out, lse, d_out, d_lse))
    lse2 = lse * LOG2_E
    static = q_offset if isinstance(q_offset, int) else None
    offset = q_offset if static is None else None
    arrays = (q_nope, q_rope, k_nope, k_rope, v, d_out.astype(v.dtype), lse2, delta)
    segments = (q_segments, k_segments)

    def call(kernel, tile, owner, own, walked, out_shape):
        ranges = None
        if q_segments is not None:
            mine, others = segments if owner == "queries" else segments[::-1]
            ranges = block_ranges(mine, others, own, walked)
        return pl.pallas_call(
            partial(kernel, setting=Setting(scale, static, tile, interpret)),
            grid=(heads, pl.cdiv(queries if owner == "queries" else keys, own), batch),
            out_shape=out_shape,
            compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
            interpret=interpret,
            name=f"mla_prefill_backward_{owner}",
        )(*arrays, *segments, offset, ranges)

    width = max(q_nope.shape[-1], v.shape[-1])
    to_queries, to_keys = (
        clipped(t, queries, keys) for t in (tiles or _tiles(q_nope.dtype, width))
    )

    def like(a, dtype=None, heads=None):
        shape = (*a.shape[:2], a.shape[2] if heads is None else heads, a.shape[-1])
        return jax.ShapeDtypeStruct(shape, dtype or a.dtype)

    ropes = [] if q_rope is None else [q_rope]
    to_q = call(
        _queries_kernel, to_queries, "queries", to_queries.queries, to_queries.keys,
        [like(a) for a in (q_nope, *ropes)],
    )  # fmt: skip
    shared = k_nope.shape[2] != heads
    own = {"dtype": jnp.float32, "heads": heads} if shared else {}
    outs = [like(k_nope, **own)]
    outs += [] if q_rope is None else [like(k_rope, jnp.float32, heads)]
    outs += [like(v, **own)]
    to_k = call(_keys_kernel, to_keys, "keys", to_keys.keys, to_keys.queries, outs)

    def summed(d, a):
        if d.shape == a.shape:
            return d
        d = d.reshape(*d.shape[:2], *((a.shape[2], -1) if a.ndim == 4 else (-1,)), d.shape[-1])
        return d.sum(axis=-2).astype(a.dtype)

    dk_nope, *dk_rope, dv = to_k
    dk_nope, dv = summed(dk_nope, k_nope), summed(dv, v)
    if q_rope is None:
        return to_q[0], None, dk_nope, None, dv
    return to_q[0], to_q[1], dk_nope, summed(dk_rope[0], k_rope), dv


def _queries_kernel(
    q_nope, q_rope, k_nope, k_rope, v, d_out, lse2, delta, q_segments, k_segments, q_offset,
    ranges, *outs, setting: Setting,
):  # fmt: skip
    tile = setting.tile
    head, batch = pl.program_id(0), pl.program_id(2)
    block = pl.num_programs(1) - 1 - pl.program_id(1)  # the longest first, as in the forward pass
    start = block * tile.queries
    factor = setting.scale * LOG2_E
    offset = q_offset[batch] if setting.offset is None else setting.offset
    of_keys = head // (q_nope.shape[2] // k_nope.shape[2])
    queries = read_parts(q_nope, q_rope, batch, start, tile.queries, head, head)
    gradient = read(d_out, batch, start, tile.queries, head)
    lses = read_row(lse2, (batch, head), start, tile.queries, 0.0)
    deltas = read_row(delta, (batch, head), start, tile.queries, 0.0)
    marks = None if q_segments is None else read_row(q_segments, (batch,), start, tile.queries, -1)

    def step(masked, j, carry):
        first = j * tile.keys
        keys = read_parts(k_nope, k_rope, batch, first, tile.keys, of_keys, None)
        weight = exp2(product(queries, keys) * factor - lses[:, None], setting.interpret)
        seen = visible(
            start, first, tile, offset if masked else None, k_nope.shape[1],
            marks, None if marks is None else read_row(k_segments, (batch,), first, tile.keys, -2),
        )  # fmt: skip
        if seen is not None:
            weight = jnp.where(seen, weight, 0.0)
        values = read(v, batch, first, tile.keys, of_keys)
        d_weight = plt.dot(gradient, values, trans_b=True)
        d_score = (weight * (d_weight - deltas[:, None])).astype(values.dtype)
        return tuple(a + plt.dot(d_score, b) for a, b in zip(carry, keys, strict=True))

    full, end = key_blocks(start + offset, tile, k_nope.shape[1])
    first = 0
    if ranges is not None:
        first = ranges[batch, block, 0]
        end = jnp.minimum(end, ranges[batch, block, 1])
        full = jnp.clip(full, first, end)
    carry = tuple(jnp.zeros(a.shape, jnp.float32) for a in queries)
    carry = jax.lax.fori_loop(first, full, partial(step, False), carry)
    carry = jax.lax.fori_loop(full, end, partial(step, True), carry)
    for ref, value in zip(outs, carry, strict=True):
        write(ref, (value * setting.scale).astype(ref.dtype), batch, start, head)


def _keys_kernel(
    q_nope, q_rope, k_nope, k_rope, v, d_out, lse2, delta, q_segments, k_segments, q_offset,
    ranges, *outs, setting: Setting,
):  # fmt: skip
    tile = setting.tile
    # The first keys are seen by most queries, and they start first.
    head, block, batch = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    first = block * tile.keys
    factor = setting.scale * LOG2_E
    offset = q_offset[batch] if setting.offset is None else setting.offset
    of_keys = head // (q_nope.shape[2] // k_nope.shape[2])
    keys = read_parts(k_nope, k_rope, batch, first, tile.keys, of_keys, None)
    values = read(v, batch, first, tile.keys, of_keys)
    marks = None if k_segments is None else read_row(k_segments, (batch,), first, tile.keys, -2)

    def step(masked, i, carry):
        *to_keys, to_value = carry
        start = i * tile.queries
        # Rows beyond the queries come as zeros, and so does what they add.
        queries = read_parts(q_nope, q_rope, batch, start, tile.queries, head, head)
        gradient = read(d_out, batch, start, tile.queries, head)
        lses = read_row(lse2, (batch, head), start, tile.queries, 0.0)
        deltas = read_row(delta, (batch, head), start, tile.queries, 0.0)
        weight = exp2(product(keys, queries) * factor - lses[None, :], setting.interpret)
        seen = None
        if masked:
            rows = start + jnp.arange(tile.queries)[None, :] + offset
            seen = rows >= first + jnp.arange(tile.keys)[:, None]
        if marks is not None:
            same = marks[:, None] == read_row(q_segments, (batch,), start, tile.queries, -1)[None]
            seen = same if seen is None else seen & same
        if seen is not None:
            weight = jnp.where(seen, weight, 0.0)
        d_weight = plt.dot(values, gradient, trans_b=True)
        d_score = (weight * (d_weight - deltas[None, :])).astype(values.dtype)
        return (
            *(a + plt.dot(d_score, b) for a, b in zip(to_keys, queries, strict=True)),
            to_value + plt.dot(weight.astype(gradient.dtype), gradient),
        )

    count = q_nope.shape[1]
    begin = jnp.clip(first - offset, 0, count) // tile.queries
    full = pl.cdiv(jnp.clip(first + tile.keys - 1 - offset, 0, count), tile.queries)
    end = pl.cdiv(count, tile.queries)
    if ranges is not None:
        end = jnp.minimum(end, ranges[batch, block, 1])
        begin = jnp.minimum(jnp.maximum(begin, ranges[batch, block, 0]), end)
        full = jnp.clip(full, begin, end)
    carry = tuple(jnp.zeros(a.shape, jnp.float32) for a in (*keys, values))
    carry = jax.lax.fori_loop(begin, full, partial(step, True), carry)
    carry = jax.lax.fori_loop(full, end, partial(step, False), carry)
    for n, (ref, value) in enumerate(zip(outs, carry, strict=True)):
        factor = 1.0 if n == len(keys) else setting.scale  # the last are the values
        write(ref, (value * factor).astype(ref.dtype), batch, first, head)


def _tiles(dtype: Any, width: int) -> tuple[Tile, Tile]:
    """For the gradients of the queries, and of keys and values."""
    if jnp.dtype(dtype).itemsize > 2:  # exact products, without tensor cores
        tile = Tile(32, 32, 4, 1) if width <= 64 else Tile(16, 16, 4, 1)
        return tile, tile
    major = (compute_capability() or (8, 0))[0]
    if major == 9:
        return Tile(128, 64, 8, 2), Tile(32, 64, 4, 2)
    if major == 10:
        return Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)
    return Tile(32, 64, 4, 2), Tile(32, 64, 8, 2)
