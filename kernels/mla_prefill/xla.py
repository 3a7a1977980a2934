"""Latent prefill attention in XLA, in chunks of queries: memory grows linearly with the sequence.

A loop takes a chunk of queries at a time and writes its results in place, so that one chunk's
scores are alive. It reads the last keys that the chunk can see, in one of a few widths: with
packed segments those from the beginning of the first segment that reaches into the chunk, else all
before its end. Written for CPUs too, where a training step spends a good part of its time here:
heads are batch dimensions of every product, a chunk's scores fit a cache, and the two parts of a
key lie side by side, so that there is one product where there would be two. The rope parts may be
None, for grouped-query attention.
B batch  T query  S key  H heads  N nope  R rope  V value
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_CHUNK = 64
_SPANS = 8


def forward(
    q_nope, q_rope, k_nope, k_rope, v, q_segments, k_segments, *, scale, q_offset,
    interpret=False, chunk=_CHUNK, spans=_SPANS,
):  # fmt: skip
    """(out, lse), see `api.mla_prefill`; `chunk` and `spans` are for tests."""
    del interpret
    q, k, v = _joined(q_nope, q_rope, k_nope, k_rope, v)
    walk = _Walk.of(q, k, q_segments, k_segments, q_offset, chunk, spans)

    def rows(part: "_Part", carry):
        score = _dot("bhtn,bhsn->bhts", part.queries(q), part.keys(k)) * scale
        score = jnp.where(part.visible(), score, -jnp.inf)
        top = jnp.maximum(score.max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
        weight = jnp.exp(score - top)
        total = weight.sum(axis=-1, keepdims=True)
        safe = jnp.where(total > 0, total, 1.0)
        out = _dot("bhts,bhsv->bhtv", weight.astype(v.dtype), part.keys(v)) / safe
        lse = jnp.where(total > 0, jnp.log(safe) + top, -jnp.inf)
        return part.put(carry[0], out), part.put(carry[1], lse)

    shape = (*q.shape[:2], walk.padded)
    carry = (jnp.zeros((*shape, v.shape[-1]), v.dtype), jnp.zeros((*shape, 1), jnp.float32))
    out, lse = (a[:, :, : q.shape[2]].swapaxes(1, 2) for a in walk.run(rows, carry))
    return out, lse[..., 0]


def backward(
    q_nope, q_rope, k_nope, k_rope, v, q_segments, k_segments, out, lse, d_out, d_lse, *,
    scale, q_offset, interpret=False, chunk=_CHUNK, spans=_SPANS,
):  # fmt: skip
    """(dq_nope, dq_rope, dk_nope, dk_rope, dv), see `api`."""
    del interpret
    likes = (q_nope, q_rope, k_nope, k_rope, v)
    lse, delta = (a.swapaxes(1, 2)[..., None] for a in row_terms(out, lse, d_out, d_lse))
    d_out = d_out.astype(v.dtype).swapaxes(1, 2)
    q, k, v = _joined(q_nope, q_rope, k_nope, k_rope, v)
    walk = _Walk.of(q, k, q_segments, k_segments, q_offset, chunk, spans)

    def rows(part: "_Part", carry):
        d_q, d_k, d_v = carry
        queries, gradient, keys = part.queries(q), part.queries(d_out), part.keys(k)
        score = _dot("bhtn,bhsn->bhts", queries, keys)
        weight = jnp.where(part.visible(), jnp.exp(score * scale - part.queries(lse)), 0.0)
        d_weight = _dot("bhtv,bhsv->bhts", gradient, part.keys(v))
        d_score = (weight * (d_weight - part.queries(delta)) * scale).astype(q.dtype)
        weight = weight.astype(v.dtype)
        d_q = part.put(d_q, _dot("bhts,bhsn->bhtn", d_score, keys))
        d_k = part.add(d_k, _dot("bhts,bhtn->bhsn", d_score, queries))
        d_v = part.add(d_v, _dot("bhts,bhtv->bhsv", weight, gradient))
        return d_q, d_k, d_v

    padded = jnp.zeros((*q.shape[:2], walk.padded, q.shape[3]), q.dtype)
    carry = (padded, *(jnp.zeros(a.shape, jnp.float32) for a in (k, v)))
    d_q, d_k, d_v = (a.swapaxes(1, 2) for a in walk.run(rows, carry))
    d_q, nope = d_q[:, : q.shape[2]], q_nope.shape[-1]
    rope = (None, None) if q_rope is None else (d_q[..., nope:], d_k[..., nope:].sum(axis=2))
    d_all = (d_q[..., :nope], rope[0], d_k[..., :nope], rope[1], d_v)
    return tuple(
        None if d is None else d.astype(like.dtype) for d, like in zip(d_all, likes, strict=True)
    )


def row_terms(out, lse, d_out, d_lse):
    """What the backward pass needs of each query, float32: lse with a finite stand-in where
    nothing was seen, and delta with d score = p * (d_out . v - delta)."""
    seen = lse > -jnp.inf
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=-1) - d_lse
    return jnp.where(seen, lse, 0.0), jnp.where(seen, delta, 0.0)


def _dot(equation: str, *arrays: jax.Array) -> jax.Array:
    return jnp.einsum(equation, *arrays, preferred_element_type=jnp.float32)


def _joined(q_nope, q_rope, k_nope, k_rope, v):
    """Queries, keys and values with heads first, the parts of a query and of a key side by side."""
    q, k = q_nope, k_nope
    if q_rope is not None:
        rope = jnp.broadcast_to(k_rope[:, :, None], (*k.shape[:3], k_rope.shape[-1]))
        q, k = jnp.concatenate([q, q_rope], axis=-1), jnp.concatenate([k, rope], axis=-1)
    return tuple(a.swapaxes(1, 2) for a in (q, k, v))


class _Part(NamedTuple):
    """A chunk of queries, and the keys that it reads.

    Attributes:
        walk: all of them.
        first: int32 [], the first query.
        start: int32 [], the first key.
        width: number of keys.
    """

    walk: "_Walk"
    first: Any
    start: Any
    width: int

    def queries(self, a: jax.Array) -> jax.Array:
        """Of an array [B, H, T, ...]."""
        if spare := self.walk.padded - a.shape[2]:
            a = jnp.pad(a, ((0, 0), (0, 0), (0, spare), (0, 0)))
        return jax.lax.dynamic_slice_in_dim(a, self.first, self.walk.chunk, axis=2)

    def keys(self, a: jax.Array) -> jax.Array:
        """Of an array [B, H, S, ...]."""
        return jax.lax.dynamic_slice_in_dim(a, self.start, self.width, axis=2)

    def put(self, whole: jax.Array, part: jax.Array) -> jax.Array:
        """Writes the results of the queries."""
        part = part.astype(whole.dtype)
        return jax.lax.dynamic_update_slice_in_dim(whole, part, self.first, axis=2)

    def add(self, whole: jax.Array, part: jax.Array) -> jax.Array:
        """Adds to what the keys have got."""
        part = self.keys(whole) + part
        return jax.lax.dynamic_update_slice_in_dim(whole, part, self.start, axis=2)

    def visible(self) -> jax.Array:
        """Which keys each query may see, bool [B or 1, 1, queries, keys]."""
        walk = self.walk
        last = jnp.arange(walk.chunk) + self.first + jnp.reshape(jnp.asarray(walk.offset), (-1, 1))
        visible = last[:, :, None] >= jnp.arange(self.width) + self.start
        if walk.q_segments is not None:
            cut = jax.lax.dynamic_slice_in_dim
            marks = cut(walk.q_segments, self.first, walk.chunk, axis=1)
            visible &= (
                marks[:, :, None] == cut(walk.k_segments, self.start, self.width, axis=1)[:, None]
            )
        return visible[:, None]


class _Walk(NamedTuple):
    """Through all queries, a chunk at a time.

    Attributes:
        keys: S.
        chunk: queries of a part.
        padded: queries in all, a multiple of `chunk`.
        offset: int or int32 [B], see `api`.
        q_segments, k_segments: int32 [B, padded] and [B, S], or None.
        widths: numbers of keys that a part may read, rising.
        least: int32 [padded / chunk], the first key that each part must read.
    """

    keys: int
    chunk: int
    padded: int
    offset: Any
    q_segments: Any
    k_segments: Any
    widths: list[int]
    least: jax.Array

    @classmethod
    def of(cls, q, k, q_segments, k_segments, offset, chunk: int, spans: int) -> "_Walk":
        """For q [B, H, T, .] and k [B, H, S, .]."""
        queries, keys = q.shape[2], k.shape[2]
        chunk = min(chunk, queries)
        padded = -(-queries // chunk) * chunk
        least = jnp.zeros((padded // chunk,), jnp.int32)
        if q_segments is not None:
            q_segments = jnp.pad(q_segments, ((0, 0), (0, padded - queries)), mode="edge")
        if not isinstance(offset, int):  # no telling which keys: all of them
            widths = [keys]
        elif q_segments is None:
            step = chunk * max(2, -(-keys // (chunk * spans)))
            widths = [*range(step, keys, step), keys]
        else:
            least = chunk * _first_block(q_segments, k_segments, chunk).min(axis=0)
            counts = (1, *(n << i for i in range(keys.bit_length()) for n in (2, 3)))
            widths = [*(chunk * n for n in counts if chunk * n < keys), keys]
        return cls(keys, chunk, padded, offset, q_segments, k_segments, widths, least)

    def run(self, part: Callable, carry: Any) -> Any:
        """Carries `carry` through part(which, carry) for all parts."""

        def step(i, carry):
            first = i * self.chunk
            if len(self.widths) == 1:
                return part(_Part(self, first, 0, self.keys), carry)
            end = jnp.clip(first + self.chunk + self.offset, 1, self.keys)

            def read(width: int) -> Callable:
                start = jnp.clip(end - width, 0, self.keys - width)
                return lambda carry: part(_Part(self, first, start, width), carry)

            which = (jnp.asarray(self.widths) < end - self.least[i]).sum()
            return jax.lax.switch(which, [read(width) for width in self.widths], carry)

        count = self.padded // self.chunk
        return step(0, carry) if count == 1 else jax.lax.fori_loop(0, count, step, carry)


def _first_block(q_segments: jax.Array, k_segments: jax.Array, size: int) -> jax.Array:
    """Which `size` keys are the first that may share a segment with each `size` queries, int32
    [B, T / size].

    It compares the ranges of the numbers: exact where numbers rise along a row, never too late.
    """

    def ranges(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        marks = segments.astype(jnp.uint32)  # of padding, which comes last, -1: the largest
        marks = jnp.pad(marks, ((0, 0), (0, -marks.shape[1] % size)), mode="edge")
        marks = marks.reshape(marks.shape[0], -1, size)
        return marks.min(axis=2), marks.max(axis=2)

    (q_low, q_high), (k_low, k_high) = ranges(q_segments), ranges(k_segments)
    meet = (q_low[:, :, None] <= k_high[:, None]) & (k_low[:, None] <= q_high[:, :, None])
    return jnp.argmax(meet, axis=2).astype(jnp.int32)
