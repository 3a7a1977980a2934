"""Block FP8: float8_e4m3fn with one float32 scale per 128 x 128 block of a weight, or per 128 of a
row of activations, and the products of both (V3 report, arXiv 2412.19437, 3.3.2).

A value is `stored * scale`: the files call the scale `weight_scale_inv`, and it multiplies. Edge
blocks are partial, e.g. `kv_a_proj_with_mqa` with 576 rows has five row blocks. With `ue8m0` the
scales are powers of two, kept as float32.

Layers call `matmul` and `grouped_matmul`, which keep activations as they are unless told to
quantise them. Who has quantised activations already calls `matmul_fp8` and `grouped_matmul_fp8`:
products of 128 values are summed, multiplied by both scales, and added in float32.
M rows  N output width  K input width  E groups
"""

from deepzoo.kernels.block_fp8.api import grouped_matmul, grouped_matmul_fp8, matmul, matmul_fp8
from deepzoo.kernels.block_fp8.xla import (
    BLOCK,
    FP8_MAX,
    dequantize,
    quantize,
    quantize_activations,
)

__all__ = [
    "BLOCK",
    "FP8_MAX",
    "dequantize",
    "grouped_matmul",
    "grouped_matmul_fp8",
    "matmul",
    "matmul_fp8",
    "quantize",
    "quantize_activations",
]
