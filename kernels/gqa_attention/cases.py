"""Grouped-query prefill attention at the shapes of the students: Qwen 7B and 1.5B, Llama 8B."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepzoo.kernels.cases import Case
from deepzoo.kernels.gqa_attention import gqa_attention, reference

_ROWS = 6  # queries compared with float64, of one head of keys


def _case(
    name: str, tokens: int, heads: int, groups: int, size: int, *, documents: int = 1,
    backward: bool = False,
) -> Case:  # fmt: skip
    scale, share = size**-0.5, heads // groups
    rows = np.unique(np.linspace(0, tokens - 1, _ROWS).astype(int))

    def inputs(seed: int) -> tuple[Any, ...]:
        *some, last = jax.random.split(jax.random.key(seed), 5)
        counts = (heads, groups, groups, heads)[: 3 + backward]
        arrays = tuple(
            jax.random.normal(k, (1, tokens, n, size), jnp.bfloat16)
            for k, n in zip(some, counts, strict=False)
        )
        if documents == 1:
            return arrays
        ends = jax.random.randint(last, (1, documents - 1), 1, tokens)
        marks = (jnp.arange(tokens)[None, :, None] >= ends[:, None]).sum(axis=-1, dtype=jnp.int32)
        return *arrays, marks

    def bind(form: str) -> Callable[..., Any]:
        def attend(q, k, v, *marks):
            segments = marks[0] if marks else None
            return gqa_attention(q, k, v, scale=scale, segments=segments, implementation=form)  # pyright: ignore[reportArgumentType]

        def gradients(q, k, v, d_out, *marks):
            return jax.vjp(lambda *a: attend(*a, *marks), q, k, v)[1](d_out)

        return gradients if backward else attend

    def expected(q, k, v, *marks):
        found = []
        for row in rows:
            # One query over the keys before it, as the last of a sequence.
            seen = np.arange(tokens) <= row
            if marks:
                seen &= marks[0][0] == marks[0][0, row]
            seen = np.flatnonzero(seen)
            last = np.zeros((1, len(seen), share, size))
            last[:, -1] = q[:, row, :share]
            out = reference.gqa_attention(last, k[:, seen, :1], v[:, seen, :1], scale=scale)
            found.append(out[:, -1:])
        return np.concatenate(found, axis=1)

    pairs = tokens * (tokens + 1) / 2 * 2 / (documents + 1)
    products = 7 if backward else 2  # two forward; five backward, which differentiating runs after
    moved = 2 * tokens * size * (2 * heads + 2 * groups) * (3 if backward else 1)
    forms = ("triton", "xla") if documents > 1 else ("cudnn", "triton", "xla")
    what = "forward and backward" if backward else "forward"
    return Case(
        "gqa_attention", f"{name}, {what}", forms, bind, inputs,
        2.0 * heads * pairs * size * products, float(moved), None if backward else expected,
        (lambda d: d) if backward else lambda out: out[:, rows][:, :, :share],
    )  # fmt: skip


_QWEN = "Qwen 7B, 28 heads on 4, 128 wide"
CASES: tuple[Case, ...] = (
    _case(f"{_QWEN}, 4096 tokens", 4096, 28, 4, 128),
    _case(f"{_QWEN}, 4096 tokens", 4096, 28, 4, 128, backward=True),
    _case(f"{_QWEN}, 4096 tokens of 8 documents", 4096, 28, 4, 128, documents=8),
    _case(f"{_QWEN}, 4096 tokens of 8 documents", 4096, 28, 4, 128, documents=8, backward=True),
    _case("Llama 8B, 32 heads on 8, 128 wide, 4096 tokens", 4096, 32, 8, 128),
)
