"""Grouped-query attention: jax.nn's for whole sequences, the blockwise loop over a cache for
decode.

B batch  T query  S key or cache capacity  H query heads  G key/value heads  D head size
"""

import jax
import jax.numpy as jnp

from deepzoo.kernels.mla_decode.xla import attend_blocks


def gqa_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float, segments: jax.Array | None = None
) -> jax.Array:
    """Causal attention within a sequence; differentiable.

    Args:
        q: [B, T, H, D].
        k: [B, T, G, D], G a divisor of H.
        v: [B, T, G, D].
        scale: softmax scale.
        segments: int32 [B, T]; a query sees only keys of its own segment.

    Returns:
        [B, T, H, D] in v's dtype.
    """
    mask = None if segments is None else (segments[:, None, :, None] == segments[:, None, None, :])
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, is_causal=True)


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
