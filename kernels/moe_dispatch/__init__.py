"""Rows sorted by expert, and back: gathers only, so that forward and backward are the same on every
rerun.

Scatter-add is the classic source of run-to-run differences in expert models; here the inverse
permutation turns both directions, and both gradients, into gathers and a sum over K in fixed order.
M tokens  K chosen  E experts  D width
"""

from deepzoo.kernels.moe_dispatch.xla import Plan, combine, dispatch, plan

__all__ = ["Plan", "combine", "dispatch", "plan"]
