"""Block FP8: float8_e4m3fn weights with one float32 scale per 128 x 128 block (V3 report, arXiv
2412.19437, 3.3.2).

A value is `stored * scale`: the files call the scale `weight_scale_inv`, and it multiplies. Edge
blocks are partial, e.g. `kv_a_proj_with_mqa` with 576 rows has five row blocks. With `ue8m0` the
scales are powers of two, kept as float32.
N rows  K columns
"""

from deepzoo.kernels.block_fp8.xla import BLOCK, FP8_MAX, dequantize, matmul, quantize

__all__ = ["BLOCK", "FP8_MAX", "dequantize", "matmul", "quantize"]
