"""Grouped matmul in float64 NumPy."""

import numpy as np


def grouped_matmul(x: np.ndarray, w: np.ndarray, group_sizes: np.ndarray) -> np.ndarray:
    """x [M, K], w [E, N, K], group_sizes [E] -> float64 [M, N]; rows beyond the sum of the sizes
    are zero."""
    out = np.zeros((x.shape[0], w.shape[1]))
    start = 0
    for group, size in enumerate(np.asarray(group_sizes)):
        rows = slice(start, start + int(size))
        out[rows] = np.asarray(x[rows], np.float64) @ np.asarray(w[group], np.float64).T
        start += int(size)
    return out
