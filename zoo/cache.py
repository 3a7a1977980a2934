"""Caches: 512 + 64 numbers per token and layer for latent attention, keys and values for the
students, nothing else.

L layers of a stack  B batch  S capacity  C latent  R rope  G key/value heads  D head size
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepzoo.zoo.config import Config


class Cache(NamedTuple):
    """What the tokens so far have left behind.

    Attributes:
        layers: stack name -> arrays [L, B, S, ...], or stack name -> layer index -> arrays [B, S,
            ...]; "mtp" included.
        lengths: int32 [B], tokens held by each row. Entries behind them are never read, so a row is
            shortened (a rejected draft) or emptied (a finished request) by lowering its number.
    """

    layers: dict[str, Any]
    lengths: jax.Array


def cache(
    config: Config, batch: int, capacity: int, *, dtype: Any = None, stacked: bool = True
) -> Cache:
    """An empty cache.

    Args:
        config: the model.
        batch: rows.
        capacity: tokens a row can hold.
        dtype: `config.dtype` by default.
        stacked: whether the parameters it will be used with are stacked.
    """
    dtype = dtype or config.dtype
    if config.is_mla:
        widths = {"latent": (config.kv_lora_rank,), "k_rope": (config.qk_rope_head_dim,)}
    else:
        widths = {name: (config.num_key_value_heads, config.head_size) for name in ("key", "value")}
    counts = {
        "dense": config.num_dense_layers,
        "moe": config.num_moe_layers,
        "mtp": config.num_nextn_predict_layers,
    }
    layers: dict[str, Any] = {}
    for name, count in counts.items():
        if count and stacked:
            layers[name] = {
                k: jnp.zeros((count, batch, capacity, *w), dtype) for k, w in widths.items()
            }
        elif count:
            layers[name] = {
                str(i): {k: jnp.zeros((batch, capacity, *w), dtype) for k, w in widths.items()}
                for i in range(count)
            }
    return Cache(layers, jnp.zeros((batch,), jnp.int32))
