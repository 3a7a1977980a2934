"""Losses and gradients of one step against TRL's (tests/golden/trl/make.py): same tiny model, same
batch, same settings."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden import GOLDEN, golden

from deepzoo.recipes.dpo import preference
from deepzoo.recipes.parts.logprobs import score
from deepzoo.recipes.parts.losses import next_token
from deepzoo.recipes.parts.policy import Objective, policy_loss

# TRL's CISPO cuts the ratio at epsilon_high, ours at 1 + clip_high; make.py has the other side.
CASES = {
    "grpo": Objective(beta=0.04),
    "r1": Objective(clip_low=10.0, clip_high=10.0, beta=0.001),
    "dr_grpo": Objective(norm="constant"),
    "dapo": Objective(clip_high=0.28, norm="token"),
    "gspo": Objective(level="sequence", clip_low=3e-4, clip_high=4e-4),
    "cispo": Objective(form="cispo", clip_low=1.0, clip_high=0.2, norm="token"),
    "dual": Objective(dual_clip=1.3),
    "unbiased": Objective(kl="unbiased", beta=0.3),
    "truncated": Objective(correction="truncate", cap=1.2),
    "off_policy": Objective(off_policy=0.05),
    "entropy": Objective(norm="token", entropy=0.1),
}


@functools.cache
def expected():
    with np.load(GOLDEN / "trl" / "expected.npz") as file:
        return dict(file)


@functools.cache
def forward():
    """Log-probabilities and entropies of the answers [N, T], and the norm of their pullback."""
    config, params, _ = golden("v2_lite_like")
    tokens = jnp.asarray(expected()["tokens"], jnp.int32)
    width = expected()["mask"].shape[1]

    def scored(params):
        found = score(config, params, tokens)
        return found.logprobs[:, -width:], found.entropy[:, -width:]

    @jax.jit
    def norm(params, *gradients):
        return optax.tree.norm(jax.vjp(scored, params)[1](gradients)[0])

    return *jax.jit(scored)(params), functools.partial(norm, params)


def compare(name, loss, norm):
    assert float(loss) == pytest.approx(float(expected()[f"{name}/loss"]), rel=1e-5, abs=2e-5)
    assert float(norm) == pytest.approx(float(expected()[f"{name}/norm"]), rel=1e-4)


def compare_step(name, loss, batch):
    """Of a recipe's loss over whole parameters."""
    _, params, _ = golden("v2_lite_like")

    def mean(params):
        out = loss(params, batch, jax.random.key(0))
        return out.loss / out.weight

    value, gradient = jax.jit(jax.value_and_grad(mean))(params)
    compare(name, value, optax.tree.norm(gradient))


@pytest.mark.parametrize("name", CASES)
def test_a_step_of_grpo(name):
    o, there = CASES[name], expected()

    logprobs, entropy, pullback = forward()

    def loss(logprobs, entropy):
        out = policy_loss(
            o, logprobs, entropy, there["old"], there["advantages"], there["mask"] * 1.0,
            longest=there["mask"].shape[1], reference=there["reference"] if o.beta else None,
            rollout=there["rollout"] if o.correction != "none" else None,
        )  # fmt: skip
        return out.loss / out.weight

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(logprobs, entropy)
    compare(name, value, pullback(*gradients))


def test_every_case_is_another_number():
    losses = [float(expected()[f"{name}/loss"]) for name in CASES]
    assert min(abs(a - b) for i, a in enumerate(losses) for b in losses[:i]) > 1e-3
    assert json.loads(str(expected()["versions"]))["trl"] == "1.16.0"


def whole_mask():
    there = expected()
    prompt = there["tokens"].shape[1] - there["mask"].shape[1]
    return np.pad(there["mask"], ((0, 0), (prompt, 0))).astype(np.float32)


def test_a_step_of_preference_learning():
    there, mask = expected(), whole_mask()

    def pairs(rows):  # the first half of the rows is chosen
        return np.stack(np.split(rows, 2), axis=1)

    batch = {
        "tokens": pairs(there["tokens"].astype(np.int32)),
        "mask": pairs(mask[:, 1:]),
        "reference": pairs((there["reference"] * there["mask"]).sum(axis=1)),
    }
    compare_step("dpo", preference(golden("v2_lite_like")[0], beta=0.1), batch)


def test_a_step_of_fine_tuning():
    tokens = expected()["tokens"].astype(np.int32)
    batch = {"tokens": tokens, "segments": np.zeros_like(tokens), "weights": whole_mask()}
    compare_step("sft", next_token(golden("v2_lite_like")[0]), batch)
