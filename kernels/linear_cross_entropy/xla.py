"""Chunked linear cross entropy in XLA.

M tokens  D width  V vocabulary
"""

from functools import partial

import jax
import jax.numpy as jnp


def linear_cross_entropy(
    x: jax.Array,
    w: jax.Array,
    targets: jax.Array,
    weights: jax.Array | None = None,
    *,
    z_loss: float = 0.0,
    chunk: int = 1024,
) -> tuple[jax.Array, jax.Array]:
    """Summed loss and the log-probability of every target.

    Differentiable in `x` and `w` through the summed loss; the log-probabilities carry no gradient.

    Args:
        x: [M, D], final hidden states.
        w: [V, D], the output head.
        targets: int32 [M]; anything where the weight is 0.
        weights: float32 [M], weight of each token; ones by default.
        z_loss: coefficient of logsumexp^2.
        chunk: tokens whose logits exist at one time.

    Returns:
        Loss float32 [], and log-probabilities float32 [M].
    """
    weights = (
        jnp.ones(targets.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
    )
    return _loss(z_loss, chunk, x, w, targets, weights)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(z_loss, chunk, x, w, targets, weights):
    return _scan(z_loss, chunk, x, w, targets, weights, gradients=False)[0]


def _loss_fwd(z_loss, chunk, x, w, targets, weights):
    out, saved = _scan(z_loss, chunk, x, w, targets, weights, gradients=True)
    return out, saved


def _loss_bwd(z_loss, chunk, saved, cotangents):
    del z_loss, chunk
    to_x, to_w = saved
    scale = cotangents[0]
    return (to_x * scale).astype(to_x.dtype), (to_w * scale).astype(to_w.dtype), None, None


_loss.defvjp(_loss_fwd, _loss_bwd)


def _scan(z_loss, chunk, x, w, targets, weights, *, gradients):
    tokens = x.shape[0]
    chunk = min(chunk, max(tokens, 1))
    spare = -tokens % chunk
    x = jnp.pad(x, ((0, spare), (0, 0)))
    targets, weights = jnp.pad(targets, (0, spare)), jnp.pad(weights, (0, spare))
    parts = tuple(a.reshape(-1, chunk, *a.shape[1:]) for a in (x, targets, weights))

    def body(carry, part):
        x, target, weight = part
        logits = jax.lax.dot_general(
            x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        lse = jax.nn.logsumexp(logits, axis=-1)
        logprob = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0] - lse
        loss, to_w = carry
        loss = loss + (weight * (-logprob + z_loss * lse**2)).sum()
        to_x = jnp.zeros((0,), x.dtype)
        if gradients:
            slope = jnp.exp(logits - lse[:, None]) * (weight * (1.0 + 2.0 * z_loss * lse))[:, None]
            slope = slope - jax.nn.one_hot(target, w.shape[0], dtype=jnp.float32) * weight[:, None]
            slope = slope.astype(x.dtype)
            to_x = jax.lax.dot_general(
                slope, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )
            to_x = to_x.astype(x.dtype)
            to_w = to_w + jax.lax.dot_general(
                slope, x, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )
        return (loss, to_w), (logprob, to_x)

    start = (jnp.zeros((), jnp.float32), jnp.zeros(w.shape if gradients else (), jnp.float32))
    (loss, to_w), (logprob, to_x) = jax.lax.scan(body, start, parts)
    out = (loss, logprob.reshape(-1)[:tokens])
    if not gradients:
        return out, None
    return out, (to_x.reshape(-1, x.shape[1])[:tokens], to_w.astype(w.dtype))
