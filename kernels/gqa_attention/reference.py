"""Grouped-query attention in float64 NumPy, query by query."""

import numpy as np

from deepzoo.kernels.mla_prefill import reference as mla


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


def gqa_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, *, scale: float, segments: np.ndarray | None = None
) -> np.ndarray:
    """float64 [B, T, H, D]; arguments as in `api.gqa_attention`."""
    return _prefill(q, k, v, segments, scale)[0]


def backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    d_out: np.ndarray,
    *,
    scale: float,
    segments: np.ndarray | None = None,
) -> tuple[np.ndarray, ...]:
    """Gradients float64 of q, k and v."""
    keys, values = (np.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    none = [np.zeros((*a.shape, 1)) for a in (q[..., 0], k[..., 0, 0])]
    dq, _, dk, _, dv = mla.backward(
        q, none[0], keys, none[1], values, d_out, np.zeros(q.shape[:3]), scale=scale,
        q_segments=segments, k_segments=segments,
    )  # fmt: skip
    grouped = (d.reshape(*k.shape[:3], -1, k.shape[3]).sum(axis=3) for d in (dk, dv))
    return dq, *grouped


def _prefill(q, k, v, segments, scale):
    keys, values = (np.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    none = [np.zeros((*a.shape, 1)) for a in (q[..., 0], k[..., 0, 0])]
    return mla.mla_prefill(
        q, none[0], keys, none[1], values, scale=scale, q_segments=segments, k_segments=segments
    )
