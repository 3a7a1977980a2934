"""Block FP8 at the shapes of V3's layers, those that published FP8 kernels are timed at, and
V2-Lite's and a small model's.

The dense list (N, K) at 64, 128 and 4096 rows: kv_a's and q_a's projections together, q_b, kv_b, o,
a dense or shared gate and up, and its down projection.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepzoo.kernels.block_fp8 import grouped_matmul_fp8, matmul, matmul_fp8, reference
from deepzoo.kernels.block_fp8.xla import BLOCK
from deepzoo.kernels.cases import Case

_ROWS = 64  # of the result, that are compared with float64, spread evenly
_COLUMNS = 256


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def _values(key: jax.Array, *shape: int) -> jax.Array:
    """float8 values of all magnitudes up to 1.9, made from random bits: no wide copy of a weight
    that fills a GPU."""
    bits = jax.random.bits(key, shape, jnp.uint8) & jnp.uint8(0b10111111)
    return jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn)


def _scales(key: jax.Array, *shape: int) -> jax.Array:
    return jax.random.uniform(key, shape, jnp.float32, 0.01, 0.03)


def _sample(size: int, count: int) -> np.ndarray:
    return np.unique(np.linspace(0, size - 1, min(size, count)).astype(int))


def _dense(m: int, n: int, k: int, name: str, **more: Any) -> Case:
    def inputs(seed: int) -> tuple[Any, ...]:
        a, b, c, d = jax.random.split(jax.random.key(seed), 4)
        return (
            _values(a, m, k), _scales(b, m, _blocks(k)),
            _values(c, n, k), _scales(d, _blocks(n), _blocks(k)),
        )  # fmt: skip

    rows, columns = _sample(m, _ROWS), _sample(n, _COLUMNS)

    def expected(x, x_scale, w, w_scale):
        left = reference.dequantize_activations(x[rows], x_scale[rows])
        right = np.asarray(w)[columns].astype(np.float64)
        right *= np.repeat(np.asarray(w_scale, np.float64)[columns // BLOCK], BLOCK, 1)[:, :k]
        return left @ right.T

    def bind(form: str) -> Callable[..., Any]:
        return lambda *arrays: matmul_fp8(*arrays, implementation=form)  # pyright: ignore[reportArgumentType]

    return Case(
        "block_fp8", f"{name}, {m} rows, {k} to {n}, FP8 x FP8", ("mosaic", "triton", "xla"),
        bind, inputs, 2.0 * m * n * k, m * k + n * k + 2.0 * m * n, expected,
        lambda out: out[rows][:, columns], fp8=True, **more,
    )  # fmt: skip


def _keep(m: int, n: int, k: int, name: str) -> Case:
    def inputs(seed: int) -> tuple[Any, ...]:
        a, b, c = jax.random.split(jax.random.key(seed), 3)
        x = jax.random.normal(a, (m, k), jnp.bfloat16)
        return x, _values(b, n, k), _scales(c, _blocks(n), _blocks(k))

    rows, columns = _sample(m, _ROWS), _sample(n, _COLUMNS)

    def expected(x, w, w_scale):
        right = np.asarray(w)[columns].astype(np.float64)
        right *= np.repeat(np.asarray(w_scale, np.float64)[columns // BLOCK], BLOCK, 1)[:, :k]
        return np.asarray(x)[rows].astype(np.float64) @ right.T

    def bind(form: str) -> Callable[..., Any]:
        return lambda *arrays: matmul(*arrays, implementation=form)  # pyright: ignore[reportArgumentType]

    return Case(
        "block_fp8", f"{name}, {m} rows, {k} to {n}, bf16 x FP8", ("triton", "xla"), bind, inputs,
        2.0 * m * n * k, 2.0 * m * k + n * k + 2.0 * m * n, expected,
        lambda out: out[rows][:, columns],
    )  # fmt: skip


def _grouped(m: int, n: int, k: int, experts: int, name: str) -> Case:
    def inputs(seed: int) -> tuple[Any, ...]:
        a, b, c, d, e = jax.random.split(jax.random.key(seed), 5)
        # Uneven groups: every row to a random expert, some of them twice as likely as others.
        likely = jnp.arange(experts) % 3
        chosen = jax.random.categorical(e, jnp.log1p(likely.astype(jnp.float32)), shape=(m,))
        sizes = (chosen[:, None] == jnp.arange(experts)).sum(axis=0, dtype=jnp.int32)
        w = jax.vmap(lambda key: _values(key, n, k))(jax.random.split(c, experts))
        return (
            _values(a, m, k), _scales(b, m, _blocks(k)),
            w, _scales(d, experts, _blocks(n), _blocks(k)), sizes,
        )  # fmt: skip

    rows, columns = _sample(m, _ROWS), _sample(n, _COLUMNS)

    def expected(x, x_scale, w, w_scale, sizes):
        group = np.searchsorted(np.cumsum(sizes), rows, side="right")
        out = np.zeros((len(rows), len(columns)))
        for i, (row, g) in enumerate(zip(rows, group, strict=True)):
            if g < experts:
                right = np.asarray(w[g])[columns].astype(np.float64)
                of = np.asarray(w_scale[g], np.float64)[columns // BLOCK]
                right *= np.repeat(of, BLOCK, 1)[:, :k]
                left = reference.dequantize_activations(x[row : row + 1], x_scale[row : row + 1])
                out[i] = (left @ right.T)[0]
        return out

    def bind(form: str) -> Callable[..., Any]:
        return lambda *arrays: grouped_matmul_fp8(*arrays, implementation=form)  # pyright: ignore[reportArgumentType]

    hit = min(experts, m)
    return Case(
        "block_fp8", f"{name}, {m} rows, {k} to {n}, {experts} groups, FP8 x FP8",
        ("mosaic", "xla"), bind, inputs, 2.0 * m * n * k,
        m * k + float(hit) * n * k + 2.0 * m * n, expected,
        lambda out: out[rows][:, columns], fp8=True,
    )  # fmt: skip


_V3 = (
    (2112, 7168, "V3 q_a and kv_a"),
    (24576, 1536, "V3 q_b"),
    (32768, 512, "V3 kv_b"),
    (7168, 16384, "V3 o"),
    (4096, 7168, "V3 shared gate and up"),
    (7168, 2048, "V3 shared down"),
)

CASES: tuple[Case, ...] = (
    *(
        _dense(
            m, n, k, name, **({"reach": 800e-6, "least": 1.2e-3} if (m, k) == (4096, 16384) else {})
        )
        for m in (64, 128, 4096)
        for n, k, name in _V3
    ),
    _dense(64, 576, 7168, "V3 kv_a alone"),
    _dense(1000, 192, 256, "nano"),
    _keep(64, 7168, 16384, "V3 o"),
    _keep(4096, 7168, 16384, "V3 o"),
    _keep(128, 576, 7168, "V3 kv_a alone"),
    _keep(256, 200, 96, "nano"),
    _grouped(32768, 4096, 7168, 256, "V3 experts' gate and up"),
    _grouped(32768, 7168, 2048, 256, "V3 experts' down"),
    _grouped(1024, 4096, 7168, 256, "V3 experts' gate and up, decode"),
    _grouped(1024, 7168, 2048, 256, "V3 experts' down, decode"),
    _grouped(24576, 2816, 2048, 64, "V2-Lite experts' gate and up"),
)
