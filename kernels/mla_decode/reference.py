"""Latent decode attention in float64 NumPy, query by query.

B batch  T query  S cache capacity  H heads  C latent  R rope  P pages of the pool  L tokens a page
N pages a row
"""

import numpy as np


def gather_pages(pool: np.ndarray, pages: np.ndarray, length: int) -> np.ndarray:
    """The first `length` entries of one row: pool [P, L, ...], pages int [N] -> [length, ...]."""
    size = pool.shape[1]
    used = pages[: -(-length // size)]
    return pool[used].reshape(-1, *pool.shape[2:])[:length]


def mla_decode(
    q_latent: np.ndarray,
    q_rope: np.ndarray,
    latent: np.ndarray,
    k_rope: np.ndarray,
    lengths: np.ndarray,
    *,
    scale: float,
    pages: np.ndarray | None = None,
    latent_scale: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Mixed latents float64 [B, T, H, C] and log-sum-exp float64 [B, T, H]; arguments as in
    `api.mla_decode`."""
    q_latent, q_rope, latent, k_rope = (
        np.asarray(a, np.float64) for a in (q_latent, q_rope, latent, k_rope)
    )
    if latent_scale is not None:
        latent = latent * np.asarray(latent_scale, np.float64)[..., None]
    batch, queries, heads, _ = q_latent.shape
    lengths = np.broadcast_to(np.asarray(lengths).reshape(batch, -1), (batch, queries))
    out = np.zeros(q_latent.shape)
    lse = np.full((batch, queries, heads), -np.inf)
    for b in range(batch):
        for t in range(queries):
            n = int(lengths[b, t])
            if n == 0:
                continue
            if pages is None:
                keys, ropes = latent[b, :n], k_rope[b, :n]
            else:
                row = np.asarray(pages)[b]
                keys, ropes = gather_pages(latent, row, n), gather_pages(k_rope, row, n)
            score = (q_latent[b, t] @ keys.T + q_rope[b, t] @ ropes.T) * scale
            top = score.max(axis=-1, keepdims=True)
            weight = np.exp(score - top)
            total = weight.sum(axis=-1, keepdims=True)
            out[b, t] = (weight / total) @ keys
            lse[b, t] = (np.log(total) + top)[:, 0]
    return out, lse
