"""Rows sorted by expert, and back: gathers only, so that forward and backward are the same on every
rerun (the dropless mixture of experts of the V2 report, 2.2.1, eq. 20).

Scatter-add is the classic source of run-to-run differences in expert models; here the inverse
permutation turns both directions, and both gradients, into gathers and a sum over K in fixed order.
A token's result does not depend on the tokens beside it.
M tokens  K chosen  E experts  D width
"""

from deepzoo.kernels.moe_dispatch.xla import Plan, combine, dispatch, plan

__all__ = ["Plan", "combine", "dispatch", "plan"]
