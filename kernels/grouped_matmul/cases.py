"""Grouped matmul at the shapes of V2-Lite, V2, V3/R1 and nano experts: training and decode steps.

Rows are spread over the experts unevenly, as routers do: one's share is up to twice another's. The
weight gradient of gate and up is made as one matrix of their joint width, in one call.
M rows  K input width  N output width  E groups
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepzoo.kernels.cases import Case
from deepzoo.kernels.grouped_matmul import grouped_matmul, grouped_swiglu, reference

_ROWS, _COLUMNS = 64, 256  # of a result that are compared with float64, spread evenly
_ALL = ("mosaic", "triton", "xla")
_BLOCK = 128


def _sizes(key: jax.Array, rows: int, groups: int) -> jax.Array:
    likely = jax.random.uniform(key, (groups,), minval=1.0, maxval=2.0)
    chosen = jax.random.categorical(jax.random.fold_in(key, 1), jnp.log(likely), shape=(rows,))
    return jnp.zeros((groups,), jnp.int32).at[chosen].add(1)


def _normal(key: jax.Array, *shape: int) -> jax.Array:
    """bfloat16; matrices of a third dimension are made one by one, without a wide copy of all."""
    if len(shape) == 2:
        return jax.random.normal(key, shape, jnp.bfloat16)
    make = jax.vmap(lambda k: jax.random.normal(k, shape[1:], jnp.bfloat16) * shape[2] ** -0.5)
    return make(jax.random.split(key, shape[0]))


def _fp8(key: jax.Array, *shape: int) -> jax.Array:
    bits = jax.random.bits(key, shape, jnp.uint8) & jnp.uint8(0b10111111)  # up to 1.9, no NaN
    return jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn)


def _scales(key: jax.Array, e: int, n: int, k: int) -> jax.Array:
    shape = (e, -(-n // _BLOCK), -(-k // _BLOCK))
    return jax.random.uniform(key, shape, jnp.float32, 0.5, 1.5) * k**-0.5


def _sample(size: int, count: int) -> np.ndarray:
    return np.unique(np.linspace(0, size - 1, min(size, count)).astype(int))


def _expected(x, matrices: list[Callable[[int], np.ndarray]], sizes, rows) -> list[np.ndarray]:
    """Sampled rows times sampled outputs of each matrix; `matrices` give a group's, in float64."""
    group = np.searchsorted(np.cumsum(sizes), rows, side="right")
    left = np.asarray(x)[rows].astype(np.float64)
    return [np.stack([left[i] @ of(g).T for i, g in enumerate(group)]) for of in matrices]


