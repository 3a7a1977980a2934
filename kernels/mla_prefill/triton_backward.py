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
    read,
    read_row,
    visible,
    write,
)  # fmt: skip


def backward(
    q_nope, q_rope, k_nope, k_rope, v, q_segments, k_segments, out, lse, d_out, d_lse, *,
    scale, q_offset, interpret=False, tiles=None,
):  # fmt: skip
    """(dq_nope, dq_rope, dk_nope, dk_rope, dv), see `api`; `tiles` overrides the choice."""
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
    dq_nope, dq_rope = call(
        _queries_kernel, to_queries, "queries", to_queries.queries, to_queries.keys,
        [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q_nope, q_rope)],
    )  # fmt: skip
    per_head = jax.ShapeDtypeStruct((batch, keys, heads, k_rope.shape[-1]), jnp.float32)
    dk_nope, dk_rope, dv = call(
        _keys_kernel, to_keys, "keys", to_keys.keys, to_keys.queries,
        [
            jax.ShapeDtypeStruct(k_nope.shape, k_nope.dtype),
            per_head,
            jax.ShapeDtypeStruct(v.shape, v.dtype),
        ],
    )  # fmt: skip
    return dq_nope, dq_rope, dk_nope, dk_rope.sum(axis=2).astype(k_rope.dtype), dv


def _queries_kernel(
    q_nope, q_rope, k_nope, k_rope, v, d_out, lse2, delta, q_segments, k_segments, q_offset,
    ranges, dq_nope, dq_rope, *, setting: Setting,
):  # fmt: skip
    tile = setting.tile
    head, batch = pl.program_id(0), pl.program_id(2)
    block = pl.num_programs(1) - 1 - pl.program_id(1)  # the longest first, as in the forward pass
    start = block * tile.queries
    factor = setting.scale * LOG2_E
    offset = q_offset[batch] if setting.offset is None else setting.offset
    nope = read(q_nope, batch, start, tile.queries, head)
    rope = read(q_rope, batch, start, tile.queries, head)
    gradient = read(d_out, batch, start, tile.queries, head)
    lses = read_row(lse2, (batch, head), start, tile.queries, 0.0)
    deltas = read_row(delta, (batch, head), start, tile.queries, 0.0)
    marks = None if q_segments is None else read_row(q_segments, (batch,), start, tile.queries, -1)

    def step(masked, j, carry):
        to_nope, to_rope = carry
        first = j * tile.keys
        keys = read(k_nope, batch, first, tile.keys, head)
        ropes = read(k_rope, batch, first, tile.keys)
        score = plt.dot(nope, keys, trans_b=True) + plt.dot(rope, ropes, trans_b=True)
        weight = exp2(score * factor - lses[:, None], setting.interpret)
        seen = visible(
            start, first, tile, offset if masked else None, k_nope.shape[1],
            marks, None if marks is None else read_row(k_segments, (batch,), first, tile.keys, -2),
        )  # fmt: skip
        if seen is not None:
            weight = jnp.where(seen, weight, 0.0)
        values = read(v, batch, first, tile.keys, head)
        d_weight = plt.dot(gradient, values, trans_b=True)
        d_score = (weight * (d_weight - deltas[:, None])).astype(keys.dtype)
        return to_nope + plt.dot(d_score, keys), to_rope + plt.dot(d_score, ropes)

    full, end = key_blocks(start + offset, tile, k_nope.shape[1])
    first = 0
    if ranges is not None:
        first = ranges[batch, block, 0]
        end = jnp.minimum(end, ranges[batch, block, 1])
        full = jnp.clip(full, first, end)
    carry = tuple(jnp.zeros(a.shape, jnp.float32) for a in (nope, rope))
    carry = jax.lax.fori_loop(first, full, partial(step, False), carry)
    carry = jax.lax.fori_loop(full, end, partial(step, True), carry)
    for ref, value in zip((dq_nope, dq_rope), carry, strict=True):
        write(ref, (value * setting.scale).astype(ref.dtype), batch, start, head)


def _keys_kernel(
    q_nope, q_rope, k_nope, k_rope, v, d_out, lse2, delta, q_segments, k_segments, q_offset,
    ranges, dk_nope, dk_rope, dv, *, setting: Setting,
):  # fmt: skip
    tile = setting.tile
    # The first keys are seen by most queries, and they start first.
    head, block, batch = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    first = block * tile.keys
    factor = setting.scale * LOG2_E
    offset = q_offset[batch] if setting.offset is None else setting.offset
    keys = read(k_nope, batch, first, tile.keys, head)
    ropes = read(k_rope, batch, first, tile.keys)
    values = read(v, batch, first, tile.keys, head)
    marks = None if k_segments is None else read_row(k_segments, (batch,), first, tile.keys, -2)

    def step(masked, i, carry):
        to_nope, to_rope, to_value = carry
        start = i * tile.queries
        # Rows beyond the queries come as zeros, and so does what they add.
        nope = read(q_nope, batch, start, tile.queries, head)
        rope = read(q_rope, batch, start, tile.queries, head)
        gradient = read(d_out, batch, start, tile.queries, head)
        lses = read_row(lse2, (batch, head), start, tile.queries, 0.0)
        deltas = read_row(delta, (batch, head), start, tile.queries, 0.0)
        score = plt.dot(keys, nope, trans_b=True) + plt.dot(ropes, rope, trans_b=True)
        weight = exp2(score * factor - lses[None, :], setting.interpret)
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
        d_score = (weight * (d_weight - deltas[None, :])).astype(nope.dtype)
        return (
            to_nope + plt.dot(d_score, nope),
            to_rope + plt.dot(d_score, rope),
            to_value + plt.dot(weight.astype(gradient.dtype), gradient),
        )

    queries = q_nope.shape[1]
    begin = jnp.clip(first - offset, 0, queries) // tile.queries
    full = pl.cdiv(jnp.clip(first + tile.keys - 1 - offset, 0, queries), tile.queries)
    end = pl.cdiv(queries, tile.queries)
    if ranges is not None:
        end = jnp.minimum(end, ranges[batch, block, 1])
        begin = jnp.minimum(jnp.maximum(begin, ranges[batch, block, 0]), end)
        full = jnp.clip(full, begin, end)
    carry = tuple(jnp.zeros(a.shape, jnp.float32) for a in (keys, ropes, values))
    carry = jax.lax.fori_loop(begin, full, partial(step, True), carry)
    to_nope, to_rope, to_value = jax.lax.fori_loop(full, end, partial(step, False), carry)
    for ref, value in ((dk_nope, to_nope), (dk_rope, to_rope)):
        write(ref, (value * setting.scale).astype(ref.dtype), batch, first, head)
    write(dv, to_value.astype(dv.dtype), batch, first, head)


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
