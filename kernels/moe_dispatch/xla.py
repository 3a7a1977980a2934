"""Sort, gather and weighted combine in XLA.

On a GPU `dispatch` is one fused kernel, which reads x and writes the sorted rows; `combine` and
`dispatch`'s gradient are one each, which read the rows through the inverse permutation, add in
registers and write the tokens; `combine`'s gradient is three, and holds nothing but its results. So
all of them move the bytes they must and no more, and a hand-written kernel could only win in
`plan`, whose sort of M*K integers takes about ten short kernels; counting instead of sorting takes
as many.
M tokens  K chosen  E experts  D width
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepzoo.kernels.router.xla import expert_counts


class Plan(NamedTuple):
    """Where each routed row goes.

    Attributes:
        order: int32 [M*K], the flat (token, choice) pair behind each sorted row.
        inverse: int32 [M*K], the sorted row of each pair.
        group_sizes: int32 [E], rows of each expert; empty experts have 0.
    """

    order: jax.Array
    inverse: jax.Array
    group_sizes: jax.Array


def plan(indices: jax.Array, experts: int) -> Plan:
    """Sorts the M*K chosen pairs by expert, keeping token order within an expert.

    Args:
        indices: int32 [M, K], expert of each choice, in [0, E).
        experts: E.

    Raises:
        ValueError: indices that are not [M, K] integers.
    """
    if indices.ndim != 2 or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(
            f"moe_dispatch.plan needs integer indices [M, K], got {indices.dtype}"
            f"{list(indices.shape)}"
        )
    flat = indices.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    # Of a permutation, whose places are distinct: XLA writes it in one pass, in any order.
    inverse = jnp.argsort(order, stable=True).astype(jnp.int32)
    return Plan(order, inverse, expert_counts(indices, experts))


def dispatch(x: jax.Array, rows: Plan) -> jax.Array:
    """Copies each token's row to its experts: [M, D] -> [M*K, D] sorted by expert.

    The gradient adds a token's K rows in order of choice, in float32.

    Raises:
        ValueError: a plan of another number of tokens.
    """
    if x.ndim != 2 or (rows.order.size % x.shape[0] if x.shape[0] else rows.order.size):
        raise ValueError(
            f"moe_dispatch.dispatch needs x [M, D] for a plan of M * K = {rows.order.size} pairs,"
            f" got {x.shape}"
        )
    return _dispatch(x, rows)


@jax.custom_vjp
def _dispatch(x: jax.Array, rows: Plan) -> jax.Array:
    return x[rows.order // _chosen(x.shape[0], rows)]


def _chosen(tokens: int, rows: Plan) -> int:
    return max(rows.order.size // max(tokens, 1), 1)


def _dispatch_fwd(x: jax.Array, rows: Plan):
    return _dispatch(x, rows), (rows, x.shape[0])


def _dispatch_bwd(saved, gradient: jax.Array):
    rows, tokens = saved
    back = gradient[rows.inverse].reshape(tokens, _chosen(tokens, rows), gradient.shape[1])
    return back.astype(jnp.float32).sum(axis=1).astype(gradient.dtype), None


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


def combine(y: jax.Array, weights: jax.Array, rows: Plan) -> jax.Array:
    """Weighted sum of each token's expert outputs, in order of choice and in float32: [M*K, D],
    [M, K] -> [M, D] in y's dtype.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if y.ndim != 2 or weights.ndim != 2 or not y.shape[0] == weights.size == rows.order.size:
        raise ValueError(
            "moe_dispatch.combine needs y [M * K, D], weights [M, K] and a plan of M * K pairs;"
            f" got {y.shape}, {weights.shape} and {rows.order.size}"
        )
    return _combine(y, weights, rows)


@jax.custom_vjp
def _combine(y: jax.Array, weights: jax.Array, rows: Plan) -> jax.Array:
    back = y[rows.inverse].reshape(*weights.shape, y.shape[-1]).astype(jnp.float32)
    return (back * weights.astype(jnp.float32)[:, :, None]).sum(axis=1).astype(y.dtype)


def _combine_fwd(y: jax.Array, weights: jax.Array, rows: Plan):
    return _combine(y, weights, rows), (y, weights, rows)


def _combine_bwd(saved, gradient: jax.Array):
    y, weights, rows = saved
    spread = gradient[rows.order // weights.shape[1]].astype(jnp.float32)
    by_row = weights.astype(jnp.float32).reshape(-1)[rows.order]
    to_rows = (spread * by_row[:, None]).astype(y.dtype)
    to_weights = (y.astype(jnp.float32) * spread).sum(axis=-1)[rows.inverse].reshape(weights.shape)
    return to_rows, to_weights.astype(weights.dtype), None


_combine.defvjp(_combine_fwd, _combine_bwd)
