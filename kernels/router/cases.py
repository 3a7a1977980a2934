"""Gate and choice of experts at the shapes of V2-Lite, V2, V3 and a small model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepzoo.kernels.cases import Case
from deepzoo.kernels.router import gate, reference, router


def _case(name: str, m: int, d: int, experts: int, *, biased: bool = False, **options: Any) -> Case:
    def inputs(seed: int) -> tuple[Any, ...]:
        a, b, c = jax.random.split(jax.random.key(seed), 3)
        x = jax.random.normal(a, (m, d), jnp.bfloat16)
        weight = jax.random.normal(b, (experts, d), jnp.bfloat16) * jnp.bfloat16(d**-0.5)
        bias = (jax.random.normal(c, (experts,), jnp.float32) * 0.01,) if biased else ()
        return x, weight, *bias

    def bind(form: str) -> Callable[..., Any]:
        del form

        def run(x, weight, bias=None):
            return router(gate(x, weight), bias, **options)

        return run

    rows = np.unique(np.linspace(0, m - 1, min(m, 128)).astype(int))

    def expected(x, weight, bias=None):
        logits = np.asarray(x)[rows].astype(np.float64) @ np.asarray(weight).astype(np.float64).T
        return np.sort(reference.router(logits, bias, **options)[1], axis=1)

    return Case(
        "router", f"{name}, {m} tokens, {experts} experts", ("xla",), bind, inputs,
        2.0 * m * d * experts, 2.0 * (m + experts) * d + 4.0 * m * experts, expected,
        # Sorted weights: experts whose scores nearly tie may trade places.
        lambda out: jnp.sort(out.weights[rows], axis=1),
    )  # fmt: skip


_V3: dict[str, Any] = {
    "k": 8, "scoring": "sigmoid", "groups": 8, "top_groups": 4, "group_score": "top2",
    "normalise": True, "scale": 2.5,
}  # fmt: skip

CASES: tuple[Case, ...] = (
    _case("V2-Lite", 4096, 2048, 64, k=6, scoring="softmax"),
    _case("V2", 4096, 5120, 160, k=6, scoring="softmax", groups=8, top_groups=3, scale=16.0),
    _case("V3", 4096, 7168, 256, biased=True, **_V3),
    _case("V3 decode", 128, 7168, 256, biased=True, **_V3),
    _case("nano", 100, 96, 8, k=2, scoring="softmax", groups=4, top_groups=2),
)
