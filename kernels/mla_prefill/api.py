"""Public entry, gradient and choice of form of latent prefill attention.

Each form is a pair of functions with one signature,

    forward(q_nope, q_rope, k_nope, k_rope, v, q_segments, k_segments, *, scale, q_offset,
            interpret) -> (out, lse)
    backward(q_nope, q_rope, k_nope, k_rope, v, q_segments, k_segments, out, lse, d_out, d_lse, *,
             scale, q_offset, interpret) -> (dq_nope, dq_rope, dk_nope, dk_rope, dv)

with both segment arrays int32 or both None, and q_offset an int or int32 [B]. A GPU form's module
also has refusals(q_nope, ..., k_segments, *, scale, q_offset, interpret) -> list of reasons.
    xla       xla.py, everywhere
    triton    triton.py (forward), triton_backward.py; one refusals for both, in triton.py
    mosaic    mosaic.py (forward), mosaic_backward.py; each with its own refusals
The forward pass keeps out and lse, the backward pass recomputes the probabilities from them.
B batch  T query  S key  H heads  N nope  R rope  V value
"""

import importlib
import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deepzoo.kernels.dispatch import Form, Implementation, ampere_or_newer, dispatch, hopper_only


class _Static(NamedTuple):
    """What a traced program is specialised to; `q_offset` is None where it is traced."""

    scale: float
    q_offset: int | None
    implementation: Implementation
    interpret: bool


