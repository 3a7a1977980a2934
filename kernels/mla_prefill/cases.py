"""Latent prefill attention at the shapes of V2-Lite, V2, V3 and the nano models.

V2-Lite has 16 heads, V2, V3 and R1 have 128, all of them 128 + 64 wide with values of 128.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepzoo.kernels.cases import Case
from deepzoo.kernels.mla_prefill import mla_prefill, reference
from deepzoo.kernels.mla_prefill.api import backward

_FULL = (128, 64, 128)
_NANO = (32, 16, 32)
_ALL = ("mosaic", "triton", "xla")
_ROWS = 6  # queries compared with float64, spread evenly, of two heads


def _inputs(batch: int, queries: int, keys: int, heads: int, widths, documents: int):
    """Seed -> q_nope, q_rope, k_nope, k_rope, v and, of packed documents, twice the segments."""
    nope, rope, value = widths

    def inputs(seed: int) -> tuple[Any, ...]:
        shapes = [(batch, queries, heads, nope), (batch, queries, heads, rope)]
        shapes += [(batch, keys, heads, nope), (batch, keys, rope), (batch, keys, heads, value)]
        *some, last = jax.random.split(jax.random.key(seed), 6)
        arrays = tuple(
            jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(some, shapes, strict=True)
        )
        if documents == 1:
            return arrays
        ends = jax.random.randint(last, (batch, documents - 1), 1, keys)
        marks = (jnp.arange(keys)[None, :, None] >= ends[:, None]).sum(axis=-1, dtype=jnp.int32)
        return *arrays, marks, marks

    return inputs


def _pairs(queries: int, keys: int, documents: int) -> float:
    """Query-key pairs that are seen; of packed documents of random length, on average."""
    offset = keys - queries
    whole = float((np.arange(queries) + offset + 1).sum())
    # Cut at d - 1 random places, the mean of the documents' squared lengths is 2/(d + 1) of all.
    return whole * 2 / (documents + 1)


def _segments(rest: tuple) -> dict[str, Any]:
    return dict(zip(("q_segments", "k_segments"), rest, strict=False))


def _forward(
    name: str, batch: int, queries: int, keys: int, heads: int, widths=_FULL, documents: int = 1,
    forms=_ALL, **more: Any,
) -> Case:  # fmt: skip
    nope, rope, value = widths
    scale, offset = (nope + rope) ** -0.5, keys - queries
    rows = np.unique(np.linspace(0, queries - 1, min(queries, _ROWS)).astype(int))
    some_heads = slice(0, heads, max(1, heads // 2))

    def bind(form: str) -> Callable[..., Any]:
        return lambda *a: mla_prefill(
            *a[:5], scale=scale, q_offset=offset, implementation=form, **_segments(a[5:])  # pyright: ignore[reportArgumentType]
        )  # fmt: skip

    def expected(q_nope, q_rope, k_nope, k_rope, v, *marks):
        found = []
        for row in rows:
            end = row + offset + 1
            options = {} if not marks else {
                "q_segments": marks[0][:, row : row + 1], "k_segments": marks[1][:, :end]
            }  # fmt: skip
            found.append(
                reference.mla_prefill(
                    q_nope[:, row : row + 1, some_heads], q_rope[:, row : row + 1, some_heads],
                    k_nope[:, :end, some_heads], k_rope[:, :end], v[:, :end, some_heads],
                    scale=scale, q_offset=int(row) + offset, **options,
                )
            )  # fmt: skip
        return tuple(np.concatenate(part, axis=1) for part in zip(*found, strict=True))

    pairs = _pairs(queries, keys, documents)
    moved = 2 * batch * heads * (queries * (nope + rope + value) + keys * (nope + value))
    return Case(
        "mla_prefill", f"{name}, forward", forms, bind,
        _inputs(batch, queries, keys, heads, widths, documents),
        2 * batch * heads * pairs * (nope + rope + value),
        moved + 2 * batch * keys * rope + 4 * batch * queries * heads, expected,
        lambda result: tuple(part[:, rows][:, :, some_heads] for part in result), **more,
    )  # fmt: skip


def _backward(
    name: str, batch: int, tokens: int, heads: int, widths=_FULL, documents: int = 1, forms=_ALL,
    **more: Any,
) -> Case:  # fmt: skip
    nope, rope, value = widths
    scale = (nope + rope) ** -0.5
    primal = _inputs(batch, tokens, tokens, heads, widths, documents)

    def inputs(seed: int) -> tuple[Any, ...]:
        arrays = primal(seed)
        results = mla_prefill(*arrays[:5], scale=scale, **_segments(arrays[5:]))
        keys = jax.random.split(jax.random.key(seed + 1), 2)
        gradients = [
            jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, results, strict=True)
        ]
        return *arrays, *results, *gradients

    def bind(form: str) -> Callable[..., Any]:
        def run(*a):
            marks = a[5:-4] or (None, None)
            return backward(*a[:5], *marks, *a[-4:], scale=scale, implementation=form)  # pyright: ignore[reportArgumentType]

        return run

    pairs = _pairs(tokens, tokens, documents)
    moved = 2 * batch * tokens * heads * (3 * (nope + rope) + nope + 4 * value)
    return Case(
        "mla_prefill", f"{name}, backward", forms, bind, inputs,
        2 * batch * heads * pairs * (3 * (nope + rope) + 2 * value),
        moved + 4 * batch * tokens * rope + 8 * batch * tokens * heads, **more,
    )  # fmt: skip


_LITE = "V2-Lite, 8192 tokens, 16 heads"
CASES: tuple[Case, ...] = (
    _forward(_LITE, 1, 8192, 8192, 16, reach=573e-6, least=860e-6),
    _backward(_LITE, 1, 8192, 16, reach=2.1e-3, least=3.0e-3),
    _forward("V2-Lite, 8192 tokens of 8 documents, 16 heads", 1, 8192, 8192, 16, documents=8),
    _backward("V2-Lite, 8192 tokens of 8 documents, 16 heads", 1, 8192, 16, documents=8),
    _forward("V2-Lite, 1000 tokens after 7192, 16 heads", 1, 1000, 8192, 16),
    _forward("V2 and V3, 4096 tokens, 128 heads", 1, 4096, 4096, 128),
    _backward("V2 and V3, 4096 tokens, 128 heads", 1, 4096, 128),
    _forward("nano, batch 4, 512 tokens, 4 heads", 4, 512, 512, 4, _NANO, forms=_ALL[1:]),
    _backward("nano, batch 4, 512 tokens, 4 heads", 4, 512, 4, _NANO, forms=_ALL[1:]),
)
