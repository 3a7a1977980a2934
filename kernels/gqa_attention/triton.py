"""Grouped-query prefill attention in Pallas-Triton: the kernels of `mla_prefill` without rope
parts, whose heads of queries share heads of keys.

B batch  T query  H query heads  G key/value heads  D head size
"""

from deepzoo.kernels.mla_prefill import triton, triton_backward


def refusals(q, k, v, segments, *, scale: float, interpret: bool) -> list[str]:
    """Every reason why the kernels cannot run these arguments on a GPU that can run any."""
    return triton.refusals(
        q, None, k, None, v, segments, segments, scale=scale, q_offset=0, interpret=interpret
    )


def forward(q, k, v, segments, *, scale: float, interpret: bool = False, tile=None):
    """(out, log-sum-exp float32 [B, T, H]), see `api.gqa_attention`."""
    return triton.forward(
        q, None, k, None, v, segments, segments, scale=scale, q_offset=0, interpret=interpret,
        tile=tile,
    )  # fmt: skip


def backward(
    q, k, v, segments, out, lse, d_out, *, scale: float, interpret: bool = False, tiles=None
):
    """(dq, dk, dv)."""
    dq, _, dk, _, dv = triton_backward.backward(
        q, None, k, None, v, segments, segments, out, lse, d_out, 0.0, scale=scale, q_offset=0,
        interpret=interpret, tiles=tiles,
    )  # fmt: skip
    return dq, dk, dv
