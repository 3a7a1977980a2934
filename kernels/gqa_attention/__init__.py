"""Grouped-query attention of the dense students (Qwen2, Qwen3, Llama): prefill and decode.

Contract: query head h reads key and value head h // (H / G); `gqa_attention` is causal within a
sequence and within its segments, `gqa_decode` sees the first entries of a cache.
B batch  T query  S key or cache capacity  H query heads  G key/value heads  D head size
"""

from deepzoo.kernels.gqa_attention.api import gqa_attention
from deepzoo.kernels.gqa_attention.xla import gqa_decode

__all__ = ["gqa_attention", "gqa_decode"]
