"""Public entry and choice of implementation.

B batch  T query  S cache capacity  H heads  C latent  R rope  P pages of the pool  L tokens a page
N pages a row
"""

from functools import partial

import jax
import jax.numpy as jnp

from deepzoo.kernels.dispatch import (
    Form,
    Implementation,
    ampere_or_newer,
    dispatch,
    hopper_only,
)
from deepzoo.kernels.mla_decode import xla


def mla_decode(
    q_latent: jax.Array,
    q_rope: jax.Array,
    latent: jax.Array,
    k_rope: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    pages: jax.Array | None = None,
    latent_scale: jax.Array | None = None,
    implementation: Implementation = "auto",
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Absorbed attention of one or a few queries a row over the latent cache.

    V2 report (arXiv 2405.04434) eq. 9-19 with the up-projections folded into queries and outputs;
    the cache is one array [B, S, ...], or pages of a pool with a table. Entries nobody sees (behind
    a row's longest length, in a page's tail or an unlisted page) may hold anything, NaN included,
    and table entries behind a row's last page are not followed.

    Not differentiable: a cache is no function of the parameters that a loss could reach. Train
    through `mla_prefill`; asking for a gradient here raises NotImplementedError.

    Args:
        q_latent: [B, T, H, C], queries with the key up-projection folded in; bfloat16, float16 or
            float32.
        q_rope: [B, T, H, R], rotated.
        latent: [B, S, C], the normalised latents, or with `pages` a pool [P, L, C]; a dtype as
            above, or float8_e4m3fn with `latent_scale`.
        k_rope: [B, S, R] or [P, L, R], rotated. (The kernels want one dtype for all but a float8
            latent; "auto" takes XLA where there are several.)
        lengths: int32 [B] or [B, T], cache entries visible to each query; 0 is allowed, and more
            than the cache has room for means all of it.
        scale: softmax scale.
        pages: int32 [B, N]; page pages[b, n] of the pool holds entries n * L to n * L + L - 1 of
            row b.
        latent_scale: float32 [B, S] or [P, L], one factor for each token's latent.
        implementation: "auto", "xla", "triton" or "mosaic".
        interpret: run the named kernel in Pallas's interpreter.

    Returns:
        Mixed latents [B, T, H, C] in q_latent's dtype and log-sum-exp of the scaled scores, float32
        [B, T, H]; 0 and -inf where nothing is visible.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
        UnsupportedError: the named implementation cannot run these arguments.
    """
    q_latent, q_rope, latent, k_rope, lengths = (
        jnp.asarray(a) for a in (q_latent, q_rope, latent, k_rope, lengths)
    )
    pages = None if pages is None else jnp.asarray(pages)
    latent_scale = None if latent_scale is None else jnp.asarray(latent_scale)
    if faults := _faults(q_latent, q_rope, latent, k_rope, lengths, pages, latent_scale):
        raise ValueError(f"mla_decode: {'; '.join(faults)}")
    batch, queries = q_latent.shape[:2]
    lengths = jnp.broadcast_to(lengths.reshape(batch, -1), (batch, queries)).astype(jnp.int32)
    pages = None if pages is None else pages.astype(jnp.int32)
    return _run(
        float(scale), implementation, interpret,
        q_latent, q_rope, latent, k_rope, lengths, pages, latent_scale,
    )  # fmt: skip


def _faults(q_latent, q_rope, latent, k_rope, lengths, pages, latent_scale) -> list[str]:
    """Everything that is wrong with the arguments, in words."""
    if q_latent.ndim != 4 or q_rope.ndim != 4 or latent.ndim != 3 or k_rope.ndim != 3:
        shapes = ", ".join(str(a.shape) for a in (q_latent, q_rope, latent, k_rope))
        return [
            "needs q_latent [B, T, H, C], q_rope [B, T, H, R], latent [B, S, C] and k_rope"
            f" [B, S, R] (with pages, [P, L, C] and [P, L, R]); got {shapes}"
        ]
    faults = []
    batch, queries = q_latent.shape[:2]
    if q_rope.shape[:3] != q_latent.shape[:3]:
        faults.append(f"q_latent {q_latent.shape} and q_rope {q_rope.shape} differ in [B, T, H]")
    if latent.shape[2] != q_latent.shape[3]:
        faults.append(
            f"latents are {latent.shape[2]} wide, q_latent's are {q_latent.shape[3]}; both are C"
        )
    if k_rope.shape[2] != q_rope.shape[3]:
        faults.append(f"k_rope is {k_rope.shape[2]} wide, q_rope {q_rope.shape[3]}; both are R")
    if k_rope.shape[:2] != latent.shape[:2]:
        faults.append(
            f"latent {latent.shape} and k_rope {k_rope.shape} differ in their first two axes"
        )
    if min(latent.shape[:2]) == 0:
        faults.append(f"the cache {latent.shape} holds nothing; it needs room for one token")
    if pages is None and latent.shape[0] != batch:
        faults.append(
            f"latent has {latent.shape[0]} rows, q_latent {batch}; a pool of pages comes with pages"
        )
    if pages is not None and (pages.ndim != 2 or pages.shape[0] != batch or pages.shape[1] == 0):
        faults.append(f"pages is {pages.shape}, it must be [B, N] with B = {batch}, N >= 1")
    if pages is not None and not jnp.issubdtype(pages.dtype, jnp.integer):
        faults.append(f"pages is {pages.dtype}, it must be int32")
    if lengths.shape not in ((batch,), (batch, 1), (batch, queries)):
        faults.append(f"lengths is {lengths.shape}, it must be ({batch},) or ({batch}, {queries})")
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        faults.append(f"lengths is {lengths.dtype}, it must be int32")
    if q_latent.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        faults.append(f"q_latent is {q_latent.dtype}, not bfloat16, float16 or float32")
    for name, a in (("q_rope", q_rope), ("k_rope", k_rope)):
        if a.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
            faults.append(f"{name} is {a.dtype}, not bfloat16, float16 or float32")
    if (latent.dtype == jnp.float8_e4m3fn) != (latent_scale is not None):
        faults.append(
            f"latent is {latent.dtype}; float8_e4m3fn and latent_scale come together or not at all"
        )
    elif latent_scale is None and latent.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        faults.append(f"latent is {latent.dtype}, not bfloat16, float16, float32 or float8_e4m3fn")
    if latent_scale is not None and (
        latent_scale.shape != latent.shape[:2] or latent_scale.dtype != jnp.float32
    ):
        faults.append(
            f"latent_scale is {latent_scale.dtype} {latent_scale.shape}, it must be float32"
            f" {latent.shape[:2]}"
        )
    return faults


def _mixed(q_latent, q_rope, latent, k_rope, latent_scale) -> list[str]:
    arrays = [q_latent, q_rope, k_rope] + ([latent] if latent_scale is None else [])
    found = sorted({str(a.dtype) for a in arrays})
    return [f"needs queries and cache of one dtype, not {' and '.join(found)}"][: len(found) - 1]


def triton_refusals(q_latent, q_rope, latent, k_rope, pages, latent_scale) -> list[str]:
    """Why the Triton form cannot run arguments of these shapes."""
    reasons = _mixed(q_latent, q_rope, latent, k_rope, latent_scale)
    if pages is not None:
        size = latent.shape[1]
        if size < 16 or size & (size - 1):
            reasons.append(f"needs pages of a power of two, 16 or more tokens, not {size}")
    if latent_scale is not None and q_latent.dtype == jnp.float32:
        reasons.append("multiplies a float8 cache in bfloat16 or float16, not float32")
    return reasons


def mosaic_refusals(q_latent, q_rope, latent, k_rope, pages, latent_scale) -> list[str]:
    """Why the Mosaic form cannot run arguments of these shapes."""
    reasons = _mixed(q_latent, q_rope, latent, k_rope, latent_scale)
    heads, width = q_latent.shape[2:]
    if heads % 64:
        reasons.append(f"needs a multiple of 64 heads, not {heads}")
    if (width, q_rope.shape[3]) != (512, 64):
        reasons.append(f"needs 512 + 64 numbers a token, not {width} + {q_rope.shape[3]}")
    if q_latent.dtype != jnp.bfloat16:
        reasons.append(f"needs bfloat16, not {q_latent.dtype}")
    if latent_scale is not None:
        # From 64 heads on arithmetic is the limit, and it is bfloat16 either way.
        reasons.append("reads no float8 cache")
    if pages is None and latent.shape[1] < 64:
        reasons.append(f"needs a capacity of 64 tokens or more, not {latent.shape[1]}")
    if pages is not None and latent.shape[1] != 64:
        reasons.append(f"needs pages of 64 tokens, not {latent.shape[1]}")
    return reasons


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(scale, implementation, interpret, *arrays):
    return _guarded(scale, implementation, interpret, arrays)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _guarded(scale, implementation, interpret, arrays):
    q_latent, q_rope, latent, k_rope, _, pages, latent_scale = arrays
    described = q_latent, q_rope, latent, k_rope, pages, latent_scale

    def run_triton(*arrays):
        from deepzoo.kernels.mla_decode import triton

        return triton.mla_decode(*arrays, scale=scale, interpret=interpret)

    def run_mosaic(*arrays):
        from deepzoo.kernels.mla_decode import mosaic

        return mosaic.mla_decode(*arrays, scale=scale, interpret=interpret)

    def refuse_mosaic():
        found = mosaic_refusals(*described)
        return found if interpret else found + hopper_only()

    def refuse_triton():
        found = triton_refusals(*described)
        return found if interpret else found + ampere_or_newer()

    forms = {
        "mosaic": Form(run_mosaic, refuse_mosaic),
        "triton": Form(run_triton, refuse_triton),
        "xla": Form(partial(xla.mla_decode, scale=scale), list),
    }
    return dispatch("mla_decode", implementation, forms, *arrays, interpret=interpret)


def _forward(scale, implementation, interpret, arrays):
    raise NotImplementedError(
        "mla_decode has no gradient: it reads a cache, which no loss reaches. Train through"
        " mla_prefill (whole sequences without a cache), or stop_gradient the arguments"
    )


def _backward(scale, implementation, interpret, saved, gradient):
    raise AssertionError("the forward pass of a gradient has raised already")


_guarded.defvjp(_forward, _backward)
