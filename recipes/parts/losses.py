"""Losses over packed rows: next token, multi-token prediction, balance of experts.

Batches are {"tokens", "segments", "weights"} [B, T + 1], see `rows.Rows`; optionally "mtp" float32
[B], the weight lambda of V3's eq. 25 at this step.
B rows  T positions  D model  E experts  K chosen  L expert layers
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from deepzoo import zoo
from deepzoo.kernels.linear_cross_entropy import linear_cross_entropy
from deepzoo.kernels.router import Routing, expert_counts
from deepzoo.recipes.parts.flops import counted
from deepzoo.recipes.parts.step import Loss, Mean, Metrics, Output
from deepzoo.zoo.config import Config


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Balance:
    """Weights of the balance losses; V2's three (eq. 23-31) and V3's one (eq. 17-20)."""

    expert: float = 0.0
    """alpha_1 of V2 (V2 0.003, V2-Lite 0.001); alpha of V3 (1e-4)."""
    device: float = 0.0
    """alpha_2 of V2 (0.05): the groups of the router are its devices."""
    communication: float = 0.0
    """alpha_3 of V2 (0.02)."""


def next_token(
    config: Config,
    *,
    balance: Balance | None = None,
    mtp: float = 0.0,
    z_loss: float = 0.0,
    remat: bool | str = False,
) -> Loss:
    """Cross entropy of the next token, with what V2 and V3 add to it.

    Args:
        config: the model.
        balance: weights of the balance losses.
        mtp: lambda of the multi-token prediction loss (V3, eq. 24-25): the mean over depths of the
            cross entropy of the tokens further ahead. A batch's own "mtp" multiplies it.
        z_loss: weight of the squared log-sum-exp of the logits.
        remat: what to recompute in the backward pass, see `zoo.apply`.

    Returns:
        A loss; metrics nll, mtp0, ..., balance (the expert-level one, 1 for each layer that is
        perfectly even), device, communication, load, and those of `flops.counted`.
    """
    weigh = balance or Balance()

    def loss(params, batch, key) -> Output:
        del key
        seen, inside = batch["tokens"][:, :-1], batch["segments"][:, :-1]
        head = params["embed_tokens" if config.tie_word_embeddings else "lm_head"]["weight"]

        def cross_entropy(hidden, ahead: int, row_weight=None):
            """(loss, plain sum of negative log-probabilities, plain weight)"""
            target, weight = shifted(batch, ahead)
            counted = weight if row_weight is None else weight * row_weight[:, None]
            x = hidden.reshape(-1, hidden.shape[-1])
            total, logprobs = linear_cross_entropy(
                x, head, target.reshape(-1), counted.reshape(-1), z_loss=z_loss
            )
            return total, -(logprobs * weight.reshape(-1)).sum(), weight.sum()

        out = zoo.apply(config, params, seen, segment_ids=inside, logits=False, remat=remat)
        total, nll, weight = cross_entropy(out.hidden, 1)
        metrics: Metrics = {"nll": nll, **counted(config, inside, mtp=mtp > 0)}
        load: dict[str, Any] = {}
        routings: list[Routing] = []
        if out.routing is not None:
            routings.append(out.routing)
            load["moe"] = _counts(config, out.routing)
        hidden = out.hidden
        for depth in range(config.num_nextn_predict_layers if mtp else 0):
            later, _ = shifted(batch, 1 + depth)
            deep = zoo.apply_mtp(
                config, params, hidden, later, segment_ids=inside, depth=depth, logits=False
            )
            hidden, routing = deep.hidden, jax.tree.map(lambda a: a[None], deep.routing)
            far, far_nll, far_weight = cross_entropy(hidden, 2 + depth, batch.get("mtp"))
            # eq. 25: the mean over depths; each is divided by the tokens of the main loss.
            total += mtp / config.num_nextn_predict_layers * far
            metrics[f"mtp{depth}"] = Mean(far_nll, far_weight)
            routings.append(routing)
            counts = _counts(config, routing)
            load["mtp"] = jnp.concatenate([load["mtp"], counts]) if "mtp" in load else counts
        if routings:
            # Each row counts as much as it has tokens to learn, so that micro-batches add up.
            share = shifted(batch, 1)[1].sum(axis=-1)
            even = jax.tree.map(
                lambda *parts: sum(parts) @ share, *(balance_losses(config, r) for r in routings)
            )
            metrics |= {"balance": even["expert"], "load": load}
            for name, value in even.items():
                if alpha := getattr(weigh, name):
                    total += alpha * value
                    if name != "expert":
                        metrics[name] = value
        return Output(total, weight, metrics)

    return loss


def _counts(config: Config, routing: Routing) -> jax.Array:
    return jax.vmap(lambda i: expert_counts(i, config.n_routed_experts))(routing.indices)


def shifted(batch: dict[str, jax.Array], ahead: int) -> tuple[jax.Array, jax.Array]:
    """The token `ahead` places to the right of each of the first T, and its weight as a target.

    Batch arrays [B, T + 1] -> int32 [B, T], float32 [B, T]; the weight is 0 in another document
    and beyond the row's end.
    """
    beyond = ((0, 0), (0, ahead - 1))
    target, weight = (jnp.pad(batch[k][:, ahead:], beyond) for k in ("tokens", "weights"))
    segment = jnp.pad(batch["segments"][:, ahead:], beyond, constant_values=-2)
    return target, weight * (segment == batch["segments"][:, :-1])


def balance_losses(config: Config, routing: Routing) -> dict[str, jax.Array]:
    """V2 eq. 23-31 without their weights (V3 eq. 17-20 is the first), float32 [B] each.

    With f_i the share of the choices that went to expert i times the number of experts, and P_i its
    mean affinity, normalised: "expert" is the sum of f_i P_i; "device" the sum over groups of mean
    f_i times sum P_i; "communication" the sum over groups of the share of tokens that reached the
    group, times groups / groups a token may reach, times sum P_i. Summed over layers.

    Args:
        config: the model; devices are its router's groups (one, if it has none).
        routing: of the expert layers, [L, B, T, ...]; rows are the papers' sequences.
    """
    experts, groups = config.n_routed_experts, config.n_group or 1
    reach = config.topk_group or 1
    hit = jax.nn.one_hot(routing.indices, experts).sum(axis=3)  # [L, B, T, E]
    scores = routing.scores / routing.scores.sum(axis=-1, keepdims=True)
    f = hit.mean(axis=2) * experts / config.num_experts_per_tok
    p = scores.mean(axis=2)

    def grouped(a: jax.Array) -> jax.Array:
        return a.reshape(*a.shape[:-1], groups, experts // groups)

    p_group = grouped(p).sum(axis=-1)
    sent = (grouped(hit).sum(axis=-1) > 0).mean(axis=2)
    losses = {
        "expert": (f * p).sum(axis=-1),
        "device": (grouped(f).mean(axis=-1) * p_group).sum(axis=-1),
        "communication": (sent * groups / reach * p_group).sum(axis=-1),
    }
    return {name: value.sum(axis=0) for name, value in losses.items()}
