"""Grouped-query attention in float64 NumPy, query by query."""

import numpy as np


def gqa_decode(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, lengths: np.ndarray, *, scale: float
) -> np.ndarray:
    """float64 [B, T, H, D]; arguments as in `xla.gqa_decode`. Whole sequences: lengths[b, t] = t +
    1."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    batch, queries, heads, _ = q.shape
    share = heads // k.shape[2]
    lengths = np.broadcast_to(np.asarray(lengths).reshape(batch, -1), (batch, queries))
    out = np.zeros(q.shape)
    for b in range(batch):
        for t in range(queries):
            for h in range(heads):
                keys, values = k[b, : lengths[b, t], h // share], v[b, : lengths[b, t], h // share]
                if len(keys):
                    score = keys @ q[b, t, h] * scale
                    weight = np.exp(score - score.max())
                    out[b, t, h] = weight / weight.sum() @ values
    return out
