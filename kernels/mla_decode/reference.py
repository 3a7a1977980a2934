"""Latent decode attention in float64 NumPy, query by query."""

import numpy as np


def mla_decode(
    q_latent: np.ndarray,
    q_rope: np.ndarray,
    latent: np.ndarray,
    k_rope: np.ndarray,
    lengths: np.ndarray,
    *,
    scale: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Mixed latents float64 [B, T, H, C] and log-sum-exp float64 [B, T, H]; arguments as in
    `xla.mla_decode`."""
    q_latent, q_rope, latent, k_rope = (
        np.asarray(a, np.float64) for a in (q_latent, q_rope, latent, k_rope)
    )
    batch, queries, heads, _ = q_latent.shape
    lengths = np.broadcast_to(np.asarray(lengths).reshape(batch, -1), (batch, queries))
    out = np.zeros(q_latent.shape)
    lse = np.full((batch, queries, heads), -np.inf)
    for b in range(batch):
        for t in range(queries):
            n = int(lengths[b, t])
            if n == 0:
                continue
            score = (q_latent[b, t] @ latent[b, :n].T + q_rope[b, t] @ k_rope[b, :n].T) * scale
            top = score.max(axis=-1, keepdims=True)
            weight = np.exp(score - top)
            total = weight.sum(axis=-1, keepdims=True)
            out[b, t] = (weight / total) @ latent[b, :n]
            lse[b, t] = (np.log(total) + top)[:, 0]
    return out, lse
