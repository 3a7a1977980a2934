"""Absorbed latent attention over the compressed cache: 512 + 64 numbers a token serve all heads.

Contract of `mla_decode` (V2 report, arXiv 2405.04434, 2.1.2-2.1.3, eq. 9-19): the up-projection of
the keys has been folded into the query, so score(t, s, h) = scale * (q_latent[t, h] . latent[s] +
q_rope[t, h] . k_rope[s]), and the result is a mix of latents that the caller projects up to values.
Query (b, t) sees the first `lengths[b, t]` entries of row b; whatever lies behind them, NaN
included, has no effect. The cache is contiguous or, with `pages`, a pool of pages; its latents are
in the queries' dtype or, with `latent_scale`, float8_e4m3fn with one factor a token. There is no
gradient.

Forms: `xla`; `triton` (any number of heads, all caches); `mosaic` (Hopper, a multiple of 64 heads,
bfloat16, pages of 64).
B batch  T query  S cache capacity  H heads  C latent  R rope
"""

from deepzoo.kernels.mla_decode.api import mla_decode
from deepzoo.kernels.mla_decode.xla import attend_blocks

__all__ = ["attend_blocks", "mla_decode"]
