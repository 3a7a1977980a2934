"""Latent prefill attention in float64 NumPy, query by query."""

import numpy as np


def mla_prefill(
    q_nope: np.ndarray,
    q_rope: np.ndarray,
    k_nope: np.ndarray,
    k_rope: np.ndarray,
    v: np.ndarray,
    *,
    scale: float,
    q_segments: np.ndarray | None = None,
    k_segments: np.ndarray | None = None,
    q_offset: int | np.ndarray = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Values float64 [B, T, H, V] and log-sum-exp float64 [B, T, H]; arguments as in
    `api.mla_prefill`."""
    q_nope, q_rope, k_nope, k_rope, v = (
        np.asarray(a, np.float64) for a in (q_nope, q_rope, k_nope, k_rope, v)
    )
    batch, queries, heads, _ = q_nope.shape
    keys = np.arange(k_nope.shape[1])
    first = np.broadcast_to(q_offset, batch)
    out = np.zeros((batch, queries, heads, v.shape[-1]))
    lse = np.full((batch, queries, heads), -np.inf)
    for b in range(batch):
        for t in range(queries):
            seen = keys <= t + first[b]
            if q_segments is not None and k_segments is not None:
                seen = seen & (k_segments[b] == q_segments[b, t])
            if not seen.any():
                continue
            score = np.einsum("hn,shn->hs", q_nope[b, t], k_nope[b, seen])
            score = (score + q_rope[b, t] @ k_rope[b, seen].T) * scale
            top = score.max(axis=-1, keepdims=True)
            weight = np.exp(score - top)
            total = weight.sum(axis=-1, keepdims=True)
            out[b, t] = np.einsum("hs,shv->hv", weight / total, v[b, seen])
            lse[b, t] = (np.log(total) + top)[:, 0]
    return out, lse


def backward(
    q_nope: np.ndarray,
    q_rope: np.ndarray,
    k_nope: np.ndarray,
    k_rope: np.ndarray,
    v: np.ndarray,
    d_out: np.ndarray,
    d_lse: np.ndarray,
    *,
    scale: float,
    q_segments: np.ndarray | None = None,
    k_segments: np.ndarray | None = None,
    q_offset: int | np.ndarray = 0,
) -> tuple[np.ndarray, ...]:
    """Gradients float64 of the first five arguments for the cotangents of both results."""
    arrays = [np.asarray(a, np.float64) for a in (q_nope, q_rope, k_nope, k_rope, v)]
    q_nope, q_rope, k_nope, k_rope, v = arrays
    d_out, d_lse = np.asarray(d_out, np.float64), np.asarray(d_lse, np.float64)
    batch, queries, _, _ = q_nope.shape
    keys = np.arange(k_nope.shape[1])
    first = np.broadcast_to(q_offset, batch)
    dq_nope, dq_rope, dk_nope, dk_rope, dv = (np.zeros_like(a) for a in arrays)
    for b in range(batch):
        for t in range(queries):
            seen = keys <= t + first[b]
            if q_segments is not None and k_segments is not None:
                seen = seen & (k_segments[b] == q_segments[b, t])
            if not seen.any():
                continue
            score = np.einsum("hn,shn->hs", q_nope[b, t], k_nope[b, seen])
            score = (score + q_rope[b, t] @ k_rope[b, seen].T) * scale
            weight = np.exp(score - score.max(axis=-1, keepdims=True))
            weight /= weight.sum(axis=-1, keepdims=True)
            d_weight = np.einsum("hv,shv->hs", d_out[b, t], v[b, seen])
            mean = (weight * d_weight).sum(axis=-1, keepdims=True)
            d_score = weight * (d_weight - mean + d_lse[b, t][:, None]) * scale
            dq_nope[b, t] = np.einsum("hs,shn->hn", d_score, k_nope[b, seen])
            dq_rope[b, t] = d_score @ k_rope[b, seen]
            dk_nope[b, seen] += np.einsum("hs,hn->shn", d_score, q_nope[b, t])
            dk_rope[b, seen] += d_score.T @ q_rope[b, t]
            dv[b, seen] += np.einsum("hs,hv->shv", weight, d_out[b, t])
    return dq_nope, dq_rope, dk_nope, dk_rope, dv
