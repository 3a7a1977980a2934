"""Cases for the tests of `deepzoo bench kernels`: a right form, a wrong one, and broken ones."""

from collections.abc import Callable
from typing import Any

import aot_cases
import jax
import jax.numpy as jnp
import numpy as np

from deepzoo.kernels.cases import Case
from deepzoo.kernels.dispatch import Form, dispatch
from deepzoo.zoo.bench.timing import repeated


def _bind(form: str) -> Callable[..., Any]:
    def run(x: jax.Array, y: jax.Array) -> jax.Array:
        if form == "mosaic":
            return 2 * (x @ y)  # wrong
        if form == "tokamax":
            raise ZeroDivisionError("division by zero")
        forms = {name: Form(lambda x, y: x @ y, lambda: []) for name in ("triton", "xla")}
        return dispatch("product", form, forms, x, y)  # pyright: ignore[reportArgumentType]

    return run


def _inputs(dtype: Any) -> Callable[[int], tuple[Any, ...]]:
    def inputs(seed: int) -> tuple[Any, ...]:
        a, b = jax.random.split(jax.random.key(seed))
        return jax.random.normal(a, (64, 64), dtype), jax.random.normal(b, (64, 64), dtype)

    return inputs


def _reference(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) @ y.astype(np.float64)


def _too_large(seed: int) -> tuple[Any, ...]:
    raise MemoryError("too large")


def _looped(seed: int) -> tuple[Any, ...]:
    def normal(key: jax.Array, *shape: int) -> jax.Array:
        return jax.random.normal(key, shape, jnp.bfloat16)

    keys = jax.random.split(jax.random.key(seed), 3)
    return jnp.int32(5), [(normal(k, 64, 64), normal(k, 64, 64, 64)) for k in keys]


_ALL = ("xla", "triton", "mosaic", "tokamax")
CASES = (
    Case("product", "product", _ALL, _bind, _inputs(jnp.float32), 790e9, 43.0, _reference),
    Case("product", "no reference", ("xla",), _bind, _inputs(jnp.bfloat16), 790e9, 43.0),
    Case("product", "no inputs", ("xla",), _bind, _too_large, 790e9, 43.0),
    Case("product", "loop of 3", ("triton",), lambda form: repeated(aot_cases.product_of_group),
         _looped, 1.0, 1.0),
)  # fmt: skip
