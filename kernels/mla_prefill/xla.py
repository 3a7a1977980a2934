"""Latent prefill attention in XLA, in chunks of queries: memory grows linearly with the sequence.

The queries are cut into spans, each of which reads only the keys before its end; a span runs
through its chunks in a loop that writes its results in place, so that one chunk's scores at a time
are alive. Written for CPUs too, where a training step spends a good part of its time here: heads
are batch dimensions of every product, and a chunk's scores fit a cache. The rope parts may be None,
for grouped-query attention.
B batch  T query  S key  H heads  N nope  R rope  V value
"""

from typing import Any

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
    q_nope, q_rope, k_nope, v = (_heads_first(a) for a in (q_nope, q_rope, k_nope, v))

    def rows(start, size, seen, carry):
        nope, rope = (_rows(a, start, size) for a in (q_nope, q_rope))
        score = _scores(nope, rope, k_nope[:, :, :seen], k_rope, scale)
        score = jnp.where(
            _visible(start, size, seen, q_offset, q_segments, k_segments), score, -jnp.inf
        )
        top = jnp.maximum(score.max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
        weight = jnp.exp(score - top)
        total = weight.sum(axis=-1, keepdims=True)
        safe = jnp.where(total > 0, total, 1.0)
        out = _dot("bhts,bhsv->bhtv", weight.astype(v.dtype), v[:, :, :seen]) / safe
        lse = jnp.where(total > 0, jnp.log(safe) + top, -jnp.inf)
        return _put(carry, (out, lse), start)

    shape = q_nope.shape[:3]
    carry = (jnp.zeros((*shape, v.shape[-1]), v.dtype), jnp.zeros((*shape, 1), jnp.float32))
    out, lse = _walk(rows, carry, shape[2], k_nope.shape[2], q_offset, chunk, spans)
    return out.swapaxes(1, 2), lse[..., 0].swapaxes(1, 2)


def backward(
    q_nope, q_rope, k_nope, k_rope, v, q_segments, k_segments, out, lse, d_out, d_lse, *,
    scale, q_offset, interpret=False, chunk=_CHUNK, spans=_SPANS,
):  # fmt: skip
    """(dq_nope, dq_rope, dk_nope, dk_rope, dv), see `api`."""
    del interpret
    likes = (q_nope, q_rope, k_nope, k_rope, v)
    lse, delta = (a.swapaxes(1, 2)[..., None] for a in row_terms(out, lse, d_out, d_lse))
    q_nope, q_rope, k_nope, v, d_out = (
        _heads_first(a) for a in (q_nope, q_rope, k_nope, v, d_out.astype(v.dtype))
    )

    def rows(start, size, seen, carry):
        nope, rope, gradient, lses, deltas = (
            _rows(a, start, size) for a in (q_nope, q_rope, d_out, lse, delta)
        )
        keys, values = k_nope[:, :, :seen], v[:, :, :seen]
        score = _scores(nope, rope, keys, k_rope, scale)
        seen_by = _visible(start, size, seen, q_offset, q_segments, k_segments)
        weight = jnp.where(seen_by, jnp.exp(score - lses), 0.0)
        d_weight = _dot("bhtv,bhsv->bhts", gradient, values)
        d_score = (weight * (d_weight - deltas) * scale).astype(nope.dtype)
        d_query = [_dot("bhts,bhsn->bhtn", d_score, keys)]
        d_keys = [
            _dot("bhts,bhtn->bhsn", d_score, nope),
            _dot("bhts,bhtv->bhsv", weight.astype(v.dtype), gradient),
        ]
        if rope is not None:
            d_query.append(_dot("bhts,bsr->bhtr", d_score, k_rope[:, :seen]))
            d_keys.append(_dot("bhts,bhtr->bsr", d_score, rope))
        to_query, to_keys = carry
        return _put(to_query, d_query, start), tuple(map(_add_in_front, to_keys, d_keys))

    ropes = [] if q_rope is None else [(q_rope, k_rope)]
    carry = (
        tuple(jnp.zeros_like(a) for a in (q_nope, *(q for q, _ in ropes))),
        tuple(jnp.zeros(a.shape, jnp.float32) for a in (k_nope, v, *(k for _, k in ropes))),
    )
    sizes = (q_nope.shape[2], k_nope.shape[2])
    to_query, to_keys = _walk(rows, carry, *sizes, q_offset, chunk, spans)
    (dq_nope, *dq_rope), (dk_nope, dv, *dk_rope) = to_query, to_keys
    d_all = (dq_nope, *(dq_rope or [None]), dk_nope, *(dk_rope or [None]), dv)
    return tuple(
        None if d is None else (d if d.ndim == 3 else d.swapaxes(1, 2)).astype(like.dtype)
        for d, like in zip(d_all, likes, strict=True)
    )


def row_terms(out, lse, d_out, d_lse):
    """What the backward pass needs of each query, float32: lse with a finite stand-in where
    nothing was seen, and delta with d score = p * (d_out . v - delta)."""
    seen = lse > -jnp.inf
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=-1) - d_lse
    return jnp.where(seen, lse, 0.0), jnp.where(seen, delta, 0.0)


