"""Causal latent attention in its compute-friendly form: expanded heads, one rope key shared by all
of them.

Contract of `mla_prefill` (V2 report, arXiv 2405.04434, eq. 9-19, before absorption): score(t, s, h)
= scale * (q_nope[t, h] . k_nope[s, h] + q_rope[t, h] . k_rope[s]); query t sees key s where s <= t
+ q_offset and both lie in the same segment. Also returns the log-sum-exp of the scores, so that
parts over other keys can be merged exactly.
B batch  T query  S key  H heads  N nope  R rope  V value
"""

from deepzoo.kernels.mla_prefill.api import mla_prefill
from deepzoo.kernels.mla_prefill.merge import merge

__all__ = ["merge", "mla_prefill"]
