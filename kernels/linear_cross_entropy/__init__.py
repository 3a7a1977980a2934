"""Output projection and cross entropy over token chunks: the logits of a batch are never held
whole.

Contract of `linear_cross_entropy(x, w, targets, weights)`: sum over tokens of weight * (logsumexp(w
x) - (w x)[target]), plus z_loss * weight * logsumexp^2, in float32. Gradients are computed in the
forward pass, so each chunk's logits are made once. XLA alone: its products and fused reductions run
this near the speed of a lone matmul, and a kernel would have to beat them.
M tokens  D width  V vocabulary
"""

from deepzoo.kernels.linear_cross_entropy.xla import chunk_size, linear_cross_entropy

__all__ = ["chunk_size", "linear_cross_entropy"]
