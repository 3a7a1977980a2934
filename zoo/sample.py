"""Choosing the next token: temperature, top-k, top-p, min-p, a seed per request, rejection of
drafts.

B rows  V vocabulary
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """Options of each row; all arrays are [B].

    temperature: float32, 0 takes the most likely token.
    top_p: float32, keep the smallest set of tokens whose probability reaches it; 1 keeps all.
    top_k: int32, keep the k most likely; 0 keeps all.
    min_p: float32, keep tokens at least this share as likely as the most likely one; 0 keeps all.
    seed: uint32; a row's tokens depend on its seed and its own text, not on its neighbours.
    """

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    min_p: jax.Array
    seed: jax.Array


def greedy(logits: jax.Array) -> jax.Array:
    """The first most likely token of each row, int32 [B]; two plain reductions, faster than an
    argmax on CPUs."""
    best = logits == logits.max(axis=-1, keepdims=True)
    index = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    return jnp.where(best, index, logits.shape[-1] - 1).min(axis=-1)


# What one row draws at one position; each use has a stream of its own.
TOKEN, DRAFT, ACCEPT = range(3)


def log_distribution(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Log-probabilities that tokens are drawn with, float32 [B, V]; -inf where an option excludes.

    Args:
        logits: float32 [B, V].
        sampling: options; temperature 0 puts everything on the first most likely token.
    """
    cold = sampling.temperature <= 0
    tempered = logits / jnp.where(cold, 1.0, sampling.temperature)[:, None]
    limited = (sampling.top_p < 1) | (sampling.top_k > 0) | (sampling.min_p > 0)
    tempered = jax.lax.cond(
        (limited & ~cold).any(), _limit, lambda kept, _: kept, tempered, sampling
    )
    best = jnp.arange(logits.shape[1]) == greedy(logits)[:, None]
    tempered = jnp.where(cold[:, None], jnp.where(best, 0.0, -jnp.inf), tempered)
    return jax.nn.log_softmax(tempered, axis=-1)


def _limit(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Masks by rank, by cumulated probability and by share of the best, in that order."""
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    vocabulary = logits.shape[1]
    k = jnp.where(sampling.top_k > 0, sampling.top_k, vocabulary)
    keep = jnp.arange(vocabulary) < k[:, None]
    probability = jax.nn.softmax(jnp.where(keep, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability  # the best token has 0 before it
    keep &= (before < sampling.top_p[:, None]) | (jnp.arange(vocabulary) == 0)
    keep &= probability >= sampling.min_p[:, None] * probability[:, :1]
    rank = jnp.argsort(order, axis=-1)
    return jnp.where(jnp.take_along_axis(keep, rank, axis=-1), logits, -jnp.inf)


def _keys(sampling: Sampling, step: jax.Array, use: int) -> jax.Array:
    def one(seed: jax.Array, step: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), use)

    return jax.vmap(one)(sampling.seed, step)


def draw(logp: jax.Array, sampling: Sampling, step: jax.Array, use: int = TOKEN) -> jax.Array:
    """Draws int32 [B] from log-probabilities [B, V] of `log_distribution`.

    Args:
        logp: float32 [B, V].
        sampling: the rows' seeds and temperatures.
        step: int32 [B], position of the drawn token in its answer; each position has its own key.
        use: which stream of that position.
    """

    def sampled(logp: jax.Array) -> jax.Array:
        keys = _keys(sampling, step, use)
        return jax.vmap(jax.random.categorical)(keys, logp).astype(jnp.int32)

    return jax.lax.cond((sampling.temperature > 0).any(), sampled, greedy, logp)


def choose(logits: jax.Array, sampling: Sampling, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The next token int32 [B], and its log-probability under the model itself, float32 [B].

    The log-probability is at temperature 1 with nothing excluded, whatever the options are. Rows
    that are all greedy skip the distribution.

    Args:
        logits: float32 [B, V].
        sampling: options of each row.
        step: int32 [B], position of the token in its answer.
    """
    token = jax.lax.cond(
        (sampling.temperature > 0).any(),
        lambda: draw(log_distribution(logits, sampling), sampling, step),
        lambda: greedy(logits),
    )
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token, chosen - jax.nn.logsumexp(logits, axis=-1)


def verify(
    draft: jax.Array,
    draft_logp: jax.Array,
    target_logp: jax.Array,
    sampling: Sampling,
    step: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Speculative sampling's rejection step (arXiv 2302.01318): the result is distributed as the
    target.

    Args:
        draft: int32 [B], tokens drawn from `draft_logp`.
        draft_logp: float32 [B, V].
        target_logp: float32 [B, V], the distribution the token shall have.
        sampling: the rows' seeds.
        step: int32 [B], position of the token.

    Returns:
        accepted bool [B], and the token int32 [B]: the draft, or a draw from max(target - draft,
        0).
    """
    rows = jnp.arange(draft.shape[0])
    keys = _keys(sampling, step, ACCEPT)
    chance = jax.vmap(jax.random.uniform)(keys)
    ratio = target_logp[rows, draft] - draft_logp[rows, draft]
    accepted = jnp.log(chance) < ratio
    rest = jnp.maximum(jnp.exp(target_logp) - jnp.exp(draft_logp), 0.0)
    # Equal distributions leave no rest, and are never rejected; the fallback only keeps the log
    # finite.
    left = jnp.where(rest.sum(axis=-1, keepdims=True) > 0, jnp.log(rest), target_logp)
    return accepted, jnp.where(accepted, draft, draw(left, sampling, step))