def _dense(w, columns, scale=None) -> Callable[[int], np.ndarray]:
    def of(group: int) -> np.ndarray:
        part = np.asarray(w[group])[columns].astype(np.float64)
        if scale is not None:
            by_row = np.asarray(scale[group], np.float64)[columns // _BLOCK]
            part *= np.repeat(by_row, _BLOCK, axis=1)[:, : part.shape[1]]
        return part

    return of


def _bytes(m: int, n: int, k: int, e: int, matrices: int, size: int) -> float:
    return 2.0 * m * (k + n) + float(min(e, m)) * matrices * n * k * size


def _gate_up(
    name: str, e: int, n: int, k: int, m: int, *, fp8: bool = False, forms=_ALL, **more: Any
) -> Case:
    """Both first products and silu, fused."""
    rows, columns = _sample(m, _ROWS), _sample(n, _COLUMNS)

    def inputs(seed: int) -> tuple[Any, ...]:
        a, b, c, d, f, g = jax.random.split(jax.random.key(seed), 6)
        make = _fp8 if fp8 else _normal
        weights = make(b, e, n, k), make(c, e, n, k)
        scales = (_scales(f, e, n, k), _scales(g, e, n, k)) if fp8 else (None, None)
        return _normal(a, m, k), *weights, _sizes(d, m, e), *scales

    def expected(x, gate, up, sizes, gate_scale=None, up_scale=None):
        of = [_dense(gate, columns, gate_scale), _dense(up, columns, up_scale)]
        g, u = _expected(x, of, sizes, rows)
        return g / (1 + np.exp(-g)) * u

    def bind(form: str) -> Callable[..., Any]:
        return lambda *arrays: grouped_swiglu(*arrays, implementation=form)  # pyright: ignore[reportArgumentType]

    kind = "FP8" if fp8 else "bf16"
    return Case(
        "grouped_matmul", f"{name}, gate and up, {m} rows, {k} to 2 x {n}, {e} groups, {kind}",
        forms, bind, inputs, 4.0 * m * n * k, _bytes(m, n, k, e, 2, 1 if fp8 else 2), expected,
        lambda out: out[rows][:, columns], temp=scratch(m, 2 * n, k), **more,
    )  # fmt: skip


def _down(
    name: str, e: int, n: int, k: int, m: int, *, fp8: bool = False, forms=_ALL, **more: Any
) -> Case:
    rows, columns = _sample(m, _ROWS), _sample(n, _COLUMNS)

    def inputs(seed: int) -> tuple[Any, ...]:
        a, b, c, d = jax.random.split(jax.random.key(seed), 4)
        w, scale = (_fp8(b, e, n, k), _scales(d, e, n, k)) if fp8 else (_normal(b, e, n, k), None)
        return _normal(a, m, k), w, _sizes(c, m, e), scale

    def expected(x, w, sizes, scale=None):
        return _expected(x, [_dense(w, columns, scale)], sizes, rows)[0]

    def bind(form: str) -> Callable[..., Any]:
        return lambda *arrays: grouped_matmul(*arrays, implementation=form)  # pyright: ignore[reportArgumentType]

    kind = "FP8" if fp8 else "bf16"
    return Case(
        "grouped_matmul", f"{name}, down, {m} rows, {k} to {n}, {e} groups, {kind}",
        forms, bind, inputs, 2.0 * m * n * k, _bytes(m, n, k, e, 1, 1 if fp8 else 2), expected,
        lambda out: out[rows][:, columns], temp=scratch(m, n, k), **more,
    )  # fmt: skip


def _to_rows(name: str, e: int, n: int, k: int, m: int, **more: Any) -> Case:
    """Gradient to the rows: [M, N] times the matrices as they lie."""
    rows, columns = _sample(m, _ROWS), _sample(k, _COLUMNS)

    def inputs(seed: int) -> tuple[Any, ...]:
        a, b, c = jax.random.split(jax.random.key(seed), 3)
        return _normal(a, m, n), _normal(b, e, n, k), _sizes(c, m, e)

    def expected(g, w, sizes):
        return _expected(g, [lambda i: np.asarray(w[i])[:, columns].T.astype(float)], sizes, rows)[
            0
        ]

    def bind(form: str) -> Callable[..., Any]:
        def run(g, w, sizes):
            x = jnp.zeros((m, k), g.dtype)  # its values are in no gradient to it
            return jax.vjp(lambda x: grouped_matmul(x, w, sizes, implementation=form), x)[1](g)[0]  # pyright: ignore[reportArgumentType]

        return run

    return Case(
        "grouped_matmul", f"{name}, gradient to rows, {m} rows, {n} to {k}, {e} groups, bf16",
        _ALL, bind, inputs, 2.0 * m * n * k, _bytes(m, n, k, e, 1, 2), expected,
        lambda out: out[rows][:, columns], temp=scratch(m, n, k), **more,
    )  # fmt: skip


def _to_matrices(name: str, e: int, n: int, k: int, m: int, **more: Any) -> Case:
    """Gradient to the matrices; one form for NVIDIA GPUs, under two names."""
    high, wide, some = _sample(n, _ROWS), _sample(k, _COLUMNS), _sample(e, 4)

    def inputs(seed: int) -> tuple[Any, ...]:
        a, b, c = jax.random.split(jax.random.key(seed), 3)
        return _normal(a, m, n), _normal(b, m, k), _sizes(c, m, e)

    def expected(g, x, sizes):
        g, x = np.asarray(g)[:, high], np.asarray(x)[:, wide]
        return reference.gradients(x, np.zeros((e, len(high), len(wide))), sizes, g)[1][some]

    def bind(form: str) -> Callable[..., Any]:
        def run(g, x, sizes):
            w = jnp.zeros((e, n, k), g.dtype)  # its values are in no gradient to it
            return jax.vjp(lambda w: grouped_matmul(x, w, sizes, implementation=form), w)[1](g)[0]  # pyright: ignore[reportArgumentType]

        return run

    return Case(
        "grouped_matmul", f"{name}, gradient to w, {m} rows, {n} x {k}, {e} groups, bf16",
        ("triton", "xla"), bind, inputs, 2.0 * m * n * k, 2.0 * (m * (n + k) + e * n * k), expected,
        lambda out: out[some][:, high][:, :, wide], temp=scratch(m, n, k, e), **more,
    )  # fmt: skip


def scratch(m: int, n: int, k: int, kept: int = 0) -> float:
    """Bytes that a form may take beside its arguments and results: a few times the rows, and sums
    of `kept` matrices in float32. A dense expansion would take the rows once for each group."""
    return 8.0 * m * (n + k) + 4.0 * kept * n * k + 64 * 2**20


_DECODE = ("triton", "mosaic", "xla")
_WITHOUT_MOSAIC = ("triton", "xla")  # widths below its tiles', or float8 beside silu

CASES: tuple[Case, ...] = (
    _gate_up("V2-Lite", 64, 1408, 2048, 24576, reach=590e-6, least=700e-6),
    _down("V2-Lite", 64, 2048, 1408, 24576),
    _to_rows("V2-Lite", 64, 2048, 1408, 24576),
    _to_matrices("V2-Lite", 64, 2 * 1408, 2048, 24576, reach=470e-6, least=565e-6),
    _gate_up("V2", 160, 1536, 5120, 24576),
    _down("V2", 160, 5120, 1536, 24576),
    _gate_up("V3", 256, 2048, 7168, 32768),
    _down("V3", 256, 7168, 2048, 32768),
    _to_rows("V3", 256, 7168, 2048, 32768),
    _to_matrices("V3", 256, 7168, 2048, 32768),
    _gate_up("V2-Lite decode, batch 128", 64, 1408, 2048, 768, forms=_DECODE),
    _down("V2-Lite decode, batch 128", 64, 2048, 1408, 768, forms=_DECODE),
    _gate_up("V3 decode, batch 128", 256, 2048, 7168, 1024, forms=_DECODE),
    _down("V3 decode, batch 128", 256, 7168, 2048, 1024, forms=_DECODE),
    # An eighth of V3's experts, as on each of eight GPUs.
    _gate_up("V3 on eight GPUs", 32, 2048, 7168, 4096, fp8=True, forms=_WITHOUT_MOSAIC),
    _down("V3 on eight GPUs", 32, 7168, 2048, 4096, fp8=True, forms=_DECODE),
    _gate_up("V3 on eight GPUs, decode", 32, 2048, 7168, 128, fp8=True, forms=_WITHOUT_MOSAIC),
    _down("V3 on eight GPUs, decode", 32, 7168, 2048, 128, fp8=True, forms=_WITHOUT_MOSAIC),
    _gate_up("nano", 8, 64, 128, 1024, forms=_WITHOUT_MOSAIC),
    _down("nano", 8, 128, 64, 1024, forms=_DECODE),
    _to_matrices("nano", 8, 128, 64, 1024),
    _gate_up("nano decode", 8, 64, 128, 16, forms=_WITHOUT_MOSAIC),
)
