"""How a cache is cut among the blocks of a GPU, and how the parts become one result.

A sequence's entries are cut into `splits` runs of whole key blocks, which different thread blocks
attend to at the same time; the parts are put together by their log-sum-exps. The number is chosen
from static shapes alone (batch, rows, capacity, multiprocessors), so that lengths may change from
step to step without a new program; the runs themselves follow each sequence's own length, so a
short sequence is cut into as many, shorter ones.
B batch  Z splits  R rows (T queries x H heads)  C latent
"""

import jax
import jax.numpy as jnp

from deepzoo.kernels.dispatch import compute_capability

# Multiprocessors by compute capability, where the device does not say (jax.core AbstractDevice).
_MULTIPROCESSORS = {(8, 0): 108, (9, 0): 132, (10, 0): 148}


def multiprocessors() -> int:
    """Of the GPU this program is traced for; an H200's where none is known."""
    device = jax.config.jax_default_device
    if device is None and jax.default_backend() == "gpu":
        device = jax.devices()[0]
    known = _MULTIPROCESSORS.get(compute_capability() or (9, 0), 132)
    return int(getattr(device, "core_count", known))


def choose_splits(programs: int, blocks: int, slots: int, overhead: int) -> int:
    """The number of parts that finishes first if every sequence fills its capacity.

    Thread blocks run in waves of `slots`; one takes its share of key blocks plus `overhead`, which
    stands for loading the queries, filling the pipeline, and writing and reading a partial result.

    Args:
        programs: thread blocks without a split, B * ceil(R / rows of a tile).
        blocks: key blocks of a full cache.
        slots: thread blocks that run at the same time on the whole GPU.
        overhead: in units of one key block's time.
    """

    def cost(splits: int) -> int:
        return -(-programs * splits // slots) * (-(-blocks // splits) + overhead)

    return min(range(1, max(1, min(blocks, slots)) + 1), key=cost)


def combine(out: jax.Array, lse: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Parts float32 [B, Z, R, C] and [B, Z, R] -> `dtype` [B, R, C] and float32 [B, R].

    A part that saw nothing holds 0 and -inf; so does the result where all did. XLA makes three to
    five small kernels of it; `triton.combine` is the same in one.
    """
    top = lse.max(axis=1, keepdims=True)
    weight = jnp.exp(lse - jnp.where(jnp.isneginf(top), 0.0, top))
    total = weight.sum(axis=1)
    safe = jnp.where(total > 0, total, 1.0)
    mixed = (out * weight[..., None]).sum(axis=1) / safe[..., None]
    return mixed.astype(dtype), jnp.where(total > 0, jnp.log(safe) + top[:, 0], -jnp.inf)
