"""Chunked linear cross entropy in XLA.

A scan over chunks of tokens makes each chunk's logits, their log-sum-exp in one pass, and, when a
gradient is wanted, both gradients at once: three matrix products in all, where making the logits
again in the backward pass would be a fourth.
M tokens  D width  V vocabulary
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

_LOGITS = 512 * 2**20  # bytes of float32 logits that a chunk may take
_FEW = 4  # chunks whose gradients to w may be added in w's own dtype


def chunk_size(tokens: int, vocabulary: int) -> int:
    """Tokens of a chunk: a power of two from 256 to 4096 whose logits take at most 512 MiB (1024 at
    V2's and V3's vocabularies), so that the products stay large; no more than there are."""
    fits = max(_LOGITS // (4 * vocabulary), 1)
    return max(min(max(256, min(4096, 1 << (fits.bit_length() - 1))), tokens), 1)


def linear_cross_entropy(
    x: jax.Array,
    w: jax.Array,
    targets: jax.Array,
    weights: jax.Array | None = None,
    *,
    z_loss: float = 0.0,
    chunk: int | None = None,
    accumulator: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Summed loss and the log-probability of every target.

    loss = sum over tokens m of weights[m] * (-logprob[m] + z_loss * lse[m]^2), with lse the
    log-sum-exp of the logits x w^T; z-loss as in PaLM (arXiv 2204.02311), section 5. Logits are
    float32 and so is everything made of them; they enter the gradients' products in x's dtype.

    Differentiable in `x` and `w` through the summed loss; the log-probabilities carry no gradient.

    Args:
        x: [M, D], final hidden states.
        w: [V, D], the output head.
        targets: int32 [M]; anything where the weight is 0.
        weights: float32 [M], weight of each token; ones by default.
        z_loss: coefficient of logsumexp^2.
        chunk: tokens whose logits exist at one time; by default as many as 512 MiB of logits hold,
            256 to 4096.
        accumulator: dtype in which the chunks' gradients to `w` are added up; each product is
            summed in float32 in any case. By default w's dtype up to 4 chunks, which takes no
            memory beside the gradient itself, and float32 (2 V D more bytes for a bfloat16 `w`)
            beyond, since every addition rounds. The error of that gradient against float64, as
            a share of its norm: in bfloat16 0.3% at 4 chunks and 0.7% at 32, in float32 0.2% at
            both (`pytest tests/kernels/test_linear_cross_entropy.py -k accumulator -s`).

    Returns:
        Loss float32 [], and log-probabilities float32 [M].

    Raises:
        ValueError: shapes that do not belong together.
    """
    x, w, targets = (jnp.asarray(a) for a in (x, w, targets))
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else jnp.asarray(weights)
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(
            f"linear_cross_entropy needs x [M, D] and w [V, D], got {x.shape} and {w.shape}"
        )
    if targets.shape != x.shape[:1] or weights.shape != targets.shape:
        raise ValueError(
            f"linear_cross_entropy needs targets and weights [M] = {x.shape[:1]}, got"
            f" {targets.shape} and {weights.shape}"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least one token, got {chunk}")
    size = chunk_size(x.shape[0], w.shape[0]) if chunk is None else min(chunk, max(x.shape[0], 1))
    if accumulator is None:
        accumulator = (
            w.dtype if x.shape[0] <= _FEW * size else jnp.promote_types(w.dtype, "float32")
        )
    kept = jnp.dtype(accumulator)
    return _loss(z_loss, size, kept, x, w, targets, weights.astype(jnp.float32))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _loss(z_loss, chunk, kept, x, w, targets, weights):
    return _scan(z_loss, chunk, kept, x, w, targets, weights, gradients=False)


def _loss_fwd(z_loss, chunk, kept, x, w, targets, weights):
    return _scan(z_loss, chunk, kept, x, w, targets, weights, gradients=True)


def _loss_bwd(z_loss, chunk, kept, saved, cotangents):
    del z_loss, chunk, kept
    to_x, to_w = saved
    scale = cotangents[0]
    return (to_x * scale).astype(to_x.dtype), (to_w * scale).astype(to_w.dtype), None, None


_loss.defvjp(_loss_fwd, _loss_bwd)


def _log_sum_exp(logits: jax.Array) -> jax.Array:
    """Of each row, in one pass over it: running maxima and sums are combined as they come."""

    def combine(a, b):
        top = jnp.maximum(a[0], b[0])
        # Of two empty parts the sum is 0 whatever the factor; -inf - -inf must not make it NaN.
        safe = jnp.where(top == -jnp.inf, 0.0, top)
        return top, a[1] * jnp.exp(a[0] - safe) + b[1] * jnp.exp(b[0] - safe)

    start = (jnp.float32(-jnp.inf), jnp.float32(0))
    top, total = jax.lax.reduce((logits, jnp.ones_like(logits)), start, combine, (1,))
    return top + jnp.log(total)


def _scan(z_loss, chunk, kept, x, w, targets, weights, *, gradients):
    tokens = x.shape[0]
    spare = -tokens % chunk
    parts = tuple(
        jnp.pad(a, ((0, spare), *((0, 0),) * (a.ndim - 1))).reshape(-1, chunk, *a.shape[1:])
        for a in (x, targets, weights)
    )

    def body(carry, part):
        x, target, weight = part
        loss, to_w = carry
        target = jnp.clip(target, 0, w.shape[0] - 1)
        logits = jax.lax.dot_general(
            x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        lse = _log_sum_exp(logits)
        logprob = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0] - lse
        loss = loss + (weight * (-logprob + z_loss * lse**2)).sum()
        if not gradients:
            return (loss, to_w), (logprob, jnp.zeros((0,), x.dtype))
        slope = jnp.exp(logits - lse[:, None]) * (weight * (1.0 + 2.0 * z_loss * lse))[:, None]
        hit = target[:, None] == jnp.arange(w.shape[0], dtype=target.dtype)
        slope = (slope - jnp.where(hit, weight[:, None], 0.0)).astype(x.dtype)
        to_x = jax.lax.dot_general(
            slope, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        to_w = to_w + jax.lax.dot_general(
            slope, x, (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.promote_types(kept, x.dtype),
        ).astype(kept)  # fmt: skip
        return (loss, to_w), (logprob, to_x.astype(x.dtype))

    start = (jnp.zeros((), jnp.float32), jnp.zeros(w.shape if gradients else (), kept))
    (loss, to_w), (logprob, to_x) = jax.lax.scan(body, start, parts)
    out = (loss, logprob.reshape(-1)[:tokens])
    if not gradients:
        return out
    return out, (to_x.reshape(-1, x.shape[1])[:tokens], to_w.astype(w.dtype))
