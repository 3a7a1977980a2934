"""The GRPO family as one function of its arguments.

GRPO as R1-Zero used it (DeepSeekMath, arXiv 2402.03300, eq. 3 and 4; R1, arXiv 2501.12948, eq. 1
to 3), Dr. GRPO (arXiv 2503.20783), DAPO (arXiv 2503.14476), GSPO (arXiv 2507.18071) and CISPO
(MiniMax-M1, arXiv 2506.13585) differ in how they clip, at which level they take the ratio, and what
they divide by.

With r = pi / pi_old of a token, A the advantage of its answer, D the estimate of the divergence
from the reference, the objective is the mean of min(r A, clip(r, 1 - low, 1 + high) A) - beta D;
its negative is what is returned.
N answers  T positions
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from deepzoo.recipes.parts.step import Mean, Output, Peak


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """Which member of the family. The defaults are GRPO with one update a rollout, without KL."""

    clip_low: float = 0.2
    """The ratio counts from 1 - clip_low; 1 or more leaves it open below."""
    clip_high: float = 0.2
    """The ratio counts to 1 + clip_high. DAPO 0.28; R1's first stage 10."""
    dual_clip: float = 0.0
    """Bounds the loss where the advantage is negative by this ratio, such as 3; 0: no bound."""
    level: Literal["token", "sequence"] = "token"
    """Where the ratio is taken. GSPO: of the sequence, its geometric mean over the tokens."""
    form: Literal["clip", "cispo"] = "clip"
    """CISPO: the clipped ratio is a constant weight, so that every token keeps its gradient."""
    norm: Literal["sequence", "token", "constant"] = "sequence"
    """Mean over the tokens of each answer, then over answers (GRPO); over all tokens (DAPO); or
    sums divided by the longest possible answer (Dr. GRPO), which favours no length."""
    kl: Literal["k1", "k2", "k3", "unbiased"] = "k3"
    """Estimate of the divergence from the reference: with d = log(reference / pi), k1 = -d, k2 =
    d^2 / 2, k3 = e^d - d - 1; unbiased: r k3, whose gradient is that of the divergence itself."""
    beta: float = 0.0
    """Weight of the divergence; 0 needs no reference."""
    entropy: float = 0.0
    """Weight of an entropy bonus."""
    correction: Literal["none", "truncate", "mask"] = "none"
    """For rollouts by another program or precision: each token (or answer, as `level`) is weighted
    by pi_old / pi_rollout, at most `cap` (truncated importance sampling), or left out where that
    lies outside 1/`cap` to `cap`."""
    cap: float = 2.0
    """See `correction`."""
    off_policy: float = 0.0
    """Leaves out answers with negative advantage that pi has left by more than this, as mean
    log(pi_old / pi) per token; 0 keeps all (V3.2, arXiv 2512.02556)."""