def mla_prefill(
    q_nope: jax.Array,
    q_rope: jax.Array,
    k_nope: jax.Array,
    k_rope: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    q_segments: jax.Array | None = None,
    k_segments: jax.Array | None = None,
    q_offset: int | jax.Array = 0,
    implementation: Implementation = "auto",
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Causal attention with expanded heads (V2 report, arXiv 2405.04434, eq. 9-19).

    score(t, s, h) = scale * (q_nope[t, h] . k_nope[s, h] + q_rope[t, h] . k_rope[s]); query t sees
    key s where s <= t + q_offset and both lie in the same segment. Differentiable in the first five
    arguments, through both results; probabilities are recomputed, never stored.

    Args:
        q_nope: [B, T, H, N].
        q_rope: [B, T, H, R], rotated.
        k_nope: [B, S, H, N].
        k_rope: [B, S, R], rotated, one for all heads; neither broadcast nor concatenated.
        v: [B, S, H, V].
        scale: softmax scale, a Python number.
        q_segments: int32 [B, T]; a query sees only keys of its own segment (packed sequences,
            padding).
        k_segments: int32 [B, S]; given with q_segments.
        q_offset: index of the first query among the keys; a Python int, or int32 scalar or [B].
            Keys that no query sees must be finite all the same.
        implementation: the form, see `deepzoo.kernels.dispatch`.
        interpret: run the named form in Pallas's interpreter, on any platform.

    Returns:
        Values [B, T, H, V] in v's dtype, and log-sum-exp float32 [B, T, H]; a query that sees
        nothing gets 0 and -inf. Under `jax.checkpoint` they carry the names "attention_out" and
        "attention_lse": a policy that saves both spares the backward pass the second forward.

    Raises:
        ValueError: shapes that do not belong together, or only one of the two segment arrays.
        UnsupportedError: the named form cannot run these arguments; the message lists why.
    """
    arrays = tuple(jnp.asarray(a) for a in (q_nope, q_rope, k_nope, k_rope, v))
    if (q_segments is None) != (k_segments is None):
        raise ValueError("mla_prefill: q_segments and k_segments come together or not at all")
    _check_shapes(*arrays)
    batch, queries, keys = arrays[0].shape[0], arrays[0].shape[1], arrays[2].shape[1]
    segments = []
    for name, marks, length in (
        ("q_segments", q_segments, queries),
        ("k_segments", k_segments, keys),
    ):
        if marks is not None and jnp.shape(marks) != (batch, length):
            raise ValueError(
                f"mla_prefill: {name} must be int32 [{batch}, {length}], got {jnp.shape(marks)}"
            )
        segments.append(None if marks is None else jnp.asarray(marks, jnp.int32))
    static, traced = _split_offset(q_offset, batch)
    options = _Static(float(scale), static, implementation, interpret)
    return _jitted(*arrays, *segments, traced, options)


def backward(
    q_nope, q_rope, k_nope, k_rope, v, q_segments, k_segments, out, lse, d_out, d_lse, *,
    scale: float, q_offset: int = 0, implementation: Implementation = "auto",
    interpret: bool = False,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """The backward pass alone, as differentiating `mla_prefill` runs it; for benches and tests.

    Args:
        out, lse: what `mla_prefill` returned for the same arguments.
        d_out, d_lse: their cotangents.

    Returns:
        Gradients of the first five arguments, in their shapes and dtypes.
    """
    options = _Static(float(scale), q_offset, implementation, interpret)
    arrays = (q_nope, q_rope, k_nope, k_rope, v, q_segments, k_segments)
    return _pull_back(arrays, (out, lse), (d_out, d_lse), None, options)


def _check_shapes(q_nope, q_rope, k_nope, k_rope, v) -> None:
    shapes = [a.shape for a in (q_nope, q_rope, k_nope, k_rope, v)]
    ranks = [len(s) for s in shapes]
    fits = ranks == [4, 4, 4, 3, 4]
    if fits:
        (batch, queries, heads, nope), keys, rope = shapes[0], shapes[2][1], shapes[1][3]
        fits = shapes[1:4] == [
            (batch, queries, heads, rope),
            (batch, keys, heads, nope),
            (batch, keys, rope),
        ] and shapes[4][:3] == (batch, keys, heads)
    if not fits or not all(all(s) for s in shapes):
        raise ValueError(
            "mla_prefill needs q_nope [B, T, H, N], q_rope [B, T, H, R], k_nope [B, S, H, N],"
            f" k_rope [B, S, R] and v [B, S, H, V], none of them empty; got {shapes}"
        )


def _split_offset(q_offset, batch: int) -> tuple[int | None, jax.Array | None]:
    """q_offset as a static int, or as int32 [B]."""
    if isinstance(q_offset, jax.Array) or jnp.ndim(q_offset):
        if jnp.shape(q_offset) not in ((), (batch,)):
            raise ValueError(
                f"mla_prefill: q_offset must be a number or [{batch}], got {jnp.shape(q_offset)}"
            )
        return None, jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (batch,))
    return operator.index(q_offset), None


@partial(jax.custom_vjp, nondiff_argnums=(8,))
def _attend(q_nope, q_rope, k_nope, k_rope, v, q_segments, k_segments, offset, options):
    arrays = (q_nope, q_rope, k_nope, k_rope, v, q_segments, k_segments)
    forms = _forms("forward", arrays, offset, options)
    return dispatch(
        "mla_prefill", options.implementation, forms, *arrays, offset, interpret=options.interpret
    )


def _attend_fwd(q_nope, q_rope, k_nope, k_rope, v, q_segments, k_segments, offset, options):
    arrays = (q_nope, q_rope, k_nope, k_rope, v, q_segments, k_segments, offset)
    out, lse = _attend(*arrays, options)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, lse), (*arrays, out, lse)


def _attend_bwd(options, saved, gradients):
    arrays, offset, results = saved[:7], saved[7], saved[8:]
    return (*_pull_back(arrays, results, gradients, offset, options), None, None, None)


def _pull_back(arrays, results, gradients, offset, options):
    return dispatch(
        "mla_prefill backward", options.implementation,
        _forms("backward", arrays, offset, options), *arrays, *results, *gradients, offset,
        interpret=options.interpret,
    )  # fmt: skip


_attend.defvjp(_attend_fwd, _attend_bwd)

# Layers of one shape share one trace, with its branches for other platforms.
_jitted = jax.jit(_attend, static_argnums=8)


def _forms(direction: str, arrays, offset, options: _Static) -> dict[str, Form]:
    """The forms of "forward" or "backward", best first for a GPU; `auto` never goes past xla."""

    def keywords(offset) -> dict[str, Any]:
        q_offset = options.q_offset if offset is None else offset
        return {"scale": options.scale, "q_offset": q_offset, "interpret": options.interpret}

    def form(file: str, refuser: str | None, first: Callable[[], list[str]] = list) -> Form:
        # Imported where it is used: Pallas takes its time, which CPUs need not spend.
        def module(name: str) -> Any:
            return importlib.import_module(f"deepzoo.kernels.mla_prefill.{name}")

        def run(*a: Any) -> Any:
            return getattr(module(file), direction)(*a[:-1], **keywords(a[-1]))

        def refusals() -> list[str]:
            if refuser is None:
                return []
            # A GPU of the wrong kind is reason enough, and spares the import.
            gpu = [] if options.interpret else first()
            return gpu or module(refuser).refusals(*arrays, **keywords(offset))

        return Form(run, refusals)

    suffix = "" if direction == "forward" else "_backward"
    return {
        "mosaic": form(f"mosaic{suffix}", f"mosaic{suffix}", hopper_only),
        "triton": form(f"triton{suffix}", "triton", ampere_or_newer),
        "xla": form("xla", None),
    }
