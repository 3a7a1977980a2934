"""Optimisers as the papers set them, made of optax; their state in fewer bytes.

Gradients come clipped (`train_step`). A rate is a number or a schedule (`schedules`).
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepzoo.zoo.model import Params

type Rate = float | optax.Schedule
type Bytes = Literal["float32", "bfloat16", "int8"]

_LAYERED = ("dense", "moe", "mtp")
_BLOCK = 128
_SMALL = 4096  # elements; smaller leaves are norms and biases, whose bytes do not count


def matrices(params: Params) -> Any:
    """Mask that is True for what weight decay is for: matrices, tables, routers; not norms, biases.

    The leading axis of stacked layers, and that of experts, are no part of a matrix.
    """

    def is_matrix(path, leaf):
        names = [str(getattr(k, "key", k)) for k in path]
        stacked = names[0] in _LAYERED and not (len(names) > 1 and names[1].isdigit())
        return leaf.ndim - stacked >= 2

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def hidden_matrices(params: Params) -> Any:
    """Mask that is True for the matrices inside layers: not for embedding, head and router."""
    inner = {"embed_tokens", "lm_head", "gate"}

    def is_hidden(path, matrix):
        return matrix and inner.isdisjoint(str(getattr(k, "key", k)) for k in path)

    return jax.tree_util.tree_map_with_path(is_hidden, matrices(params))


def adamw(
    params: Params,
    rate: Rate,
    *,
    decay: float = 0.1,
    b1: float = 0.9,
    b2: float = 0.95,
    state: Bytes = "float32",
) -> optax.GradientTransformation:
    """AdamW; b1, b2 and weight decay of V2 and V3, decay on `matrices` only.

    Args:
        params: for names and shapes; without the router biases.
        rate: learning rate.
        decay: weight decay.
        b1: of the first moment.
        b2: of the second moment.
        state: how the moments are stored, see `stored`; V3 used bfloat16 (report, 3.3.2).
    """
    tx = optax.adamw(rate, b1=b1, b2=b2, weight_decay=decay, mask=matrices(params))
    return stored(tx, state)


def muon(
    params: Params,
    rate: Rate,
    adam_rate: Rate,
    *,
    decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.95,
    state: Bytes = "float32",
) -> optax.GradientTransformation:
    """Muon (arXiv 2502.16982) for `hidden_matrices`; AdamW for embedding, head, router, norms.

    Each layer's and each expert's matrix is orthogonalised by itself. Weight decay is for the
    former only.

    Args:
        params: for names and shapes; without the router biases.
        rate: of Muon.
        adam_rate: of AdamW.
        decay: weight decay.
        b1: of AdamW.
        b2: of AdamW.
        state: how momenta are stored, see `stored`.
    """
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
    tx = optax.contrib.muon(
        rate,
        adam_learning_rate=adam_rate,
        adam_b1=b1,
        adam_b2=b2,
        weight_decay=decay,
        muon_weight_dimension_numbers=jax.tree.map(
            lambda m: numbers if m else None, hidden_matrices(params)
        ),
    )
    return stored(tx, state)


class Blocks(NamedTuple):
    """An array in 8 bits: codes of its shape, a float32 scale for each block of its last axis.

    Attributes:
        codes: int8, value = code * scale; uint8 for what is never negative, value = (code *
            scale)^2.
        scale: float32, the shape with the last axis divided by the block's length.
    """

    codes: jax.Array
    scale: jax.Array


def stored(tx: optax.GradientTransformation, dtype: Bytes) -> optax.GradientTransformation:
    """The same optimiser, its float32 state kept in `dtype` between steps.

    "bfloat16" is a cast. "int8" is in blocks of 128 of the last axis (the whole axis where 128 does
    not divide it): the first moment linear, the second as its square root, so that both cover a
    range of 255 of gradients; a second moment that is not zero is never rounded to zero, which
    would make its update explode. Leaves of less than 4096 elements stay as they are.
    """
    if dtype == "float32":
        return tx

    def pack(state):
        return jax.tree_util.tree_map_with_path(lambda p, x: _pack(p, x, dtype), state)

    def unpack(state):
        return jax.tree.map(_unpack, state, is_leaf=lambda x: isinstance(x, Blocks))

    def init(params):
        return pack(tx.init(params))

    def update(updates, state, params=None):
        updates, state = tx.update(updates, unpack(state), params)
        return updates, pack(state)

    return optax.GradientTransformation(init, update)


def _pack(path: Any, x: jax.Array, dtype: Bytes) -> Any:
    if x.dtype != jnp.float32 or x.size < _SMALL:
        return x
    if dtype == "bfloat16":
        return x.astype(jnp.bfloat16)
    positive = any(getattr(k, "name", None) == "nu" for k in path)
    length = _BLOCK if x.shape[-1] % _BLOCK == 0 else x.shape[-1]
    blocks = (jnp.sqrt(x) if positive else x).reshape(*x.shape[:-1], -1, length)
    most = 255 if positive else 127
    scale = jnp.abs(blocks).max(axis=-1, keepdims=True) / most
    codes = jnp.round(blocks / jnp.where(scale > 0, scale, 1.0))
    if positive:
        codes = jnp.where(blocks > 0, jnp.maximum(codes, 1), 0)
    codes = codes.reshape(x.shape).astype(jnp.uint8 if positive else jnp.int8)
    return Blocks(codes, scale[..., 0])


def _unpack(x: Any) -> Any:
    if isinstance(x, Blocks):
        blocks = x.codes.astype(jnp.float32).reshape(*x.scale.shape, -1) * x.scale[..., None]
        whole = blocks.reshape(x.codes.shape)
        return whole * whole if x.codes.dtype == jnp.uint8 else whole
    return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
