"""Linear cross entropy, forward and backward, at the heads of V2-Lite, V3 and a small model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepzoo.kernels.cases import Case
from deepzoo.kernels.linear_cross_entropy import linear_cross_entropy

_ROWS = 32  # tokens that are compared with float64, spread evenly


def _both(x, w, targets, weights):
    """Loss, log-probabilities and both gradients."""

    def loss(x, w):
        return linear_cross_entropy(x, w, targets, weights, z_loss=1e-4)

    (value, logprob), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, w)
    return value, logprob, *gradients


def _case(name: str, m: int, d: int, v: int, **more: Any) -> Case:
    def inputs(seed: int) -> tuple[Any, ...]:
        a, b, c, e = jax.random.split(jax.random.key(seed), 4)
        x = jax.random.normal(a, (m, d), jnp.bfloat16)
        w = jax.random.normal(b, (v, d), jnp.bfloat16) * jnp.bfloat16(d**-0.5)
        weights = jax.random.bernoulli(e, 0.9, (m,)).astype(jnp.float32)
        return x, w, jax.random.randint(c, (m,), 0, v), weights

    rows = np.unique(np.linspace(0, m - 1, min(m, _ROWS)).astype(int))

    def expected(x, w, targets, weights):
        wide = np.asarray(w).astype(np.float64)
        logits = np.asarray(x)[rows].astype(np.float64) @ wide.T
        top = logits.max(axis=1, keepdims=True)
        lse = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
        mine, weight = np.arange(len(rows)), np.asarray(weights, np.float64)[rows]
        logprob = logits[mine, targets[rows]] - lse
        slope = np.exp(logits - lse[:, None]) * (weight * (1 + 2e-4 * lse))[:, None]
        slope[mine, targets[rows]] -= weight
        return logprob, slope @ wide

    def bind(form: str) -> Callable[..., Any]:
        del form
        return _both

    return Case(
        "linear_cross_entropy", f"{name}, {m} tokens, forward and backward, bf16", ("xla",), bind,
        inputs, 6.0 * m * d * v, 3.0 * 2 * (v * d + m * d), expected,
        lambda out: (out[1][rows], out[2][rows]), **more,
    )  # fmt: skip


CASES: tuple[Case, ...] = (
    _case("V2-Lite head", 4096, 2048, 102400, reach=8.0e-3, least=10.0e-3, temp=1e9),
    _case("V2 head", 4096, 5120, 102400),
    _case("V3 head", 4096, 7168, 129280),
    _case("nano head", 1000, 96, 512),
)