def policy_loss(
    objective: Objective,
    logprobs: jax.Array,
    entropy: jax.Array,
    old: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    longest: int,
    reference: jax.Array | None = None,
    rollout: jax.Array | None = None,
) -> Output:
    """The loss of N answers, with its weight and metrics as sums.

    Args:
        objective: the member of the family.
        logprobs: float32 [N, T], of the tokens under the policy that is trained.
        entropy: float32 [N, T].
        old: float32 [N, T], under the policy that was sampled from; no gradient.
        advantages: float32 [N].
        mask: float32 [N, T], 1 for tokens that the model wrote and that count.
        longest: tokens an answer can have at most, for `norm="constant"`.
        reference: float32 [N, T], under the reference; needed where beta is not 0.
        rollout: float32 [N, T], as the generator reported them, where `old` is something else.

    Returns:
        Output; its weight is the number of tokens for `norm="token"`, else that of answers with any
        token that counts. An answer whose advantage is 0 adds nothing to the policy's part.
        Metrics: entropy; clipped, the share of tokens whose gradient is cut; kl; mismatch and
        mismatch_max, |log pi - log pi_rollout| of the trainer's pi_old, or, where `old` is the
        generator's, of pi itself: in the first update from a rollout that is the difference between
        the two programs, later ones add what the updates changed.

    Raises:
        ValueError: beta is not 0 and there is no reference; a correction without `rollout`.
    """
    if objective.beta and reference is None:
        raise ValueError(f"policy_loss: beta is {objective.beta}, which needs reference=")
    if objective.correction != "none" and rollout is None:
        raise ValueError(f"policy_loss: correction {objective.correction!r} needs rollout=")
    o, kept = objective, mask > 0
    mask = mask.astype(jnp.float32)
    # Padding may hold anything: it must not reach an exp, whose gradient would be NaN.
    logprobs, old = jnp.where(kept, logprobs, 0.0), jax.lax.stop_gradient(jnp.where(kept, old, 0.0))
    tokens = mask.sum(axis=-1)
    each = jnp.maximum(tokens, 1.0)
    advantage = advantages[:, None]
    if o.off_policy:
        left = ((old - jax.lax.stop_gradient(logprobs)) * mask).sum(axis=-1) / each
        mask = mask * ~((advantages < 0) & (left > o.off_policy))[:, None]

    difference = logprobs - old
    if o.level == "sequence":
        difference = jnp.broadcast_to(
            ((difference * mask).sum(axis=-1) / each)[:, None], difference.shape
        )
    ratio = jnp.exp(difference)
    clipped = jnp.clip(ratio, max(0.0, 1 - o.clip_low), 1 + o.clip_high)
    if o.form == "cispo":
        gain = jax.lax.stop_gradient(clipped) * advantage * logprobs
        outside = clipped != ratio
    else:
        gain = jnp.minimum(ratio * advantage, clipped * advantage)
        outside = ratio * advantage > clipped * advantage  # where the gradient is cut
        if o.dual_clip:
            gain = jnp.where(advantage < 0, jnp.maximum(gain, o.dual_clip * advantage), gain)
    sampled = old if rollout is None else jax.lax.stop_gradient(jnp.where(kept, rollout, 0.0))
    if o.correction != "none":
        gap = old - sampled
        if o.level == "sequence":
            gap = jnp.broadcast_to(((gap * mask).sum(axis=-1) / each)[:, None], gap.shape)
        weight = jnp.exp(gap)
        inside = (weight >= 1 / o.cap) & (weight <= o.cap)
        weight = jnp.minimum(weight, o.cap) if o.correction == "truncate" else weight * inside
        gain = gain * weight
    loss, divergence = -gain, jnp.zeros_like(gain)
    if reference is not None:
        d = jax.lax.stop_gradient(jnp.where(kept, reference, 0.0)) - logprobs
        k3 = jnp.exp(d) - d - 1
        divergence = {"k1": -d, "k2": d * d / 2, "k3": k3, "unbiased": ratio * k3}[o.kl]
        loss = loss + o.beta * divergence
    if o.entropy:
        loss = loss - o.entropy * entropy

    if o.norm == "token":
        total, count = (loss * mask).sum(), tokens.sum()
    else:
        by = each if o.norm == "sequence" else jnp.float32(longest)
        total = ((loss * mask).sum(axis=-1) / by).sum()
        count = (tokens > 0).sum().astype(jnp.float32)

    def mean(values: jax.Array) -> Mean:
        return Mean((values * mask).sum(), mask.sum())

    trained = jax.lax.stop_gradient(logprobs) if rollout is None else old
    off = jnp.abs(trained - sampled) * mask
    metrics = {
        "entropy": mean(jax.lax.stop_gradient(jnp.where(kept, entropy, 0.0))),
        "clipped": mean(outside),
        "mismatch": mean(off),
        "mismatch_max": Peak(off.max(initial=0.0)),
    }
    if reference is not None:
        metrics["kl"] = mean(divergence)
    return Output(total, count, metrics)
