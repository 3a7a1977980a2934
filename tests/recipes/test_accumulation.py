"""Micro-batches of the recipes' own losses: as many as one likes, the same loss and gradient."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepzoo import zoo
from deepzoo.recipes import dpo, grpo, pretrain
from deepzoo.recipes.parts.losses import Balance, next_token
from deepzoo.recipes.parts.policy import Objective
from deepzoo.recipes.parts.step import Loss, start, train_step
from deepzoo.zoo.config import Config

ROWS, LENGTH, WORDS = 8, 12, 50
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": WORDS, "initializer_range": 0.1,
}  # fmt: skip
V3 = dataclasses.replace(
    pretrain.PRESETS["v3_nano"].config, **SMALL, q_lora_rank=16, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, moe_intermediate_size=16,
)  # fmt: skip
STUDENT = Config(
    model_type="qwen2", **SMALL | {"num_hidden_layers": 1}, max_position_embeddings=64,
    bos_token_id=1, eos_token_id=2, dtype="float32",
)  # fmt: skip

# The gradient as it is: the optimiser changes nothing and keeps it as its state.
KEEP = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradient, state, params=None: (jax.tree.map(jnp.zeros_like, gradient), gradient),
)


@functools.cache
def initial(config: Config) -> dict:
    return zoo.init(config, jax.random.key(1))


def lengths(rng: np.random.Generator, count: int, longest: int) -> np.ndarray:
    """Float32 [count, longest]: rows of 1, 2, ... up to all tokens that count, shuffled."""
    filled = rng.permutation(np.linspace(1, longest, count).astype(int))
    return (np.arange(longest) < filled[:, None]).astype(np.float32)


def packed(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Rows of two or three documents; some have few tokens to learn, one has none."""
    shape = (ROWS, LENGTH + 1)
    weights = lengths(rng, ROWS, LENGTH + 1)
    weights[5] = 0
    return {
        "tokens": rng.integers(3, WORDS, shape).astype(np.int32),
        "segments": np.sort(rng.integers(0, 3, shape), axis=1).astype(np.int32),
        "weights": weights,
        "mtp": np.linspace(1.0, 0.3, ROWS).astype(np.float32),
    }


def answers(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A rollout's answers of unequal length, one of them masked."""
    mask = lengths(rng, ROWS, LENGTH)
    mask[2] = 0
    shape = (ROWS, LENGTH)
    return {
        "tokens": rng.integers(3, WORDS, (ROWS, LENGTH + 1)).astype(np.int32),
        "mask": mask,
        "old": rng.normal(-4, 0.3, shape).astype(np.float32),
        "reference": rng.normal(-4, 0.3, shape).astype(np.float32),
        "advantages": rng.normal(size=ROWS).astype(np.float32),
    }


def pairs(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "tokens": rng.integers(3, WORDS, (ROWS, 2, LENGTH)).astype(np.int32),
        "mask": lengths(rng, 2 * ROWS, LENGTH - 1).reshape(ROWS, 2, -1),
        "reference": rng.normal(-20, 3, (ROWS, 2)).astype(np.float32),
    }


def policy(**objective: Any) -> Loss:
    chosen = Objective(beta=0.1, entropy=0.01, clip_high=0.3, **objective)
    recipe = dataclasses.replace(grpo.PRESETS["nano"], max_tokens=LENGTH, objective=chosen)
    return grpo.learning(recipe, STUDENT)


BALANCE = Balance(expert=0.3, device=0.2, communication=0.1)
CASES = {
    "next token": (
        V3, packed, lambda: next_token(V3, balance=BALANCE, mtp=0.3, z_loss=0.01), "balance",
    ),
    "policy, sequence": (STUDENT, answers, lambda: policy(norm="sequence"), "entropy"),
    "policy, token": (STUDENT, answers, lambda: policy(norm="token"), "clipped"),
    "policy, constant": (STUDENT, answers, lambda: policy(norm="constant"), "kl"),
    "preference": (
        STUDENT, pairs, lambda: dpo.preference(STUDENT, beta=0.1, nll=0.2), "margin",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_four_micro_batches_are_one_batch(case: str):
    config, make, loss, metric = CASES[case]
    batch = make(np.random.default_rng(0))
    (one, whole), (four, parts) = (
        jax.jit(train_step(loss(), KEEP, accumulate, clip=1e9))(
            start(initial(config), KEEP, 0), batch
        )
        for accumulate in (1, 4)
    )
    norm = float(whole["norm"])
    assert norm > 0.05
    assert float(whole["weight"]) == float(parts["weight"]) > 1
    apart = jax.tree.map(lambda a, b: a - b, four.opt_state, one.opt_state)
    assert float(optax.tree.norm(apart)) < 1e-6 * norm
    # Gains and losses of a policy nearly cancel: their mean is no measure of its own error.
    total = float(whole["loss"])
    assert float(parts["loss"]) == pytest.approx(total, rel=1e-6, abs=1e-6 * norm)
    assert metric in whole["sums"]
    for a, b in zip(*map(jax.tree.leaves, (whole["sums"], parts["sums"])), strict=True):
        np.testing.assert_allclose(b, a, rtol=3e-6, atol=1e-5)
