"""Biases of V3's router: state of their own, moved by the experts' load and by nothing else."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from deepzoo.zoo.model import Params

# Where the bias (V3 report, arXiv 2412.19437, eq. 16) lies in the parameters, by stack.
_BIASES = {"moe": ("moe", "mlp", "gate"), "mtp": ("mtp", "block", "mlp", "gate")}
_BIAS = "e_score_correction_bias"


def split_bias(params: Params) -> tuple[Params, dict[str, jax.Array]]:
    """Parameters without the router biases, and the biases."""
    bias = {}
    for name, path in _BIASES.items():
        gate = _get(params, path)
        if gate is not None and _BIAS in gate:
            bias[name] = gate[_BIAS]
            params = _put(params, path, {k: v for k, v in gate.items() if k != _BIAS})
    return params, bias


def with_bias(params: Params, bias: Mapping[str, jax.Array]) -> Params:
    """`split_bias` backwards."""
    for name, value in bias.items():
        gate = _get(params, _BIASES[name])
        assert gate is not None
        params = _put(params, _BIASES[name], gate | {_BIAS: value})
    return params


def balanced(bias: jax.Array, load: jax.Array, rate: jax.Array) -> jax.Array:
    """Auxiliary-loss-free balancing (V3 report, 2.1.2): an overloaded expert down, the others up.

    Args:
        bias: float32 [L, E].
        load: int32 [L, E], tokens of the whole batch.
        rate: the report's gamma.
    """
    load = load.astype(jnp.float32)
    return bias + rate * jnp.sign(load.mean(axis=-1, keepdims=True) - load)


def _get(tree: Params, path: tuple[str, ...]) -> Params | None:
    for key in path:
        if key not in tree:
            return None
        tree = tree[key]
    return tree


def _put(tree: Params, path: tuple[str, ...], leaf: Params) -> Params:
    return tree | {path[0]: _put(tree[path[0]], path[1:], leaf) if path[1:] else leaf}
