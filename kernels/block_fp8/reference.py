"""Block FP8 in float64 NumPy, block by block."""

import ml_dtypes
import numpy as np

BLOCK = 128


def dequantize(w: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float8_e4m3fn [N, K] and its block scales -> float64 [N, K]."""
    out = np.asarray(w).astype(np.float64)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            out[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK] *= float(scale[i, j])
    return out


def dequantize_activations(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float8_e4m3fn [M, K] and its scales [M, ceil(K/128)] -> float64 [M, K]."""
    out = np.asarray(x).astype(np.float64)
    for j in range(scale.shape[1]):
        out[:, j * BLOCK : (j + 1) * BLOCK] *= np.asarray(scale, np.float64)[:, j : j + 1]
    return out


def _scale(part: np.ndarray, ue8m0: bool) -> np.float32:
    scale = np.abs(part).max() / np.float32(448)
    if not ue8m0:
        return scale
    fraction, exponent = np.frexp(scale)  # scale = fraction * 2 ** exponent, fraction in [1/2, 1)
    return np.ldexp(np.float32(1), exponent - (fraction == 0.5))


def _round(part: np.ndarray, scale: np.float32) -> np.ndarray:
    return np.clip(part / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)


def quantize(w: np.ndarray, *, ue8m0: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Float [N, K] -> float8_e4m3fn [N, K] and float32 scales amax / 448 (1 where a block is
    zero); with `ue8m0` the next power of two."""
    rows, columns = w.shape
    scale = np.ones((-(-rows // BLOCK), -(-columns // BLOCK)), np.float32)
    out = np.zeros(w.shape, ml_dtypes.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = np.s_[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
            part = np.asarray(w[block], np.float32)
            if np.abs(part).max() > 0:
                scale[i, j] = _scale(part, ue8m0)
            out[block] = _round(part, scale[i, j])
    return out, scale


def quantize_activations(x: np.ndarray, *, ue8m0: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Float [M, K] -> float8_e4m3fn [M, K] and float32 scales [M, ceil(K/128)]; as `quantize`, one
    scale per 128 of a row."""
    rows, columns = x.shape
    scale = np.ones((rows, -(-columns // BLOCK)), np.float32)
    out = np.zeros(x.shape, ml_dtypes.float8_e4m3fn)
    for i in range(rows):
        for j in range(scale.shape[1]):
            block = np.s_[i, j * BLOCK : (j + 1) * BLOCK]
            part = np.asarray(x[block], np.float32)
            if np.abs(part).max() > 0:
                scale[i, j] = _scale(part, ue8m0)
            out[block] = _round(part, scale[i, j])
    return out, scale


def matmul(x: np.ndarray, w: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """x [M, K] times the dequantised w [N, K] transposed, float64 [M, N]."""
    return np.asarray(x).astype(np.float64) @ dequantize(w, scale).T


def matmul_fp8(
    x: np.ndarray, x_scale: np.ndarray, w: np.ndarray, w_scale: np.ndarray
) -> np.ndarray:
    """Quantised rows [M, K] times a quantised w [N, K] transposed, float64 [M, N]."""
    return dequantize_activations(x, x_scale) @ dequantize(w, w_scale).T


def grouped_matmul_fp8(
    x: np.ndarray,
    x_scale: np.ndarray,
    w: np.ndarray,
    w_scale: np.ndarray,
    group_sizes: np.ndarray,
) -> np.ndarray:
    """Sorted quantised rows [M, K] times their group's matrix [E, N, K] transposed, float64 [M, N];
    rows of no group are zeros."""
    out = np.zeros((x.shape[0], w.shape[1]))
    start = 0
    for group, size in enumerate(np.asarray(group_sizes)):
        rows = slice(start, start + int(size))
        out[rows] = matmul_fp8(x[rows], x_scale[rows], w[group], w_scale[group])
        start += int(size)
    return out
