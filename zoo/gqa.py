"""Grouped-query attention of the dense students: Qwen2 (biases), Qwen3 (head norms), Llama
(neither).

B batch  T query  S cache capacity  H query heads  G key/value heads  D head size
"""

import jax
import jax.numpy as jnp
from flax import nnx

from deepzoo.kernels.gqa_attention import gqa_attention, gqa_decode
from deepzoo.zoo.config import Config
from deepzoo.zoo.layers import Linear, RMSNorm
from deepzoo.zoo.mla import Context, write
from deepzoo.zoo.rope import rotate


class GQA(nnx.Module):
    """Grouped-query attention with half-split rope."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        hidden, size = config.hidden_size, config.head_size
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        self.config = config
        self.q_proj = Linear(
            config, rngs, heads * size, hidden, ("heads", "embed"), bias=config.qkv_bias
        )
        self.k_proj = Linear(
            config, rngs, groups * size, hidden, ("kv_heads", "embed"), bias=config.qkv_bias
        )
        self.v_proj = Linear(
            config, rngs, groups * size, hidden, ("kv_heads", "embed"), bias=config.qkv_bias
        )
        self.o_proj = Linear(config, rngs, hidden, heads * size, ("embed", "heads"))
        if config.qk_norm:
            self.q_norm = RMSNorm(config, rngs, size)
            self.k_norm = RMSNorm(config, rngs, size)

    def __call__(
        self, x: jax.Array, context: Context, cache: dict | None
    ) -> tuple[jax.Array, dict | None]:
        """x [B, T, hidden] -> [B, T, hidden], and the cache with the new keys and values
        written."""
        config = self.config
        batch, queries, _ = x.shape

        def heads(a: jax.Array) -> jax.Array:
            return a.reshape(batch, queries, -1, config.head_size)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = context.cos[:, :, None], context.sin[:, :, None]
        q, k = rotate(q, cos, sin, interleaved=False), rotate(k, cos, sin, interleaved=False)
        if cache is None:
            out = gqa_attention(q, k, v, scale=config.softmax_scale, segments=context.segments)
        else:
            cache = write(cache, {"key": k, "value": v}, context.start)
            lengths = context.start[:, None] + 1 + jnp.arange(queries)
            out = gqa_decode(q, cache["key"], cache["value"], lengths, scale=config.softmax_scale)
        return self.o_proj(out.reshape(batch, queries, -1)), cache
