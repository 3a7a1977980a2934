"""Latent prefill attention in XLA, in query chunks: memory grows linearly with the sequence.

B batch  T query  S key  H heads  N nope  R rope  V value
"""

import jax
import jax.numpy as jnp

_CHUNK = 128
_UNROLLED = 16  # up to this many chunks each one only reads the keys before its end


def mla_prefill(
    q_nope: jax.Array,
    q_rope: jax.Array,
    k_nope: jax.Array,
    k_rope: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    q_segments: jax.Array | None = None,
    k_segments: jax.Array | None = None,
    q_offset: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Causal attention with expanded heads; differentiable, scores recomputed in the backward pass.

    Args:
        q_nope: [B, T, H, N].
        q_rope: [B, T, H, R], rotated.
        k_nope: [B, S, H, N].
        k_rope: [B, S, R], rotated, one for all heads.
        v: [B, S, H, V].
        scale: softmax scale.
        q_segments: int32 [B, T]; a query sees only keys of its own segment (packed sequences,
            padding).
        k_segments: int32 [B, S]; given with q_segments.
        q_offset: index of the first query among the keys.

    Returns:
        Values [B, T, H, V] in v's dtype, and log-sum-exp float32 [B, T, H]; a query that sees
        nothing gets 0 and -inf.

    Raises:
        ValueError: only one of the two segment arrays is given.
    """
    if (q_segments is None) != (k_segments is None):
        raise ValueError("mla_prefill: q_segments and k_segments come together or not at all")
    queries, keys = q_nope.shape[1], k_nope.shape[1]

    def part(start, size, seen, q_nope, q_rope, k_nope, k_rope, v):
        def rows(a):
            return jax.lax.dynamic_slice_in_dim(a, start, size, axis=1)

        score = jnp.einsum(
            "bthn,bshn->bhts", rows(q_nope), k_nope[:, :seen], preferred_element_type=jnp.float32
        )
        score += jnp.einsum(
            "bthr,bsr->bhts", rows(q_rope), k_rope[:, :seen], preferred_element_type=jnp.float32
        )
        visible = (jnp.arange(size)[:, None] + start + q_offset >= jnp.arange(seen))[None]
        if q_segments is not None and k_segments is not None:
            visible = visible & (rows(q_segments)[..., None] == k_segments[:, None, :seen])
        score = jnp.where(visible[:, None], score * scale, -jnp.inf)
        top = jax.lax.stop_gradient(
            jnp.maximum(score.max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
        )
        weight = jnp.exp(score - top)
        total = weight.sum(axis=-1, keepdims=True)
        safe = jnp.where(total > 0, total, 1.0)
        out = jnp.einsum("bhts,bshv->bthv", (weight / safe).astype(v.dtype), v[:, :seen])
        lse = jnp.where(total > 0, jnp.log(safe) + top, -jnp.inf)[..., 0]
        return out, lse.swapaxes(1, 2)

    chunks = -(-queries // _CHUNK)
    arrays = (q_nope, q_rope, k_nope, k_rope, v)
    part = jax.checkpoint(part, static_argnums=(1, 2))
    if chunks <= _UNROLLED:
        parts = []
        for start in range(0, queries, _CHUNK):
            size = min(_CHUNK, queries - start)
            parts.append(part(start, size, min(start + size + q_offset, keys), *arrays))
        outs, lses = zip(*parts, strict=True)
        return jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=1)
    spare = -queries % _CHUNK
    if spare:
        q_nope, q_rope = (
            jnp.pad(a, ((0, 0), (0, spare), (0, 0), (0, 0))) for a in (q_nope, q_rope)
        )
        if q_segments is not None:
            q_segments = jnp.pad(q_segments, ((0, 0), (0, spare)), constant_values=-1)
    arrays = (q_nope, q_rope, k_nope, k_rope, v)
    out, lse = jax.lax.map(
        lambda start: part(start, _CHUNK, keys, *arrays), jnp.arange(chunks) * _CHUNK
    )
    out, lse = (jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *a.shape[3:]) for a in (out, lse))
    return out[:, :queries], lse[:, :queries]


def merge(
    left: jax.Array, left_lse: jax.Array, right: jax.Array, right_lse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attention over the union of two disjoint key sets from the results over each: values [...,
    V], lse [...]."""
    top = jnp.maximum(jnp.maximum(left_lse, right_lse), jnp.finfo(jnp.float32).min)
    a, b = jnp.exp(left_lse - top), jnp.exp(right_lse - top)
    total = jnp.where(a + b > 0, a + b, 1.0)
    out = (left * (a / total)[..., None] + right * (b / total)[..., None]).astype(left.dtype)
    return out, jnp.where(a + b > 0, jnp.log(total) + top, -jnp.inf)
