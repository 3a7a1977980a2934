"""Latent decode attention in XLA: a loop over blocks of the cache that ends where the longest
sequence ends.

B batch  T query  S cache capacity  H heads  C latent  R rope  W width of a result
P pages of the pool  L tokens a page  N pages a row
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Entries of a block, in a short cache and in a long one: each row reads whole blocks up to the
# longest row's end, so that a short cache wants small ones; a long one wants fewer turns.
_SHORT, _LONG = 128, 256


def attend_blocks(
    score: Callable[[Callable[[jax.Array], jax.Array]], jax.Array],
    mix: Callable[[jax.Array, Callable[[jax.Array], jax.Array]], jax.Array],
    lengths: jax.Array,
    capacity: int,
    shape: tuple[int, int, int, int],
    *,
    pages: jax.Array | None = None,
    page_size: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention over a cache of `capacity` entries, a block at a time (arXiv 1805.02867's
    running maximum).

    The trip count follows the longest visible length, so a long, mostly empty cache costs what it
    holds.

    Args:
        score: takes a function that cuts the current block out of a cache array [B, S, ...] (or
            out of a pool [P, L, ...], with `pages`), returns float32 [B, H, T, s].
        mix: takes weights float32 [B, H, T, s] and such a function, which also zeroes entries
            nobody sees; returns float32 [B, H, T, W].
        lengths: int32 [B, T], entries visible to each query.
        capacity: S, or N * L with `pages`.
        shape: (B, T, H, W).
        pages: int32 [B, N], the pool's page that holds entries n * L to n * L + L - 1 of a row;
            entries of the table that no query of the row needs are not followed.
        page_size: L.

    Returns:
        float32 [B, T, H, W] and log-sum-exp float32 [B, T, H]; 0 and -inf where nothing is visible.
    """
    batch, queries, heads, width = shape
    # Whole pages to a block; not more of them than there are.
    aim = _SHORT if capacity <= 4 * _LONG else _LONG
    block = min(max(aim // page_size, 1) * page_size, capacity)
    row_end = lengths.max(axis=1)

    def step(index, carry):
        top, total, out = carry
        first = jnp.minimum(index * block, capacity - block)
        position = first + jnp.arange(block)
        fresh = position >= index * block  # the last block may reach back into the one before it
        visible = fresh & (position < lengths[..., None])

        def cut(a):
            if pages is None:
                return jax.lax.dynamic_slice_in_dim(a, first, block, axis=1)
            count = block // page_size
            at = first // page_size
            entries = jax.lax.dynamic_slice_in_dim(pages, at, count, axis=1)
            held = (at + jnp.arange(count)) * page_size < row_end[:, None]
            # What the table says behind a row's end is nobody's promise: page 0 stands in.
            part = jnp.asarray(a)[jnp.where(held, entries, 0)]  # NumPy takes no traced index
            return part.reshape(batch, block, *a.shape[2:])

        def cut_clean(a):
            part = cut(a)
            held = (position < row_end[:, None]).reshape(batch, block, *(1,) * (a.ndim - 2))
            return jnp.where(held, part, jnp.zeros((), a.dtype))

        scores = jnp.where(visible[:, None], score(cut), -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
        weight = jnp.exp(scores - new_top)
        decay = jnp.exp(top - new_top)
        out = out * decay + mix(weight, cut_clean)
        return new_top, total * decay + weight.sum(axis=-1, keepdims=True), out

    lowest = jnp.finfo(jnp.float32).min
    start = (
        jnp.full((batch, heads, queries, 1), lowest, jnp.float32),
        jnp.zeros((batch, heads, queries, 1), jnp.float32),
        jnp.zeros((batch, heads, queries, width), jnp.float32),
    )
    if capacity <= block:
        top, total, out = step(0, start)
    else:
        top, total, out = jax.lax.fori_loop(0, (row_end.max() + block - 1) // block, step, start)
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    lse = jnp.where(seen, jnp.log(safe) + top, -jnp.inf)[..., 0].swapaxes(1, 2)
    return (out / safe).swapaxes(1, 2), lse


def mla_decode(
    q_latent: jax.Array,
    q_rope: jax.Array,
    latent: jax.Array,
    k_rope: jax.Array,
    lengths: jax.Array,
    pages: jax.Array | None = None,
    latent_scale: jax.Array | None = None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Arguments and results as of `api.mla_decode`, with lengths int32 [B, T]."""
    batch, queries, heads, width = q_latent.shape
    capacity = latent.shape[1] if pages is None else pages.shape[1] * latent.shape[1]

    def widened(part):
        # An 8-bit latent is exact in the query's type; its scale stays outside of the products.
        return part if latent_scale is None else part.astype(q_latent.dtype)

    def score(cut):
        both = jnp.einsum(
            "bthc,bsc->bhts", q_latent, widened(cut(latent)), preferred_element_type=jnp.float32
        )
        if latent_scale is not None:
            both *= cut(latent_scale)[:, None, None]
        both += jnp.einsum(
            "bthr,bsr->bhts", q_rope, cut(k_rope), preferred_element_type=jnp.float32
        )
        return both * scale

    def mix(weight, cut):
        values = widened(cut(latent))
        if latent_scale is not None:
            weight = weight * cut(latent_scale)[:, None, None]
        # Written out, since XLA:CPU has no bfloat16 product for the layout that einsum picks here.
        rows = weight.astype(values.dtype).reshape(batch, heads * queries, -1)
        out = jax.lax.dot_general(
            rows, values, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32
        )
        return out.reshape(batch, heads, queries, width)

    out, lse = attend_blocks(
        score,
        mix,
        lengths,
        capacity,
        (batch, queries, heads, width),
        pages=pages,
        page_size=1 if pages is None else latent.shape[1],
    )
    return out.astype(q_latent.dtype), lse
