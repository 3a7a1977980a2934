"""Public entries, gradients, and the choice of implementation.

The two gradients of a grouped matmul are grouped matmuls again: to the rows with the matrices as
they lie, to the matrices with sums over each group's rows. So three products are dispatched, each
by itself: rows times matrices, the fused SwiGLU, and outer products by group.
M rows  K input width  N output width  E groups
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepzoo.kernels.dispatch import Implementation, UnsupportedError, compute_capability
from deepzoo.kernels.grouped_matmul import forms


class _How(NamedTuple):
    """What is fixed while tracing. `capability` is the GPU's that forms were chosen for: jit keeps
    one trace for each, although nothing else in the arguments tells them apart."""

    implementation: Implementation
    interpret: bool
    capability: tuple[int, int] | None


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    w_scale: jax.Array | None = None,
    *,
    implementation: Implementation = "auto",
    interpret: bool = False,
) -> jax.Array:
    """Multiplies each row by its group's matrix: y[m] = x[m] w[e(m)]^T.

    Differentiable in `x`, and in `w` where it is not quantised; neither gradient transposes or
    copies `w`.

    Args:
        x: [M, K], rows sorted by group; bfloat16, float16 or float32.
        w: [E, N, K], output-major like an `nn.Linear` weight; float8_e4m3fn with `w_scale`.
        group_sizes: int32 [E], their sum at most M; empty groups are allowed.
        w_scale: float32 [E, ceil(N / 128), ceil(K / 128)] block scales of a float8 `w` (V3 report,
            3.3.2). "xla" dequantises a group at a time to x's dtype; "triton" applies the scales to
            the float32 sum of each block; "mosaic" also quantises the rows, and multiplies in
            float8: faster and less exact, so "auto" never takes it.
        implementation: "auto", "xla", "triton", "mosaic" (Hopper; its gradient to `w` is made by
            the Triton kernel), or "tokamax" (a peer for benchmarks: forward only).
        interpret: run the named form's kernel in Pallas's interpreter, on any platform.

    Returns:
        [M, N] in x's dtype, accumulated in float32. Rows beyond the sum of the sizes are zeros and
        get zero gradients, whatever they hold.

    Raises:
        ValueError: shapes or dtypes that do not belong together, or float8 without scales.
        UnsupportedError: the named implementation cannot run this; every reason is listed.
    """
    x, w, group_sizes = (jnp.asarray(a) for a in (x, w, group_sizes))
    _check("grouped_matmul", x, group_sizes, {"w": (w, w_scale)})
    return _matmul(_how(implementation, interpret), x, w, w_scale, group_sizes)


def grouped_swiglu(
    x: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    group_sizes: jax.Array,
    gate_scale: jax.Array | None = None,
    up_scale: jax.Array | None = None,
    *,
    implementation: Implementation = "auto",
    interpret: bool = False,
) -> jax.Array:
    """The first half of SwiGLU experts in one kernel: y[m] = silu(x[m] gate[e]^T) * (x[m] up[e]^T).

    The rows are read once for both products, and silu and the product are applied to float32 sums
    (arXiv 2002.05202, eq. 6; V2 report, eq. 20-21). A gradient keeps the two products in x's dtype,
    2 M N values, instead of making them again: at V2-Lite's training shape they cost 32 us to write
    where the products cost 359 us at least. Under `jax.checkpoint` they are made again like any
    other residual.

    Args:
        x: [M, K], rows sorted by group.
        gate: [E, N, K]; float8_e4m3fn with scales if `up` is, too.
        up: [E, N, K].
        group_sizes: int32 [E].
        gate_scale: float32 [E, ceil(N / 128), ceil(K / 128)] of a float8 `gate`.
        up_scale: the same of `up`.
        implementation: as for `grouped_matmul`; "mosaic" takes no float8 here, and there is no
            "tokamax".
        interpret: as for `grouped_matmul`.

    Returns:
        [M, N] in x's dtype; rows beyond the sum of the sizes are zeros and get zero gradients.

    Raises:
        ValueError, UnsupportedError: as `grouped_matmul`.
    """
    x, gate, up, group_sizes = (jnp.asarray(a) for a in (x, gate, up, group_sizes))
    _check("grouped_swiglu", x, group_sizes, {"gate": (gate, gate_scale), "up": (up, up_scale)})
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"grouped_swiglu: gate and up must be alike, got {gate.dtype}{list(gate.shape)} and"
            f" {up.dtype}{list(up.shape)}"
        )
    scales = (gate_scale, up_scale)
    return _swiglu(_how(implementation, interpret), x, (gate, up), scales, group_sizes)


def _how(implementation: Implementation, interpret: bool) -> _How:
    return _How(implementation, interpret, compute_capability())


def _check(name: str, x: jax.Array, group_sizes: jax.Array, matrices: dict) -> None:
    for label, (w, scale) in matrices.items():
        if (
            x.ndim != 2
            or w.ndim != 3
            or x.shape[1] != w.shape[2]
            or group_sizes.shape != (w.shape[0],)
        ):
            raise ValueError(
                f"{name} needs x [M, K], {label} [E, N, K], group_sizes [E]; got {x.shape},"
                f" {w.shape}, {group_sizes.shape}"
            )
        if w.shape[0] == 0:
            raise ValueError(f"{name} needs at least one group; {label} is {w.shape}")
        if (w.dtype == jnp.float8_e4m3fn) != (scale is not None):
            raise ValueError(
                f"{name}: {label} is {w.dtype}; float8_e4m3fn and {label}_scale come together or"
                " not at all"
            )
        blocks = (w.shape[0], -(-w.shape[1] // 128), -(-w.shape[2] // 128))
        if scale is not None and scale.shape != blocks:
            raise ValueError(f"{name}: {label}_scale must be {blocks}, got {scale.shape}")
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"{name}: group_sizes must be integers, got {group_sizes.dtype}")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul_rule(how: _How, x, w, w_scale, group_sizes):
    return forms.product(how, (x,), (w,), (w_scale,), group_sizes)


def _matmul_fwd(how: _How, x, w, w_scale, group_sizes):
    return _matmul_rule(how, x, w, w_scale, group_sizes), (x, w, w_scale, group_sizes)


def _matmul_bwd(how: _How, saved, gradient):
    x, w, w_scale, group_sizes = saved
    _has_gradient(how)
    to_x = forms.product(how, (gradient,), (w,), (w_scale,), group_sizes, transposed=True)
    return to_x, _to_matrix(how, gradient, x, w, w_scale, group_sizes), _zeros(w_scale), None


def _has_gradient(how: _How) -> None:
    if how.implementation == "tokamax":
        raise UnsupportedError(
            "grouped_matmul: implementation='tokamax' is a forward baseline without gradients;"
            " use 'auto'"
        )


def _to_matrix(how: _How, gradient, x, w, scale, group_sizes) -> jax.Array:
    if scale is not None:  # quantised matrices are frozen
        return jnp.zeros_like(w)
    return forms.outer(how, gradient, x, group_sizes, w.dtype)


def _zeros(scale):
    return None if scale is None else jnp.zeros_like(scale)


_matmul_rule.defvjp(_matmul_fwd, _matmul_bwd)
_matmul = jax.jit(_matmul_rule, static_argnums=0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu_rule(how: _How, x, ws, scales, group_sizes):
    return forms.swiglu(how, x, ws, scales, group_sizes)[0]


def _swiglu_fwd(how: _How, x, ws, scales, group_sizes):
    out, gate, up = forms.swiglu(how, x, ws, scales, group_sizes, keep=True)
    return out, (x, ws, scales, group_sizes, gate, up)


def _swiglu_bwd(how: _How, saved, gradient):
    x, ws, scales, group_sizes, gate, up = saved
    d, g, u = (a.astype(jnp.float32) for a in (gradient, gate, up))
    s = jax.nn.sigmoid(g)
    to_gate = (d * u * s * (1 + g * (1 - s))).astype(x.dtype)
    to_up = (d * g * s).astype(x.dtype)
    to_x = forms.product(how, (to_gate, to_up), ws, scales, group_sizes, transposed=True)
    to_ws = tuple(
        _to_matrix(how, to, x, w, scale, group_sizes)
        for to, w, scale in zip((to_gate, to_up), ws, scales, strict=True)
    )
    return to_x, to_ws, tuple(_zeros(scale) for scale in scales), None


_swiglu_rule.defvjp(_swiglu_fwd, _swiglu_bwd)
_swiglu = jax.jit(_swiglu_rule, static_argnums=0)
