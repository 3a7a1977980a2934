"""Latent prefill attention in XLA, in query chunks: memory grows linearly with the sequence.

The queries are cut into spans, each of which reads only the keys before its end; a span runs
through its chunks in a loop. Written for CPUs too, where a training step spends a good part of its
time here: heads are batch dimensions of every product, and each chunk's scores are made once.
B batch  T query  S key  H heads  N nope  R rope  V value
"""

from functools import partial

import jax
import jax.numpy as jnp

_CHUNK = 128
_SPANS = 8


def forward(
    q_nope, q_rope, k_nope, k_rope, v, q_segments, k_segments, *, scale, q_offset,
    interpret=False, chunk=_CHUNK, spans=_SPANS,
):  # fmt: skip
    """(out, lse), see `api.mla_prefill`; `chunk` and `spans` are for tests."""
    del interpret
    q_nope, q_rope, k_nope, v = (a.swapaxes(1, 2) for a in (q_nope, q_rope, k_nope, v))

    def rows(seen, carry, start, q_nope, q_rope, q_segments):
        score = _scores(q_nope, q_rope, k_nope[:, :, :seen], k_rope[:, :seen], scale)
        marks = None if k_segments is None else k_segments[:, :seen]
        visible = _visible(start, q_offset, q_nope.shape[2], seen, q_segments, marks)
        score = jnp.where(visible, score, -jnp.inf)
        top = jnp.maximum(score.max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
        weight = jnp.exp(score - top)
        total = weight.sum(axis=-1, keepdims=True)
        safe = jnp.where(total > 0, total, 1.0)
        out = _dot("bhts,bhsv->bhtv", weight.astype(v.dtype), v[:, :, :seen]) / safe
        lse = jnp.where(total > 0, jnp.log(safe) + top, -jnp.inf)
        return carry, (out.astype(v.dtype), lse[..., 0])

    parts = []
    for begin, end, seen in _spans(q_nope, k_nope, q_offset, chunk, spans):
        marks = None if q_segments is None else q_segments[:, begin:end]
        cut = (q_nope[:, :, begin:end], q_rope[:, :, begin:end], marks)
        parts.append(_by_chunks(partial(rows, seen), None, begin, chunk, cut)[1])
    out, lse = (jnp.concatenate(a, axis=2).swapaxes(1, 2) for a in zip(*parts, strict=True))
    return out, lse


def backward(
    q_nope, q_rope, k_nope, k_rope, v, q_segments, k_segments, out, lse, d_out, d_lse, *,
    scale, q_offset, interpret=False, chunk=_CHUNK, spans=_SPANS,
):  # fmt: skip
    """(dq_nope, dq_rope, dk_nope, dk_rope, dv), see `api`."""
    del interpret
    dtypes = [a.dtype for a in (q_nope, q_rope, k_nope, k_rope, v)]
    lse, delta = row_terms(out, lse, d_out, d_lse)
    lse, delta = lse.swapaxes(1, 2), delta.swapaxes(1, 2)
    q_nope, q_rope, k_nope, v, d_out = (
        a.swapaxes(1, 2) for a in (q_nope, q_rope, k_nope, v, d_out.astype(v.dtype))
    )

    def rows(seen, carry, start, q_nope, q_rope, d_out, lse, delta, q_segments):
        keys, ropes, values = k_nope[:, :, :seen], k_rope[:, :seen], v[:, :, :seen]
        marks = None if k_segments is None else k_segments[:, :seen]
        visible = _visible(start, q_offset, q_nope.shape[2], seen, q_segments, marks)
        score = _scores(q_nope, q_rope, keys, ropes, scale)
        weight = jnp.where(visible, jnp.exp(score - lse[..., None]), 0.0)
        d_weight = _dot("bhtv,bhsv->bhts", d_out, values)
        d_score = (weight * (d_weight - delta[..., None]) * scale).astype(q_nope.dtype)
        d_keys = (
            _dot("bhts,bhtn->bhsn", d_score, q_nope),
            _dot("bhts,bhtr->bsr", d_score, q_rope),
            _dot("bhts,bhtv->bhsv", weight.astype(v.dtype), d_out),
        )
        d_query = (
            _dot("bhts,bhsn->bhtn", d_score, keys).astype(q_nope.dtype),
            _dot("bhts,bsr->bhtr", d_score, ropes).astype(q_rope.dtype),
        )
        return jax.tree.map(_add_in_front, carry, d_keys), d_query

    d_keys = tuple(jnp.zeros(a.shape, jnp.float32) for a in (k_nope, k_rope, v))
    d_keys = tuple(d_keys)
    parts = []
    for begin, end, seen in _spans(q_nope, k_nope, q_offset, chunk, spans):
        marks = None if q_segments is None else q_segments[:, begin:end]
        cut = [a[:, :, begin:end] for a in (q_nope, q_rope, d_out, lse, delta)]
        d_keys, part = _by_chunks(partial(rows, seen), d_keys, begin, chunk, (*cut, marks))
        parts.append(part)
    d_query = [jnp.concatenate(a, axis=2).swapaxes(1, 2) for a in zip(*parts, strict=True)]
    dk_nope, dk_rope, dv = d_keys
    d_all = (*d_query, dk_nope.swapaxes(1, 2), dk_rope, dv.swapaxes(1, 2))
    return tuple(a.astype(t) for a, t in zip(d_all, dtypes, strict=True))


def row_terms(out, lse, d_out, d_lse):
    """What the backward pass needs of each query, float32: lse with a finite stand-in where
    nothing was seen, and delta with d score = p * (d_out . v - delta)."""
    seen = lse > -jnp.inf
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=-1) - d_lse
    return jnp.where(seen, lse, 0.0), jnp.where(seen, delta, 0.0)


