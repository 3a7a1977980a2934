"""Router in plain XLA: a few kilobytes a token, so launches and not bytes are its cost.

M tokens  E experts  K chosen  G groups
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp


class Routing(NamedTuple):
    """Result of routing M tokens to K of E experts.

    Attributes:
        indices: int32 [..., M, K], distinct within a token, best first.
        weights: float32 [..., M, K], what each chosen expert's output is multiplied by.
        scores: float32 [..., M, E], unbiased affinities of every expert (the balance losses need
            all of them).
    """

    indices: jax.Array
    weights: jax.Array
    scores: jax.Array


def gate(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Router logits x weight^T in float32 (V2 report eq. 20, V3 report eq. 15), [..., E].

    The choice of experts must not hang on rounding, so both families' programs widen both sides to
    float32 and multiply there. On tensor cores that product is either slow (224 us at V3's 4096
    tokens on an H200 at its float32 rate, where bfloat16 takes 19 us) or, as TF32, not float32.
    But products of bfloat16 values are exact in float32 already, so bfloat16 operands are
    multiplied as they are, with float32 sums: the same terms at full speed. All others are widened
    and multiplied at the highest precision.

    Args:
        x: [..., D], hidden states.
        weight: [E, D].
    """
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    if x.dtype == jnp.bfloat16 and weight.dtype == jnp.bfloat16:
        return jax.lax.dot_general(x, weight, contract, preferred_element_type=jnp.float32)
    return jax.lax.dot_general(
        x.astype(jnp.float32),
        weight.astype(jnp.float32),
        contract,
        precision=jax.lax.Precision.HIGHEST,
    )


def router(
    logits: jax.Array,
    bias: jax.Array | None = None,
    *,
    k: int,
    scoring: Literal["softmax", "sigmoid"],
    groups: int = 1,
    top_groups: int = 1,
    group_score: Literal["max", "top2"] = "max",
    normalise: bool = False,
    scale: float = 1.0,
    indices: jax.Array | None = None,
) -> Routing:
    """Chooses `k` experts for every token.

    The choice is made on biased scores, restricted to the best `top_groups` of `groups` groups
    where there is more than one; the weights are the unbiased scores of the chosen experts.
    Excluded groups are masked with -inf, as in the makers' inference code, so that a strongly
    negative bias cannot bring an excluded expert back.

    Args:
        logits: float32 [M, E].
        bias: float32 [E], V3's balancing bias (eq. 16), or None.
        k: experts per token.
        scoring: how logits become affinities.
        groups: number of equal, contiguous groups.
        top_groups: groups that stay eligible.
        group_score: V2 scores a group by its best expert, V3 by the sum of its two best.
        normalise: divide the weights by their sum (V3, eq. 13).
        scale: `routed_scaling_factor`.
        indices: int32 [M, K], experts that are taken instead of a choice of its own, such as those
            that another pass chose; the weights are still the scores of these logits.

    Raises:
        ValueError: `k` experts that the groups do not hold, or shapes that do not belong together.
    """
    if faults := _faults(logits, bias, k, groups, top_groups, group_score):
        raise ValueError(f"router: {'; '.join(faults)}")
    if indices is not None and indices.shape != (len(logits), k):
        raise ValueError(
            f"router: indices must be [M, K] = {(len(logits), k)}, got {indices.shape}"
        )
    logits = logits.astype(jnp.float32)
    scores = jax.nn.softmax(logits, axis=-1) if scoring == "softmax" else jax.nn.sigmoid(logits)
    if indices is None:
        indices = _chosen(scores, bias, k, groups, top_groups, group_score)
    weights = jnp.take_along_axis(scores, indices, axis=-1)
    if normalise:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return Routing(indices, weights * scale, scores)


def _chosen(
    scores: jax.Array, bias: jax.Array | None, k: int, groups: int, top_groups: int, group_score
) -> jax.Array:
    tokens, experts = scores.shape
    choice = scores if bias is None else scores + bias
    if groups > 1:
        by_group = choice.reshape(tokens, groups, experts // groups)
        if group_score == "max":
            rank = by_group.max(axis=-1)
        else:
            rank = jax.lax.top_k(by_group, 2)[0].sum(axis=-1)
        best = jax.lax.top_k(rank, top_groups)[1]
        keep = jax.nn.one_hot(best, groups, dtype=jnp.bool_).any(axis=1)
        choice = jnp.where(keep[..., None], by_group, -jnp.inf).reshape(tokens, experts)
    return jax.lax.top_k(choice, k)[1].astype(jnp.int32)


def _faults(logits, bias, k, groups, top_groups, group_score) -> list[str]:
    if logits.ndim != 2:
        return [f"logits must be [M, E], got {logits.shape}"]
    experts, faults = logits.shape[1], []
    if bias is not None and bias.shape != (experts,):
        faults.append(f"bias must be [E] = {(experts,)}, got {bias.shape}")
    if groups < 1 or experts % groups:
        return [*faults, f"{experts} experts do not form {groups} equal groups"]
    if groups > 1 and not 1 <= top_groups <= groups:
        faults.append(f"top_groups must be from 1 to {groups}, got {top_groups}")
    if groups > 1 and group_score == "top2" and experts // groups < 2:
        faults.append(f"the two best of a group need two, but {groups} groups have one each")
    eligible = experts if groups == 1 else experts // groups * top_groups
    if not 1 <= k <= eligible:
        faults.append(f"k must be from 1 to the {eligible} experts that can be chosen, got {k}")
    return faults


def expert_counts(indices: jax.Array, experts: int, mask: jax.Array | None = None) -> jax.Array:
    """Tokens sent to each expert, int32 [E]; by comparison, not by scatter, so the result is the
    same on every rerun.

    Args:
        indices: int32 [..., K].
        experts: E.
        mask: bool [...], tokens that count; all of them by default.
    """
    hit = indices[..., None] == jnp.arange(experts, dtype=indices.dtype)
    if mask is not None:
        hit = hit & mask[..., None, None]
    return hit.sum(axis=tuple(range(hit.ndim - 1)), dtype=jnp.int32)
