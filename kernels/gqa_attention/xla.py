"""Grouped-query attention in XLA: whole sequences in chunks of queries, forward and backward, and
the blockwise loop over a cache for decode.

B batch  T query  S key or cache capacity  H query heads  G key/value heads  D head size
"""

from typing import Any

import jax
import jax.numpy as jnp

from deepzoo.kernels.mla_decode.xla import attend_blocks
from deepzoo.kernels.mla_prefill import xla as prefill


def forward(q, k, v, segments, *, scale: float):
    """(out, log-sum-exp float32 [B, T, H]), see `api.gqa_attention`."""
    k, v = (_per_head(a, q) for a in (k, v))
    return prefill.forward(q, None, k, None, v, segments, segments, scale=scale, q_offset=0)


def backward(q, k, v, segments, out, lse, d_out, *, scale: float):
    """(dq, dk, dv)."""
    keys, values = (_per_head(a, q) for a in (k, v))
    dq, _, dk, _, dv = prefill.backward(
        q, None, keys, None, values, segments, segments, out, lse, d_out, 0.0, scale=scale,
        q_offset=0,
    )  # fmt: skip
    return dq, *(_per_group(d, a) for d, a in ((dk, k), (dv, v)))


def _per_head(a: jax.Array, q: jax.Array) -> jax.Array:
    share = q.shape[2] // a.shape[2]
    return a if share == 1 else jnp.repeat(a, share, axis=2)


def _per_group(d: Any, a: jax.Array) -> jax.Array:
    if d.shape == a.shape:
        return d
    grouped = d.reshape(*a.shape[:3], -1, a.shape[3]).astype(jnp.float32)
    return grouped.sum(axis=3).astype(a.dtype)


def gqa_decode(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, *, scale: float
) -> jax.Array:
    """Attention over a cache, of which query (b, t) sees the first `lengths[b, t]` entries.

    Args:
        q: [B, T, H, D].
        k: [B, S, G, D].
        v: [B, S, G, D].
        lengths: int32 [B] or [B, T].
        scale: softmax scale.

    Returns:
        [B, T, H, D] in q's dtype.
    """
    batch, queries, heads, width = q.shape
    groups = k.shape[2]
    lengths = jnp.broadcast_to(lengths.reshape(batch, -1), (batch, queries))
    grouped = q.reshape(batch, queries, groups, heads // groups, width)

    def score(cut):
        s = jnp.einsum("btgqd,bsgd->bgqts", grouped, cut(k), preferred_element_type=jnp.float32)
        return s.reshape(batch, heads, queries, -1) * scale

    def mix(weight, cut):
        # In float32: XLA:CPU has no bfloat16 product for this layout.
        values = cut(v).astype(jnp.float32)
        w = weight.reshape(batch, groups, heads // groups, queries, -1)
        out = jnp.einsum("bgqts,bsgd->bgqtd", w, values)
        return out.reshape(batch, heads, queries, width)

    return attend_blocks(score, mix, lengths, k.shape[1], (batch, queries, heads, width))[0].astype(
        q.dtype
    )