def _dot(equation: str, *arrays: jax.Array) -> jax.Array:
    return jnp.einsum(equation, *arrays, preferred_element_type=jnp.float32)


def _heads_first(a: Any) -> Any:
    return None if a is None else a.swapaxes(1, 2)


def _scores(q_nope, q_rope, k_nope, k_rope, scale):
    score = _dot("bhtn,bhsn->bhts", q_nope, k_nope)
    if q_rope is not None:
        score += _dot("bhtr,bsr->bhts", q_rope, k_rope[:, : k_nope.shape[2]])
    return score * scale


def _visible(start, size: int, seen: int, q_offset, q_segments, k_segments):
    """Which of `seen` keys each of `size` queries from `start` on may see: [B or 1, 1, T, S]."""
    last = jnp.arange(size) + start + jnp.reshape(jnp.asarray(q_offset), (-1, 1))
    visible = last[:, :, None] >= jnp.arange(seen)
    if q_segments is not None:
        marks = jax.lax.dynamic_slice_in_dim(q_segments, start, size, axis=1)
        visible &= marks[:, :, None] == k_segments[:, None, :seen]
    return visible[:, None]


def _walk(rows, carry, queries: int, keys: int, q_offset, chunk: int, spans: int):
    """Runs rows(start, size, keys to read, carry) -> carry over all queries, in order."""
    chunks = -(-queries // chunk)
    # Two chunks or more to a span: single ones are no loop, and XLA would run them side by side.
    size = chunk * max(2, -(-chunks // spans))
    for begin in range(0, queries, size):
        end = min(begin + size, queries)
        seen = min(max(end + q_offset, 1), keys) if isinstance(q_offset, int) else keys
        whole = (end - begin) // chunk

        def step(i, carry, begin=begin, seen=seen):
            return rows(begin + i * chunk, chunk, seen, carry)

        if whole:
            carry = jax.lax.fori_loop(0, whole, step, carry)
        if rest := (end - begin) % chunk:
            carry = rows(end - rest, rest, seen, carry)
    return carry


def _rows(a: Any, start, size: int) -> Any:
    return None if a is None else jax.lax.dynamic_slice_in_dim(a, start, size, axis=2)


def _put(arrays, parts, start):
    """Writes rows from `start` on."""
    return tuple(
        jax.lax.dynamic_update_slice_in_dim(a, part.astype(a.dtype), start, axis=2)
        for a, part in zip(arrays, parts, strict=True)
    )


def _add_in_front(total: jax.Array, part: jax.Array) -> jax.Array:
    """Adds to the first keys, which are all that a span sees."""
    front = (slice(None),) * (total.ndim - 2) + (slice(0, part.shape[-2]),)
    return total.at[front].add(part)
