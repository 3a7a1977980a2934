"""Log-probabilities and entropies of tokens under a model, logits never held whole.

B sequences  T positions  M = B*T  D model  V vocabulary
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepzoo import zoo
from deepzoo.kernels.router import Routing
from deepzoo.zoo.config import Config
from deepzoo.zoo.model import Params


class Scored(NamedTuple):
    """What a model says of given tokens; position t is about token t + 1.

    Attributes:
        logprobs: float32 [B, T - 1], differentiable.
        entropy: float32 [B, T - 1], of the distribution that token t + 1 comes from, in nats.
        routing: of the expert layers, [L, B, T - 1, ...]; None for dense models.
    """

    logprobs: jax.Array
    entropy: jax.Array
    routing: Routing | None


def score(
    config: Config,
    params: Params,
    tokens: jax.Array,
    segments: jax.Array | None = None,
    *,
    temperature: float = 1.0,
    experts: jax.Array | None = None,
    chunk: int = 1024,
    remat: bool | str = False,
) -> Scored:
    """Scores every token but the first of each sequence.

    Args:
        config: the model.
        params: its parameters.
        tokens: int32 [B, T]; padding behind the end changes nothing before it.
        segments: int32 [B, T]; tokens see their own segment only (packed sequences).
        temperature: of the distribution, as in sampling; reinforcement learning compares policies
            at the temperature that they sample with.
        experts: int32 [L, B, T - 1, K], `Scored.routing.indices` of another pass, taken instead of
            this one's choice (routing replay).
        chunk: positions whose logits are held at a time; they are made again in the backward pass.
        remat: what to recompute in the backward pass, see `zoo.apply`.
    """
    inside = None if segments is None else segments[:, :-1]
    out = zoo.apply(
        config, params, tokens[:, :-1], segment_ids=inside, experts=experts, logits=False,
        remat=remat,
    )  # fmt: skip
    head = params["embed_tokens" if config.tie_word_embeddings else "lm_head"]["weight"]
    batch, length, width = out.hidden.shape
    logprobs, entropy = head_logprobs(
        out.hidden.reshape(-1, width), head, tokens[:, 1:].reshape(-1), temperature, chunk
    )
    shape = (batch, length)
    return Scored(logprobs.reshape(shape), entropy.reshape(shape), out.routing)


def head_logprobs(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, temperature: float, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target and entropy at its position, float32 [M].

    Unlike `linear_cross_entropy`, every log-probability has a gradient of its own, at the price of
    a fourth matrix product: the objective decides only afterwards what each one counts.

    Args:
        hidden: [M, D], after the final norm.
        head: [V, D].
        targets: int32 [M].
        temperature: above 0.
        chunk: rows at a time.
    """
    count = hidden.shape[0]
    size = min(chunk, count)
    spare = -count % size

    @jax.checkpoint
    def part(rows):
        x, target = rows
        logits = jax.lax.dot_general(
            x, head.astype(x.dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        logp = jax.nn.log_softmax(logits / temperature, axis=-1)
        entropy = -(jnp.exp(logp) * logp).sum(axis=-1)
        return jnp.take_along_axis(logp, target[:, None], axis=-1)[:, 0], entropy

    x = jnp.pad(hidden, ((0, spare), (0, 0))).reshape(-1, size, hidden.shape[1])
    target = jnp.pad(targets, (0, spare)).reshape(-1, size)
    logprobs, entropy = jax.lax.map(part, (x, target))
    return logprobs.reshape(-1)[:count], entropy.reshape(-1)[:count]
