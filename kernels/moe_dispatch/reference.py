"""Sort, gather and weighted combine, and their gradients, in float64 NumPy, pair by pair.

M tokens  K chosen  E experts  D width
"""

import numpy as np


def plan(indices: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """indices [M, K] -> the pair behind each sorted row, the sorted row of each pair, and rows of
    each expert [E]."""
    flat = np.asarray(indices).reshape(-1)
    order = [pair for expert in range(experts) for pair in np.flatnonzero(flat == expert)]
    inverse = np.zeros(flat.size, np.int64)
    for row, pair in enumerate(order):
        inverse[pair] = row
    sizes = np.array([np.sum(flat == expert) for expert in range(experts)], np.int64)
    return np.array(order, np.int64), inverse, sizes


def dispatch(x: np.ndarray, order: np.ndarray, chosen: int) -> np.ndarray:
    """[M, D] -> float64 [M*K, D], each pair's token in sorted order."""
    rows = [np.asarray(x[pair // chosen], np.float64) for pair in order]
    return np.stack(rows) if rows else np.zeros((0, x.shape[1]))


def dispatch_gradient(cotangent: np.ndarray, order: np.ndarray, chosen: int) -> np.ndarray:
    """Gradient of sum(dispatch * cotangent [M*K, D]) to x."""
    out = np.zeros((len(order) // chosen, cotangent.shape[1]))
    for row, pair in enumerate(order):
        out[pair // chosen] += np.asarray(cotangent[row], np.float64)
    return out


def combine(y: np.ndarray, weights: np.ndarray, order: np.ndarray) -> np.ndarray:
    """y [M*K, D], weights [M, K] -> float64 [M, D]."""
    out = np.zeros((weights.shape[0], y.shape[1]))
    flat = np.asarray(weights, np.float64).reshape(-1)
    for row, pair in enumerate(order):
        out[pair // weights.shape[1]] += flat[pair] * np.asarray(y[row], np.float64)
    return out


def combine_gradients(
    y: np.ndarray, weights: np.ndarray, order: np.ndarray, cotangent: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of sum(combine * cotangent [M, D]) to y and to the weights."""
    to_y, to_weights = np.zeros(y.shape), np.zeros(weights.size)
    flat = np.asarray(weights, np.float64).reshape(-1)
    for row, pair in enumerate(order):
        g = np.asarray(cotangent[pair // weights.shape[1]], np.float64)
        to_y[row] = flat[pair] * g
        to_weights[pair] = g @ np.asarray(y[row], np.float64)
    return to_y, to_weights.reshape(weights.shape)
