"""Public entry of grouped-query prefill attention, its gradient and choice of form.

    cudnn    `jax.nn.dot_product_attention` through cuDNN: whole sequences, on a GPU that is there
    triton   the kernels of `mla_prefill` without rope parts: segments, and all that cuDNN refuses
    xla      the chunked form of `mla_prefill`, everywhere
cuDNN has no segments but a mask of [T, T], which would cost memory and time quadratic in the
sequence; the Triton kernels skip what other documents hold. Decoding over a cache has one form,
XLA's (`xla.py`), on every platform.
B batch  T query  H query heads  G key/value heads  D head size
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from deepzoo.kernels.dispatch import (
    Form,
    UnsupportedError,
    ampere_or_newer,
    compute_capability,
    dispatch,
)
from deepzoo.kernels.gqa_attention import xla

GqaImplementation = Literal["auto", "xla", "triton", "cudnn"]


class _Static(NamedTuple):
    scale: float
    implementation: GqaImplementation
    interpret: bool


def gqa_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    segments: jax.Array | None = None,
    implementation: GqaImplementation = "auto",
    interpret: bool = False,
) -> jax.Array:
    """Causal grouped-query attention within a sequence (arXiv 2305.13245); differentiable.

    Args:
        q: [B, T, H, D].
        k: [B, T, G, D], G a divisor of H.
        v: [B, T, G, D].
        scale: softmax scale, a Python number.
        segments: int32 [B, T]; a query sees only keys of its own segment.
        implementation: the form, see `deepzoo.kernels.dispatch`, and "cudnn".
        interpret: run the Triton form in Pallas's interpreter, on any platform.

    Returns:
        [B, T, H, D] in v's dtype.

    Raises:
        ValueError: shapes that do not belong together.
        UnsupportedError: the named form cannot run these arguments; the message lists why.
    """
    q, k, v = (jnp.asarray(a) for a in (q, k, v))
    fits = q.ndim == k.ndim == 4 and v.shape == k.shape and q.size and k.size
    if not fits or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "gqa_attention needs q [B, T, H, D], k and v [B, T, G, D], none of them empty; got"
            f" {q.shape}, {k.shape}, {v.shape}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"gqa_attention: {q.shape[2]} query heads are no multiple of {k.shape[2]} key heads"
        )
    if segments is not None:
        if jnp.shape(segments) != q.shape[:2]:
            raise ValueError(
                f"gqa_attention: segments must be int32 {list(q.shape[:2])}, got"
                f" {jnp.shape(segments)}"
            )
        segments = jnp.asarray(segments, jnp.int32)
    return _jitted(q, k, v, segments, _Static(float(scale), implementation, interpret))


@partial(jax.jit, static_argnums=4)
def _jitted(q, k, v, segments, options: _Static):
    # Layers of one shape share one trace. cuDNN's call brings its own gradient, the others share
    # the one below.
    if options.implementation in ("auto", "cudnn"):
        reasons = _cudnn_refusals(q, k, v, segments)
        if not reasons and not options.interpret:
            cudnn = partial(_cudnn, scale=options.scale)
            if options.implementation == "cudnn":
                return cudnn(q, k, v)
            default = partial(_whole, options=options._replace(implementation="xla"))
            return jax.lax.platform_dependent(q, k, v, cuda=cudnn, default=default)
        if options.implementation == "cudnn":
            reasons += ["has no interpreter"] if options.interpret else []
            raise UnsupportedError(
                f"gqa_attention: implementation='cudnn' cannot run this: {'; '.join(reasons)}"
            )
    return _attend(q, k, v, segments, options)


def _whole(q, k, v, options: _Static):
    return _attend(q, k, v, None, options)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, segments, options):
    return _forward(q, k, v, segments, options)[0]


def _forward(q, k, v, segments, options):
    return _dispatch("forward", options, q, k, v, segments)


def _attend_fwd(q, k, v, segments, options):
    out, lse = _forward(q, k, v, segments, options)
    return out, (q, k, v, segments, out, lse)


def _attend_bwd(options, saved, d_out):
    return (*_dispatch("backward", options, *saved, d_out), None)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _dispatch(direction: str, options: _Static, *arrays: Any):
    q, k, v, segments = arrays[:4]

    def triton(*a: Any) -> Any:
        from deepzoo.kernels.gqa_attention import triton as module

        return getattr(module, direction)(*a, scale=options.scale, interpret=options.interpret)

    def refusals() -> list[str]:
        if reasons := [] if options.interpret else ampere_or_newer():
            return reasons
        from deepzoo.kernels.gqa_attention import triton as module

        return module.refusals(q, k, v, segments, scale=options.scale, interpret=options.interpret)

    forms = {
        "triton": Form(triton, refusals),
        "xla": Form(lambda *a: getattr(xla, direction)(*a, scale=options.scale), list),
    }
    return dispatch(
        f"gqa_attention {direction}", options.implementation, forms, *arrays,  # pyright: ignore[reportArgumentType]
        interpret=options.interpret,
    )  # fmt: skip


def _cudnn(q, k, v, *, scale: float):
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, implementation="cudnn"
    )


def _cudnn_refusals(q, k, v, segments) -> list[str]:
    reasons = []
    if jax.default_backend() != "gpu":
        reasons.append("cuDNN is loaded only where there is a GPU")
    capability = compute_capability()
    if capability is not None and capability < (8, 0):
        reasons.append(f"needs sm_80 or newer, this GPU is sm_{capability[0]}{capability[1]}")
    if segments is not None:
        reasons.append("cuDNN has no segments without a mask of [T, T]")
    if {str(a.dtype) for a in (q, k, v)} not in ({"bfloat16"}, {"float16"}):
        reasons.append(f"needs bfloat16 or float16, got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.shape[-1] > 128 or q.shape[-1] % 8:
        reasons.append(f"needs a head size up to 128, a multiple of 8, got {q.shape[-1]}")
    return reasons
