"""Expert choice of V2 and V3: scores, groups, biased top-k, unbiased weights, counts.

Paper: V2 report (arXiv 2405.04434) 2.2.2; V3 report (arXiv 2412.19437) 2.1.2, eq. 12-16.
M tokens  E experts  K chosen  G groups
"""

from deepzoo.kernels.router.xla import Routing, expert_counts, gate, router

__all__ = ["Routing", "expert_counts", "gate", "router"]
