"""Public products, their gradients, and the choice of implementation.

M rows  N output width  K input width  E groups
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from deepzoo.kernels.block_fp8 import xla
from deepzoo.kernels.block_fp8.xla import BLOCK, quantize_activations
from deepzoo.kernels.dispatch import (
    Form,
    Implementation,
    ampere_or_newer,
    compute_capability,
    dispatch,
    hopper_only,
)

Activations = Literal["keep", "quantize"]
_HALVES = (jnp.bfloat16, jnp.float16)
_ARITHMETIC = 1024  # rows from which a product is bound by arithmetic and not by reading weights


class _How(NamedTuple):
    """What is fixed while tracing; `capability` keeps traces for different GPUs apart."""

    implementation: Implementation
    interpret: bool
    capability: tuple[int, int] | None


def matmul(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    *,
    activations: Activations = "keep",
    implementation: Implementation = "auto",
    interpret: bool = False,
) -> jax.Array:
    """A layer with a block FP8 weight: y = x W^T.

    With activations="keep", the default and what the zoo's models use, x is multiplied as it is:
    the numbers of the dequantised model, which parity with other programs needs. With "quantize", x
    is rounded to float8 per 128 of a row first and the product runs in FP8 with float32 promotion
    (V3 report 3.3.2): about 3% error in one product of normal values for up to twice the rate on
    Hopper. It is never chosen on its own.

    Differentiable in x, with the dequantised weight and, under "quantize", straight through the
    rounding of x. The quantised weight is frozen. (Training in FP8 as the V3 report does, with FP8
    gradients to inputs and weights too, would need 1x128 scales along M for the weight gradient; it
    is not built.)

    Args:
        x: [..., K], bfloat16, float16 or float32.
        w: float8_e4m3fn [N, K].
        scale: float32 [ceil(N/128), ceil(K/128)].
        activations: "keep" or "quantize".
        implementation: with "keep": "auto", "xla" (dequantises to x's dtype, then multiplies) or
            "triton" (scales are applied to float32 sums; reads the weight once, as float8); "auto"
            takes XLA from 1024 rows on. With "quantize" also "mosaic" (Hopper), best on it.
        interpret: run the named kernel in Pallas's interpreter.

    Returns:
        [..., N] in x's dtype, accumulated in float32.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
        UnsupportedError: the named implementation cannot run these arguments.
    """
    x, w, scale = (jnp.asarray(a) for a in (x, w, scale))
    _check("block_fp8.matmul", x, w, scale, rank=2)
    if activations not in ("keep", "quantize"):
        raise ValueError(f"activations must be 'keep' or 'quantize', got {activations!r}")
    how = _How(implementation, interpret, compute_capability())
    return _matmul(how, activations, x, w, scale)


def matmul_fp8(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    *,
    dtype: Any = jnp.bfloat16,
    implementation: Implementation = "auto",
    interpret: bool = False,
) -> jax.Array:
    """FP8 times FP8 with float32 promotion per 128 of K (V3 report 3.3.2), no gradient.

    Args:
        x: float8_e4m3fn [M, K], as `quantize_activations` gives it.
        x_scale: float32 [M, ceil(K/128)].
        w: float8_e4m3fn [N, K].
        w_scale: float32 [ceil(N/128), ceil(K/128)].
        dtype: of the result.
        implementation: "auto", "xla", "triton" (sums as exact as float32 makes them) or "mosaic"
            (Hopper's FP8 tensor cores, which add each 128 of K with about 14 bits).
        interpret: run the named kernel in Pallas's interpreter.

    Returns:
        [M, N] in `dtype`.

    Raises:
        ValueError, UnsupportedError: as `matmul`.
    """
    x, x_scale, w, w_scale = (jnp.asarray(a) for a in (x, x_scale, w, w_scale))
    _check("block_fp8.matmul_fp8", x, w, w_scale, rank=2, x_scale=x_scale)
    how = _How(implementation, interpret, compute_capability())
    return _product_fp8(how, jnp.dtype(dtype), x, x_scale, w, w_scale)


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    group_sizes: jax.Array,
    *,
    activations: Activations = "keep",
    implementation: Implementation = "auto",
    interpret: bool = False,
) -> jax.Array:
    """Experts with block FP8 weights: each row times its group's matrix, y[m] = x[m] W[e(m)]^T.

    As `matmul`, with activations="keep" being `kernels.grouped_matmul.grouped_matmul`.

    Args:
        x: [M, K], rows sorted by group.
        w: float8_e4m3fn [E, N, K].
        scale: float32 [E, ceil(N/128), ceil(K/128)].
        group_sizes: int32 [E], their sum at most M; empty groups are allowed.
        activations: as for `matmul`.
        interpret: as for `matmul`.
        implementation: with "quantize", "auto", "xla" or "mosaic" (Hopper).

    Returns:
        [M, N] in x's dtype. Rows beyond the sum of the sizes are zeros and get zero gradients,
        whatever they hold.

    Raises:
        ValueError, UnsupportedError: as `matmul`.
    """
    x, w, scale, group_sizes = (jnp.asarray(a) for a in (x, w, scale, group_sizes))
    _check("block_fp8.grouped_matmul", x, w, scale, rank=3, group_sizes=group_sizes)
    if activations == "keep":
        return _grouped_keep(implementation, interpret, x, w, scale, group_sizes)
    if activations != "quantize":
        raise ValueError(f"activations must be 'keep' or 'quantize', got {activations!r}")
    how = _How(implementation, interpret, compute_capability())
    return _grouped_quantized(how, x, w, scale, group_sizes)


def grouped_matmul_fp8(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    group_sizes: jax.Array,
    *,
    dtype: Any = jnp.bfloat16,
    implementation: Implementation = "auto",
    interpret: bool = False,
) -> jax.Array:
    """`matmul_fp8` with one matrix per group of sorted rows: dropless, empty groups, no gradient.

    Args:
        x: float8_e4m3fn [M, K].
        x_scale: float32 [M, ceil(K/128)].
        w: float8_e4m3fn [E, N, K].
        w_scale: float32 [E, ceil(N/128), ceil(K/128)].
        group_sizes: int32 [E], their sum at most M.
        dtype: as for `matmul_fp8`.
        implementation: "auto", "xla" or "mosaic" (Hopper).
        interpret: as for `matmul_fp8`.

    Returns:
        [M, N] in `dtype`; rows beyond the sum of the sizes are zeros, whatever they hold.

    Raises:
        ValueError, UnsupportedError: as `matmul`.
    """
    x, x_scale, w, w_scale = (jnp.asarray(a) for a in (x, x_scale, w, w_scale))
    group_sizes = jnp.asarray(group_sizes)
    name = "block_fp8.grouped_matmul_fp8"
    _check(name, x, w, w_scale, rank=3, x_scale=x_scale, group_sizes=group_sizes)
    how = _How(implementation, interpret, compute_capability())
    return _grouped_fp8(how, jnp.dtype(dtype), x, x_scale, w, w_scale, group_sizes)


def _check(name, x, w, scale, *, rank, x_scale=None, group_sizes=None) -> None:
    faults = []
    letters = "[E, N, K]" if rank == 3 else "[N, K]"
    if w.ndim != rank or w.dtype != jnp.float8_e4m3fn:
        faults.append(f"w must be float8_e4m3fn {letters}, got {w.dtype} {w.shape}")
    else:
        blocks = (*w.shape[:-2], -(-w.shape[-2] // BLOCK), -(-w.shape[-1] // BLOCK))
        if scale.shape != blocks or scale.dtype != jnp.float32:
            faults.append(
                f"the scales of a weight {w.shape} must be float32 {blocks}, one for every 128 x"
                f" 128, got {scale.dtype} {scale.shape}"
            )
    flat = rank == 3 or x_scale is not None
    if x.ndim == 0 or (flat and x.ndim != 2) or (w.ndim == rank and x.shape[-1] != w.shape[-1]):
        letters = "[M, K]" if flat else "[..., K]"
        faults.append(f"x must be {letters} with w's last axis as K, got {x.shape} for w {w.shape}")
    elif x_scale is not None:
        want = (x.shape[0], -(-x.shape[1] // BLOCK))
        if x_scale.shape != want or x_scale.dtype != jnp.float32:
            faults.append(
                f"x_scale must be float32 {want}, one for every 128 of a row, got"
                f" {x_scale.dtype} {x_scale.shape}"
            )
    allowed = (*_HALVES, jnp.float32) if x_scale is None else (jnp.float8_e4m3fn,)
    if x.dtype not in allowed:
        names = ", ".join(jnp.dtype(a).name for a in allowed)
        faults.append(f"x must be {names}, got {x.dtype}")
    if group_sizes is not None and w.ndim == 3:
        if group_sizes.shape != (w.shape[0],):
            faults.append(f"group_sizes must be [E] = {(w.shape[0],)}, got {group_sizes.shape}")
        if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
            faults.append(f"group_sizes must be int32, got {group_sizes.dtype}")
    if faults:
        raise ValueError(f"{name}: {'; '.join(faults)}")


def _triton_refusals(how: _How, x, w) -> list[str]:
    reasons = [] if how.interpret else ampere_or_newer()
    if x.dtype not in (*_HALVES, jnp.float8_e4m3fn):
        reasons.append(f"x is {x.dtype}, not bfloat16 or float16")
    if max(x.size, w.size, x.size // x.shape[-1] * w.shape[-2]) >= 2**31:
        reasons.append("an array has 2 ** 31 values or more, beyond its 32-bit offsets")
    return reasons


def _mosaic_refusals(how: _How, dtype, w) -> list[str]:
    reasons = [] if how.interpret else hopper_only()
    n, k = w.shape[-2:]
    if k % BLOCK or n % 8:
        reasons.append(f"w is {n} x {k}; its copies need K in whole 128s and N in eights")
    if dtype not in _HALVES:
        reasons.append(f"the result is {jnp.dtype(dtype)}, not bfloat16 or float16")
    return reasons


def _interpreter(how: _How) -> Any:
    if not how.interpret:
        return None
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams(detect_races=True)


def _product(how: _How, x, w, scale, *, transposed: bool = False) -> jax.Array:
    """Rows as they are, times the weight."""

    def in_triton(x, w, scale):
        from deepzoo.kernels.block_fp8 import triton

        flat = x.reshape(-1, x.shape[-1])
        out = triton.matmul(flat, w, scale, transposed=transposed, interpret=how.interpret)
        return out.reshape(*x.shape[:-1], -1)

    forms = {
        "triton": Form(in_triton, partial(_triton_refusals, how, x, w)),
        "xla": Form(partial(xla.matmul, transposed=transposed), list),
    }
    if x.size // x.shape[-1] >= _ARITHMETIC:
        # cuBLAS on the dequantised matrix outruns Triton where dequantising is a small part.
        forms = dict(reversed(forms.items()))
    return dispatch(
        "block_fp8.matmul", how.implementation, forms, x, w, scale, interpret=how.interpret
    )


@partial(jax.jit, static_argnums=(0, 1))
def _product_fp8(how: _How, dtype, x, x_scale, w, w_scale) -> jax.Array:
    if x.size == 0:
        return jnp.zeros((x.shape[0], w.shape[0]), dtype)

    def in_triton(x, x_scale, w, w_scale):
        from deepzoo.kernels.block_fp8 import triton

        return triton.matmul(x, w, w_scale, x_scale, dtype=dtype, interpret=how.interpret)

    def in_mosaic(x, x_scale, w, w_scale):
        from deepzoo.kernels.block_fp8 import mosaic

        return mosaic.matmul(x, x_scale, w, w_scale, dtype, interpret=_interpreter(how))

    forms = {
        "mosaic": Form(in_mosaic, partial(_mosaic_refusals, how, dtype, w)),
        "triton": Form(in_triton, partial(_triton_refusals, how, x, w)),
        "xla": Form(partial(xla.matmul_fp8, dtype=dtype), list),
    }
    return dispatch(
        "block_fp8.matmul_fp8", how.implementation, forms, x, x_scale, w, w_scale,
        interpret=how.interpret,
    )  # fmt: skip


@partial(jax.jit, static_argnums=(0, 1))
def _grouped_fp8(how: _How, dtype, x, x_scale, w, w_scale, group_sizes) -> jax.Array:
    if x.size == 0:
        return jnp.zeros((x.shape[0], w.shape[1]), dtype)

    def in_mosaic(x, x_scale, w, w_scale, sizes):
        from deepzoo.kernels.block_fp8 import mosaic_grouped as grouped

        how_to_run = _interpreter(how)
        return grouped.matmul(x, x_scale, w, w_scale, sizes, dtype, interpret=how_to_run)

    forms = {
        "mosaic": Form(in_mosaic, partial(_mosaic_refusals, how, dtype, w)),
        "xla": Form(partial(xla.grouped_matmul_fp8, dtype=dtype), list),
    }
    return dispatch(
        "block_fp8.grouped_matmul_fp8", how.implementation, forms,
        x, x_scale, w, w_scale, group_sizes, interpret=how.interpret,
    )  # fmt: skip


def _for_gradient(how: _How) -> _How:
    """Gradients keep their rows, which the Mosaic form does not."""
    return how._replace(implementation="triton") if how.implementation == "mosaic" else how


@partial(jax.jit, static_argnums=(0, 1))
def _matmul(how: _How, activations: Activations, x, w, scale) -> jax.Array:
    return _guarded(how, activations, x, w, scale)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _guarded(how, activations, x, w, scale):
    if activations == "keep":
        return _product(how, x, w, scale)
    values, factors = quantize_activations(x.reshape(-1, x.shape[-1]))
    return _product_fp8(how, x.dtype, values, factors, w, scale).reshape(*x.shape[:-1], -1)


def _forward(how, activations, x, w, scale):
    return _guarded(how, activations, x, w, scale), (w, scale)


def _backward(how, activations, saved, gradient):
    del activations
    return _product(_for_gradient(how), gradient, *saved, transposed=True), None, None


_guarded.defvjp(_forward, _backward)


def _grouped_keep(implementation, interpret, x, w, scale, group_sizes):
    # That operation's XLA form imports this folder.
    from deepzoo.kernels.grouped_matmul import grouped_matmul

    return grouped_matmul(
        x, w, group_sizes, scale, implementation=implementation, interpret=interpret
    )


@partial(jax.jit, static_argnums=0)
def _grouped_quantized(how: _How, x, w, scale, group_sizes) -> jax.Array:
    return _grouped_guarded(how, x, w, scale, group_sizes)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_guarded(how, x, w, scale, group_sizes):
    values, factors = quantize_activations(x)
    return _grouped_fp8(how, x.dtype, values, factors, w, scale, group_sizes)


def _grouped_forward(how, x, w, scale, group_sizes):
    return _grouped_guarded(how, x, w, scale, group_sizes), (w, scale, group_sizes)


def _grouped_backward(how, saved, gradient):
    w, scale, group_sizes = saved
    implementation = _for_gradient(how).implementation

    def keep(x):
        return _grouped_keep(implementation, how.interpret, x, w, scale, group_sizes)

    # Linear in x, so the point does not matter; its forward product is dropped when compiled.
    point = jnp.zeros((gradient.shape[0], w.shape[2]), gradient.dtype)
    return *jax.vjp(keep, point)[1](gradient), None, None, None


_grouped_guarded.defvjp(_grouped_forward, _grouped_backward)
