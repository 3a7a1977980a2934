"""Sorted rows times one matrix per group, dropless: the matmul of routed experts.

Contract of `grouped_matmul(x, w, group_sizes)`: rows of group e are x[start_e : start_e + size_e]
with start_e the sum of the sizes before it; each is multiplied by w[e] transposed, as `nn.Linear`
stores it. Rows beyond the sum of the sizes come back as zeros and get zero gradients, whatever they
hold. `grouped_swiglu` is the first half of SwiGLU experts: two such products, silu and their
product in one kernel.

No form is dense: `jax.lax.ragged_dot`, which XLA expands to every row times every matrix on GPUs,
is used nowhere. The XLA form loops over exactly the tiles there are, one group's matrix at a time;
the kernels' grids hold the most tiles that the groups can need. Results are the same on every
rerun.

Float8 matrices: the Triton form dequantises within its tiles. A float8 x float8 kernel for Hopper
belongs to block_fp8: `implementation="mosaic"` calls
`deepzoo.kernels.block_fp8.mosaic_grouped.grouped_matmul(x, w, w_scale, group_sizes, interpret=)`
-> [M, N] in x's dtype, under the contract above, once that module exists.
M rows  K input width  N output width  E groups
"""

from deepzoo.kernels.grouped_matmul.api import grouped_matmul, grouped_swiglu

__all__ = ["grouped_matmul", "grouped_swiglu"]
