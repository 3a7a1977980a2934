"""Grouped-query attention of the dense students (Qwen2, Qwen3, Llama): prefill and decode.

B batch  T query  S key or cache capacity  H query heads  G key/value heads  D head size
"""

from deepzoo.kernels.gqa_attention.xla import gqa_attention, gqa_decode

__all__ = ["gqa_attention", "gqa_decode"]
