"""Latent decode attention at the shapes of V2-Lite (16 heads), V2 and V3/R1 (128 heads) and nano.

Lengths fill the capacity where the name does not say "ragged", so that floors are those of the
table of figures; the ragged ones lie evenly between an empty row and a full one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepzoo.kernels.cases import Case
from deepzoo.kernels.mla_decode import mla_decode, reference

_COMPARED = 2  # rows of the batch that are compared with float64


def _lengths(batch: int, queries: int, capacity: int, ragged: bool) -> np.ndarray:
    """int32 [B, T]; later queries of a row see the earlier ones, as in speculative decoding."""
    last = np.full(batch, capacity)
    if ragged:
        last = np.linspace(queries, capacity, batch).astype(int)
        last = last[np.random.default_rng(0).permutation(batch)]
    return (last[:, None] - np.arange(queries)[::-1]).astype(np.int32)


def _case(
    name: str,
    batch: int,
    capacity: int,
    heads: int,
    *,
    queries: int = 1,
    paged: bool = False,
    fp8: bool = False,
    ragged: bool = False,
    latent: int = 512,
    rope: int = 64,
    dtype: Any = jnp.bfloat16,
    **more: Any,
) -> Case:
    page = 64
    count = capacity // page
    lead = (batch * count, page) if paged else (batch, capacity)
    scale = float((latent + rope) ** -0.5)
    lengths = _lengths(batch, queries, capacity, ragged)

    def inputs(seed: int) -> tuple[Any, ...]:
        a, b, c, d, e, f = jax.random.split(jax.random.key(seed), 6)
        q_latent = jax.random.normal(a, (batch, queries, heads, latent), dtype)
        q_rope = jax.random.normal(b, (batch, queries, heads, rope), dtype)
        k_rope = jax.random.normal(d, (*lead, rope), dtype)
        pages = jax.random.permutation(e, batch * count).reshape(batch, count) if paged else None
        if fp8:  # all bits but the two NaNs
            bits = jax.random.bits(c, (*lead, latent), jnp.uint8) & jnp.uint8(0b10111111)
            held = jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn)
            factors = jax.random.uniform(f, lead, jnp.float32, 0.5, 2.0)
        else:
            held, factors = jax.random.normal(c, (*lead, latent), dtype), None
        return q_latent, q_rope, held, k_rope, jnp.asarray(lengths), pages, factors

    def bind(form: str) -> Callable[..., Any]:
        def run(q_latent, q_rope, held, k_rope, lengths, pages, factors):
            return mla_decode(
                q_latent, q_rope, held, k_rope, lengths, scale=scale, pages=pages,
                latent_scale=factors,
                implementation=form,  # pyright: ignore[reportArgumentType]
            )  # fmt: skip

        return run

    rows = slice(0, None, max(1, batch // _COMPARED))

    def expected(q_latent, q_rope, held, k_rope, lengths, pages, factors):
        if paged:
            pages = pages[rows]
        else:
            held, k_rope = held[rows], k_rope[rows]
            factors = None if factors is None else factors[rows]
        return reference.mla_decode(
            q_latent[rows], q_rope[rows], held, k_rope, lengths[rows],
            scale=scale, pages=pages, latent_scale=factors,
        )  # fmt: skip

    width = latent + rope
    size = jnp.dtype(dtype).itemsize
    token = latent + 4 + rope * size if fp8 else width * size
    hopper = heads % 64 == 0 and not fp8 and (latent, rope) == (512, 64)
    return Case(
        "mla_decode",
        name,
        (*(("mosaic",) if hopper else ()), "triton", "xla"),
        bind,
        inputs,
        2.0 * (latent + width) * heads * float(lengths.sum()),
        float(lengths.max(axis=1).sum()) * token
        + batch * queries * heads * ((width + latent) * size + 4.0),
        expected,
        lambda result: tuple(a[rows] for a in result),
        **more,
    )


CASES: tuple[Case, ...] = (
    _case("V2-Lite, batch 128, 4096 tokens", 128, 4096, 16, reach=168e-6, least=220e-6),
    _case("V2-Lite, batch 128, 4096 tokens, pages", 128, 4096, 16, paged=True),
    _case("V2-Lite, batch 64, ragged to 8192, pages", 64, 8192, 16, paged=True, ragged=True),
    _case("V2-Lite, batch 128, 4096 tokens, pages, FP8", 128, 4096, 16, paged=True, fp8=True),
    _case("V2-Lite, batch 32, 4096 tokens, 2 queries", 32, 4096, 16, queries=2),
    _case("V2-Lite, batch 1, 32768 tokens", 1, 32768, 16),
    _case("V3, batch 128, 4096 tokens", 128, 4096, 128, reach=221e-6, least=370e-6),
    _case("V3, batch 128, 4096 tokens, pages", 128, 4096, 128, paged=True),
    _case("V3, batch 64, ragged to 8192, pages", 64, 8192, 128, paged=True, ragged=True),
    _case("V3, batch 128, 4096 tokens, pages, FP8", 128, 4096, 128, paged=True, fp8=True),
    _case("V3, batch 8, 8192 tokens, pages, 2 queries", 8, 8192, 128, queries=2, paged=True),
    _case("V3, batch 1, 32768 tokens", 1, 32768, 128),
    _case("nano, batch 4, 512 tokens", 4, 512, 4, latent=32, rope=16, dtype=jnp.float32),
    _case("nano, batch 3, ragged to 320, pages", 3, 320, 4, paged=True, ragged=True, latent=32,
          rope=16),
)  # fmt: skip
