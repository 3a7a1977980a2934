"""Fingerprints that prove an array is the one that was written.

Orbax restores a flipped bit in its data files silently; these catch it. Two sums of an array's
bit patterns, weighted by position, mod 2^32: any change of one element changes both, whatever it
is, and other accidents pass with a chance of about 2^-64. They are no defence against somebody who
wants two arrays to agree: compare hashes of the files for that.
"""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepzoo.zoo.errors import CheckpointError

_GOLDEN = 0x9E3779B1
_OTHER = 0x85EBCA6B
_SMALL = 1 << 22  # elements; compiling costs more than adding up


def fingerprint(tree: Any) -> dict[str, str]:
    """16 hex digits for every array of a tree, by path ("moe/mlp/gate/weight").

    The same for every sharding of an array: positions are global, and the sums over devices are two
    scalars. Nothing is gathered or copied.
    """
    return {name: leaf_fingerprint(leaf) for name, leaf in named(tree).items()}


def digest(tree: Any) -> str:
    """32 hex digits for all of a tree, such as a model's parameters."""
    text = json.dumps(fingerprint(tree), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def leaf_fingerprint(leaf: Any) -> str:
    """The fingerprint of one array (jax or numpy)."""
    if (local := on_host(leaf)) is not None and local.size <= _SMALL:
        first, second = _host_sums(local)
    else:
        first, second = _sums(jnp.asarray(leaf))
    return f"{int(first):08x}{int(second):08x}"


def all_finite(leaf: Any) -> bool:
    """Whether an array (jax or numpy) has neither NaN nor infinity; true for integers."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return True
    if (local := on_host(leaf)) is not None and local.size <= _SMALL:
        return bool(np.isfinite(local).all())
    return bool(_all_finite(jnp.asarray(leaf)))


def on_host(leaf: Any) -> np.ndarray | None:
    """The array's memory without a copy, or None where it is on an accelerator or divided."""
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    devices = leaf.devices()
    if len(devices) == 1 and next(iter(devices)).platform == "cpu":
        return np.asarray(leaf)
    return None


def named(tree: Any) -> dict[str, Any]:
    """Leaves of any tree by path, such as "opt_state/0/mu/embed_tokens/weight".

    Raises:
        CheckpointError: two leaves have one name, or a key contains a slash.
    """
    found: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        keys = [jax.tree_util.keystr((k,), simple=True) for k in path] or ["value"]
        if any(not k or "/" in k for k in keys):
            raise CheckpointError(f"the key {'/'.join(keys)!r} of a tree is empty or has a slash")
        name = "/".join(keys)
        if name in found:
            raise CheckpointError(f"two leaves of a tree are called {name!r}")
        found[name] = leaf
    return found


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def _host_sums(x: np.ndarray) -> tuple[int, int]:
    """What `_sums` computes, without compiling a program for every shape."""
    bits = _host_bits(x)
    position = np.arange(bits.size, dtype=np.uint32)
    first = np.sum(bits * (position * np.uint32(2) + np.uint32(1)), dtype=np.uint32)
    mixed = position * np.uint32(_GOLDEN)
    mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(_OTHER)
    turned = (bits << np.uint32(16)) | (bits >> np.uint32(16))
    return int(first), int(np.sum(turned * (mixed | np.uint32(1)), dtype=np.uint32))


def _host_bits(x: np.ndarray) -> np.ndarray:
    if x.dtype.itemsize > 4:
        # As jax would see it: without 64-bit mode it has no such arrays.
        return _host_bits(np.asarray(jnp.asarray(x)))
    flat = np.ascontiguousarray(x).reshape(-1)
    return flat.view(f"u{x.dtype.itemsize}").astype(np.uint32)


@jax.jit
def _sums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    bits = _bits(x)
    position = jnp.zeros(x.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(x.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        position += along * jnp.uint32(stride & 0xFFFFFFFF)
        stride *= x.shape[axis]
    # Odd weights: a changed element changes the product by something that is not 0 mod 2^32. The
    # second sum turns the bits around, because the first cannot see x and -x change places.
    one = jnp.uint32(1)
    first = bits * (position * 2 + one)
    mixed = position * jnp.uint32(_GOLDEN)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(_OTHER)
    second = ((bits << 16) | (bits >> 16)) * (mixed | one)
    return jnp.sum(first, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32)


def _bits(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}.get(x.dtype.itemsize)
    if unsigned is None:
        raise CheckpointError(f"no fingerprint for {x.dtype}: only types up to 32 bits are used")
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
