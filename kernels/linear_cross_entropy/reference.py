"""Linear cross entropy and its gradients in float64 NumPy."""

import numpy as np


def linear_cross_entropy(
    x: np.ndarray, w: np.ndarray, targets: np.ndarray, weights: np.ndarray, *, z_loss: float = 0.0
) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """Loss, log-probabilities [M], gradient to x [M, D], gradient to w [V, D]; arguments as in
    `xla`."""
    x, w, weights = (np.asarray(a, np.float64) for a in (x, w, weights))
    logits = x @ w.T
    top = logits.max(axis=-1, keepdims=True)
    lse = np.log(np.exp(logits - top).sum(axis=-1)) + top[:, 0]
    rows = np.arange(len(targets))
    logprob = logits[rows, targets] - lse
    slope = np.exp(logits - lse[:, None]) * (weights * (1 + 2 * z_loss * lse))[:, None]
    slope[rows, targets] -= weights
    return float((weights * (-logprob + z_loss * lse**2)).sum()), logprob, slope @ w, slope.T @ x
