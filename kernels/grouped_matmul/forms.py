"""The three products of the grouped matmul in each of their forms, and what each form refuses.

Backends are imported by the form that runs, so that a CPU never imports Pallas for GPUs unless a
program is traced that could meet one.
M rows  K input width  N output width  E groups
"""

import importlib.util
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from deepzoo.kernels.dispatch import (
    Form,
    ampere_or_newer,
    compute_capability,
    dispatch,
    hopper_only,
)
from deepzoo.kernels.grouped_matmul import tiles, xla

FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)


def product(how: Any, xs, ws, scales, group_sizes, *, transposed: bool = False) -> jax.Array:
    """The sum over i of each row of xs[i] times its group's ws[i], transposed or as it lies."""

    def in_xla(xs, ws, scales, sizes):
        made = [
            xla.rows_times_groups(x, w, scale, sizes, transposed=transposed)
            for x, w, scale in zip(xs, ws, scales, strict=True)
        ]
        return sum(made[1:], start=made[0])

    def in_triton(*arrays):
        from deepzoo.kernels.grouped_matmul import triton

        return triton.rows_times_groups(*arrays, transposed=transposed, interpret=how.interpret)

    def in_mosaic(xs, ws, scales, sizes):
        if scales[0] is not None:
            from deepzoo.kernels.block_fp8 import mosaic_grouped

            return mosaic_grouped.grouped_matmul(
                xs[0], ws[0], scales[0], sizes, interpret=how.interpret
            )
        from deepzoo.kernels.grouped_matmul import mosaic

        return mosaic.rows_times_groups(
            xs, ws, sizes, transposed=transposed, interpret=how.interpret
        )

    def in_tokamax(xs, ws, scales, sizes):
        from deepzoo.kernels.grouped_matmul import peer

        return peer.rows_times_groups(xs[0], ws[0], sizes)

    mosaic = Form(in_mosaic, partial(_mosaic_refusals, how, xs, ws, scales, transposed=transposed))
    triton = Form(in_triton, partial(_triton_refusals, how, xs, ws))
    known = _ordered(xs[0], ws[0], mosaic, triton, Form(in_xla, list))
    if scales[0] is not None and how.implementation == "auto":
        del known["mosaic"]  # float8 rows lose accuracy: only who names the form gets them
    if not transposed and len(xs) == 1:
        known["tokamax"] = Form(in_tokamax, partial(_tokamax_refusals, scales))
    return dispatch(
        "grouped_matmul", how.implementation, known, xs, ws, scales, group_sizes,
        interpret=how.interpret,
    )  # fmt: skip


def swiglu(how: Any, x, ws, scales, group_sizes, *, keep: bool = False) -> tuple[jax.Array, ...]:
    """silu(gate) * up -> (it,), and with `keep` the two products as well."""

    def in_xla(x, ws, scales, sizes):
        gate, up = (
            xla.rows_times_groups(x, w, scale, sizes) for w, scale in zip(ws, scales, strict=True)
        )
        wide = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
        return (wide.astype(x.dtype), gate, up) if keep else (wide.astype(x.dtype),)

    def in_triton(*arrays):
        from deepzoo.kernels.grouped_matmul import triton

        return triton.swiglu(*arrays, keep=keep, interpret=how.interpret)

    def in_mosaic(x, ws, scales, sizes):
        from deepzoo.kernels.grouped_matmul import mosaic

        return mosaic.swiglu(x, ws, sizes, keep=keep, interpret=how.interpret)

    def mosaic_refusals():
        reasons = _mosaic_refusals(how, (x,), ws, (None,))
        if scales[0] is not None:
            reasons.append("float8 matrices are not fused with SwiGLU; use 'triton'")
        return reasons

    known = _ordered(
        x,
        ws[0],
        Form(in_mosaic, mosaic_refusals),
        Form(in_triton, partial(_triton_refusals, how, (x,), ws)),
        Form(in_xla, list),
    )
    return dispatch(
        "grouped_swiglu", how.implementation, known, x, ws, scales, group_sizes,
        interpret=how.interpret,
    )  # fmt: skip


def outer(how: Any, left, right, group_sizes, dtype) -> jax.Array:
    """Each group's own sum of outer products, left [M, N] and right [M, K] -> [E, N, K]."""

    def in_triton(left, right, sizes):
        from deepzoo.kernels.grouped_matmul import triton

        return triton.group_outer(left, right, sizes, dtype, interpret=how.interpret)

    triton = Form(in_triton, partial(_triton_refusals, how, (left, right), ()))
    known = {
        "triton": triton,
        "mosaic": triton,  # Hopper has no better one; documented at the public entry
        "xla": Form(partial(xla.group_outer, dtype=dtype), list),
    }
    return dispatch(
        "grouped_matmul's gradient to w", how.implementation, known, left, right, group_sizes,
        interpret=how.interpret,
    )  # fmt: skip


def _ordered(x, w, mosaic: Form, triton: Form, in_xla: Form) -> dict[str, Form]:
    """Forms by name, best first: Mosaic's tiles have too many rows for a decode step."""
    if tiles.rows_of_a_tile(x.shape[0], w.shape[0]) < 64:
        return {"triton": triton, "mosaic": mosaic, "xla": in_xla}
    return {"mosaic": mosaic, "triton": triton, "xla": in_xla}


def _triton_refusals(how: Any, xs, ws) -> list[str]:
    reasons = [] if how.interpret else ampere_or_newer()
    reasons += [f"rows are {x.dtype}, not a float" for x in xs[:1] if x.dtype not in FLOATS]
    for w in ws[:1]:
        if w.dtype.itemsize == 1 and w.size >= 2**31:
            reasons.append(
                f"{w.size} float8 values are beyond its 32-bit offsets; split the experts over"
                " devices"
            )
    return reasons


def _mosaic_refusals(how: Any, xs, ws, scales, *, transposed: bool = False) -> list[str]:
    reasons = [] if how.interpret else hopper_only()
    x, w = xs[0], ws[0]
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        reasons.append(f"rows are {x.dtype}, not bfloat16 or float16")
    if scales[0] is not None:
        if transposed:
            reasons.append("the float8 kernel has no gradient; use 'triton' or 'xla'")
        if w.shape[2] % 128 or w.shape[1] % 8:
            reasons.append(f"float8 matrices are {w.shape[1:]}, not multiples of 8 and 128")
        return reasons
    if w.dtype != x.dtype:
        reasons.append(f"rows are {x.dtype} and matrices {w.dtype}")
    columns, depth = (w.shape[i] for i in ((2, 1) if transposed else (1, 2)))
    if columns % 128 or depth % 64:
        reasons.append(
            f"output width {columns} is not a multiple of 128 or input width {depth} not of 64"
        )
    return reasons


def _tokamax_refusals(scales) -> list[str]:
    reasons = [] if _has_tokamax() else ["tokamax is not installed: pip install tokamax"]
    if compute_capability() is None:
        reasons.append("no GPU is known")
    if scales[0] is not None:
        reasons.append("it takes no float8 with block scales")
    return reasons


@cache
def _has_tokamax() -> bool:
    return importlib.util.find_spec("tokamax") is not None
