"""Grouped matmul, its gradients and the fused SwiGLU in float64 NumPy.

M rows  K input width  N output width  E groups
"""

import numpy as np


def _groups(group_sizes: np.ndarray):
    """Each group's number and rows."""
    ends = np.cumsum(np.asarray(group_sizes, np.int64))
    for group, end in enumerate(ends):
        yield group, slice(end - int(group_sizes[group]), end)


def grouped_matmul(x: np.ndarray, w: np.ndarray, group_sizes: np.ndarray) -> np.ndarray:
    """x [M, K], w [E, N, K], group_sizes [E] -> float64 [M, N]; rows beyond the sum of the sizes
    are zero."""
    out = np.zeros((x.shape[0], w.shape[1]))
    for group, rows in _groups(group_sizes):
        out[rows] = np.asarray(x[rows], np.float64) @ np.asarray(w[group], np.float64).T
    return out


def gradients(
    x: np.ndarray, w: np.ndarray, group_sizes: np.ndarray, cotangent: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of sum(grouped_matmul * cotangent [M, N]) to x and w, float64."""
    to_x, to_w = np.zeros(x.shape), np.zeros(w.shape)
    for group, rows in _groups(group_sizes):
        g = np.asarray(cotangent[rows], np.float64)
        to_x[rows] = g @ np.asarray(w[group], np.float64)
        to_w[group] = g.T @ np.asarray(x[rows], np.float64)
    return to_x, to_w


def grouped_swiglu(
    x: np.ndarray, gate: np.ndarray, up: np.ndarray, group_sizes: np.ndarray
) -> np.ndarray:
    """silu(x gate[e]^T) * (x up[e]^T), float64 [M, N]."""
    g, u = (grouped_matmul(x, w, group_sizes) for w in (gate, up))
    return g / (1 + np.exp(-g)) * u


def swiglu_gradients(
    x: np.ndarray, gate: np.ndarray, up: np.ndarray, group_sizes: np.ndarray, cotangent: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of sum(grouped_swiglu * cotangent [M, N]) to x, gate and up, float64."""
    g, u = (grouped_matmul(x, w, group_sizes) for w in (gate, up))
    real = slice(0, int(np.sum(group_sizes)))
    to_g, to_u = np.zeros(g.shape), np.zeros(u.shape)
    d, s = np.asarray(cotangent[real], np.float64), 1 / (1 + np.exp(-g[real]))
    to_g[real] = d * u[real] * s * (1 + g[real] * (1 - s))
    to_u[real] = d * g[real] * s
    x_from_gate, to_gate = gradients(x, gate, group_sizes, to_g)
    x_from_up, to_up = gradients(x, up, group_sizes, to_u)
    return x_from_gate + x_from_up, to_gate, to_up
