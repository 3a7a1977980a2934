"""Sorted rows times one matrix per group, dropless: the matmul of routed experts.

Contract of `grouped_matmul(x, w, group_sizes)`: rows of group e are x[start_e : start_e + size_e]
with start_e the sum of the sizes before it; each is multiplied by w[e] transposed, as `nn.Linear`
stores it. Rows beyond the sum of the sizes come back as zeros and get zero gradients, whatever they
hold.
M rows  K input width  N output width  E groups
"""

from deepzoo.kernels.grouped_matmul.api import grouped_matmul

__all__ = ["grouped_matmul"]
