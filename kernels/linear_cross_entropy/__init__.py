"""Output projection and cross entropy over token chunks: the logits of a batch are never held
whole.

Contract of `linear_cross_entropy(x, w, targets, weights)`: sum over tokens of weight * (logsumexp(w
x) - (w x)[target]), plus z_loss * weight * logsumexp^2, in float32. Gradients are computed in the
forward pass, so each chunk's logits are made once.
M tokens  D width  V vocabulary
"""

from deepzoo.kernels.linear_cross_entropy.xla import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
