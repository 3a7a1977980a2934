"""Sort, gather and weighted combine in XLA.

M tokens  K chosen  E experts  D width
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepzoo.kernels.router.xla import expert_counts


class Plan(NamedTuple):
    """Where each routed row goes.

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
        indices: int32 [M, K], expert of each choice.
        experts: E.
    """
    flat = indices.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    inverse = jnp.argsort(order, stable=True).astype(jnp.int32)
    return Plan(order, inverse, expert_counts(indices, experts))


@jax.custom_vjp
def dispatch(x: jax.Array, rows: Plan) -> jax.Array:
    """Copies each token's row to its experts: [M, D] -> [M*K, D] sorted by expert."""
    return x[rows.order // (rows.order.shape[0] // x.shape[0])]


def _dispatch_fwd(x: jax.Array, rows: Plan):
    return dispatch(x, rows), (rows, x.shape)


def _dispatch_bwd(saved, gradient: jax.Array):
    rows, shape = saved
    return gradient[rows.inverse].reshape(shape[0], -1, shape[1]).sum(axis=1), None


dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def combine(y: jax.Array, weights: jax.Array, rows: Plan) -> jax.Array:
    """Weighted sum of each token's expert outputs, float32 accumulation: [M*K, D], [M, K] -> [M, D]
    in y's dtype."""
    back = y[rows.inverse].reshape(*weights.shape, y.shape[-1])
    return jnp.einsum("mkd,mk->md", back.astype(jnp.float32), weights.astype(jnp.float32)).astype(
        y.dtype
    )


def _combine_fwd(y: jax.Array, weights: jax.Array, rows: Plan):
    return combine(y, weights, rows), (y, weights, rows)


def _combine_bwd(saved, gradient: jax.Array):
    y, weights, rows = saved
    top = weights.shape[1]
    spread = gradient.astype(jnp.float32)[rows.order // top]
    to_rows = (spread * weights.reshape(-1)[rows.order][:, None]).astype(y.dtype)
    to_weights = (y.astype(jnp.float32) * spread).sum(axis=-1)[rows.inverse].reshape(weights.shape)
    return to_rows, to_weights.astype(weights.dtype), None


combine.defvjp(_combine_fwd, _combine_bwd)
