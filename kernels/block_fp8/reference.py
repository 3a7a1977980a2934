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


def quantize(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float [N, K] -> float8_e4m3fn [N, K] and float32 scales amax / 448 (1 where a block is
    zero)."""
    rows, columns = w.shape
    scale = np.ones((-(-rows // BLOCK), -(-columns // BLOCK)), np.float32)
    out = np.zeros(w.shape, ml_dtypes.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = np.s_[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
            part = np.asarray(w[block], np.float32)
            if np.abs(part).max() > 0:
                scale[i, j] = np.abs(part).max() / np.float32(448)
            out[block] = np.clip(part / scale[i, j], -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return out, scale
