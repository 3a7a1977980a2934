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
    q_offset: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Values float64 [B, T, H, V] and log-sum-exp float64 [B, T, H]; arguments as in
    `xla.mla_prefill`."""
    q_nope, q_rope, k_nope, k_rope, v = (
        np.asarray(a, np.float64) for a in (q_nope, q_rope, k_nope, k_rope, v)
    )
    batch, queries, heads, _ = q_nope.shape
    keys = np.arange(k_nope.shape[1])
    out = np.zeros((batch, queries, heads, v.shape[-1]))
    lse = np.full((batch, queries, heads), -np.inf)
    for b in range(batch):
        for t in range(queries):
            seen = keys <= t + q_offset
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
