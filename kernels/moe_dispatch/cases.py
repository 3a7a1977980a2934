"""Dispatch and combine at the shapes of V2-Lite, V3/R1 and nano.

M tokens  K chosen  E experts  D width
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepzoo.kernels.cases import Case
from deepzoo.kernels.moe_dispatch import Plan, combine, dispatch, plan, reference


def _indices(key: jax.Array, m: int, k: int, e: int) -> jax.Array:
    return jax.lax.top_k(jax.random.uniform(key, (m, e)), k)[1]


def _normal(key: jax.Array, *shape: int) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16)


def _cases(name: str, m: int, k: int, e: int, d: int) -> tuple[Case, ...]:
    some = np.unique(np.linspace(0, m * k - 1, min(m * k, 64)).astype(int))  # sorted rows compared
    tokens = np.unique(np.linspace(0, m - 1, min(m, 64)).astype(int))

    def bind(run: Callable[..., Any]) -> Callable[[str], Callable[..., Any]]:
        return lambda form: run  # one form

    def pairs(order: np.ndarray) -> list[np.ndarray]:
        """The sorted rows of each compared token."""
        return [np.flatnonzero(np.asarray(order) // k == t) for t in tokens]

    def planned(seed: int) -> Plan:
        return plan(_indices(jax.random.key(seed), m, k, e), e)

    def rows(seed: int) -> tuple[Any, ...]:
        return _normal(jax.random.key(seed + 1), m, d), planned(seed)

    def outputs_of_experts(seed: int) -> tuple[Any, ...]:
        a, b = jax.random.split(jax.random.key(seed + 1))
        return _normal(a, m * k, d), jax.random.uniform(b, (m, k)), planned(seed)

    def with_gradient(seed: int) -> tuple[Any, ...]:
        return *outputs_of_experts(seed), _normal(jax.random.key(seed + 2), m, d)

    def backward(y, weights, plan, g):
        return jax.vjp(lambda y, weights: combine(y, weights, plan), y, weights)[1](g)

    def to_tokens(g, plan):
        x = jnp.zeros((m, d), g.dtype)  # its values are in no gradient to it
        return jax.vjp(lambda x: dispatch(x, plan), x)[1](g)[0]

    def summed(y, plan):
        return np.stack([np.asarray(y)[r].astype(float).sum(axis=0) for r in pairs(plan.order)])

    def weighed(y, weights, plan):
        flat = np.asarray(weights, float).reshape(-1)[np.asarray(plan.order)]
        y = np.asarray(y)
        return np.stack([flat[r] @ y[r].astype(float) for r in pairs(plan.order)])

    def to_rows(y, weights, plan, g):
        order = np.asarray(plan.order)[some]
        flat = np.asarray(weights, float).reshape(-1)[order]
        return flat[:, None] * np.asarray(g)[order // k].astype(float)

    shape = f"{m} tokens, {k} of {e} experts, {d} wide"
    wide, narrow, index = 2.0 * m * k * d, 2.0 * m * d, 4.0 * m * k
    temp = 2**20 + 16 * index  # integers and sums of rows, no rows
    return (
        Case(
            "moe_dispatch", f"{name}, plan, {shape}", ("xla",),
            bind(lambda i: plan(i, e)),
            lambda seed: (_indices(jax.random.key(seed), m, k, e),),
            0.0, 3 * index + 4 * e, lambda i: np.concatenate(reference.plan(i, e)),
            lambda out: np.concatenate([np.asarray(a) for a in out]), temp=temp,
        ),
        Case(
            "moe_dispatch", f"{name}, dispatch, {shape}", ("xla",), bind(dispatch), rows, 0.0,
            wide + narrow + index,
            lambda x, p: np.asarray(x)[np.asarray(p.order)[some] // k].astype(float),
            lambda out: out[some], temp=temp,
        ),
        Case(
            "moe_dispatch", f"{name}, dispatch backward, {shape}", ("xla",), bind(to_tokens),
            lambda seed: (_normal(jax.random.key(seed + 1), m * k, d), planned(seed)),
            1.0 * m * k * d, wide + narrow + index, summed, lambda out: out[tokens],
            temp=temp,
        ),
        Case(
            "moe_dispatch", f"{name}, combine, {shape}", ("xla",), bind(combine),
            outputs_of_experts, 2.0 * m * k * d, wide + narrow + 2 * index, weighed,
            lambda out: out[tokens], temp=temp,
        ),
        Case(
            "moe_dispatch", f"{name}, combine backward, {shape}", ("xla",), bind(backward),
            with_gradient, 3.0 * m * k * d, 2 * wide + narrow + 3 * index, to_rows,
            lambda out: out[0][some], temp=temp,
        ),
    )  # fmt: skip


CASES: tuple[Case, ...] = (
    *_cases("V2-Lite", 4096, 6, 64, 2048),
    *_cases("V3", 4096, 8, 256, 7168),
    *_cases("V3 decode", 128, 8, 256, 7168),
    *_cases("nano", 512, 2, 8, 128),
)