def _dot(equation: str, *arrays: jax.Array) -> jax.Array:
    return jnp.einsum(equation, *arrays, preferred_element_type=jnp.float32)


def _scores(q_nope, q_rope, k_nope, k_rope, scale):
    score = _dot("bhtn,bhsn->bhts", q_nope, k_nope) + _dot("bhtr,bsr->bhts", q_rope, k_rope)
    return score * scale


def _visible(start, q_offset, size: int, seen: int, q_segments, k_segments):
    """Which of `seen` keys each of `size` queries from `start` on may see: [B or 1, 1, T, S]."""
    last = jnp.arange(size) + start + jnp.reshape(jnp.asarray(q_offset), (-1, 1))
    visible = last[:, :, None] >= jnp.arange(seen)
    if q_segments is not None:
        visible &= q_segments[:, :, None] == k_segments[:, None, :]
    return visible[:, None]


def _spans(q_nope, k_nope, q_offset, chunk: int, spans: int):
    """(first query, end of the queries, number of keys they see) of each span."""
    queries, keys = q_nope.shape[2], k_nope.shape[2]
    size = chunk * -(-queries // (chunk * spans))
    for begin in range(0, queries, size):
        end = min(begin + size, queries)
        seen = min(max(end + q_offset, 1), keys) if isinstance(q_offset, int) else keys
        yield begin, end, seen


def _by_chunks(rows, carry, begin: int, chunk: int, arrays):
    """Runs rows(carry, start, *chunk of each of `arrays`) -> (carry, results) over axis -2 of a
    span's arrays [B, H, T, ...] (and [B, T] segments); results come back joined."""
    size = arrays[0].shape[2]
    if size <= chunk:
        return rows(carry, begin, *arrays)
    count = -(-size // chunk)
    marked = arrays[-1] is not None

    def cut(a, axis):
        widths = [(0, 0)] * a.ndim
        widths[axis] = (0, count * chunk - size)
        a = jnp.pad(a, widths)
        return jnp.moveaxis(a.reshape(*a.shape[:axis], count, chunk, *a.shape[axis + 1 :]), axis, 0)

    pieces = [cut(a, 2) for a in arrays[:-1]] + ([cut(arrays[-1], 1)] if marked else [])

    def step(carry, xs):
        start, *some = xs
        return rows(carry, start, *some, *([] if marked else [None]))

    starts = begin + chunk * jnp.arange(count)
    carry, results = jax.lax.scan(step, carry, (starts, *pieces))
    return carry, tuple(
        jnp.moveaxis(a, 0, 2).reshape(*a.shape[1:3], -1, *a.shape[4:])[:, :, :size] for a in results
    )


def _add_in_front(total: jax.Array, part: jax.Array) -> jax.Array:
    """Adds to the first keys, which are all that a span sees."""
    axis = total.ndim - 2
    front = (slice(None),) * axis + (slice(0, part.shape[axis]),)
    return total.at[front].add(part)
