"""Multi-head latent attention (V2 report, arXiv 2405.04434, 2.1): one small latent a token instead
of keys and values.

Prefill expands the latents of the new tokens to heads, which is the form that computes least;
decode folds the up-projections into the query and the output and reads the latents as they are. A
chunk that continues a cache takes both, the new tokens expanded and the history absorbed, merged by
their log-sum-exps.
B batch  T query  S cache capacity  H heads  N nope  R rope  V value  C latent (kv_lora_rank)  D
model
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepzoo.kernels.mla_decode import mla_decode
from deepzoo.kernels.mla_prefill import merge, mla_prefill
from deepzoo.zoo.config import Config
from deepzoo.zoo.layers import Linear, RMSNorm
from deepzoo.zoo.rope import rotate

# Up to this many new tokens the absorbed form alone is cheaper than expanding (decode and
# speculative checks).
ABSORBED_QUERIES = 8
# The makers' code fixes the eps of the two latent norms, whatever rms_norm_eps is; it shows for
# Moonlight (1e-5).
LATENT_EPS = 1e-6


class Context(NamedTuple):
    """What attention needs beside the hidden states; shared by all layers of a pass.

    cos, sin: float32 [B, T, R/2].
    segments: int32 [B, T] or None; tokens see only their own segment (without a cache).
    start: int32 [B], tokens each row's cache holds before this pass.
    """

    cos: jax.Array
    sin: jax.Array
    segments: jax.Array | None
    start: jax.Array


class MLA(nnx.Module):
    """Latent attention with or without query compression."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        heads, hidden, latent = config.num_attention_heads, config.hidden_size, config.kv_lora_rank
        self.config = config
        if config.q_lora_rank is None:
            self.q_proj = Linear(config, rngs, heads * config.head_size, hidden, ("heads", "embed"))
        else:
            self.q_a_proj = Linear(config, rngs, config.q_lora_rank, hidden, ("q_lora", "embed"))
            self.q_a_layernorm = RMSNorm(config, rngs, config.q_lora_rank, "q_lora", LATENT_EPS)
            self.q_b_proj = Linear(
                config, rngs, heads * config.head_size, config.q_lora_rank, ("heads", "q_lora")
            )
        rows = latent + config.qk_rope_head_dim
        self.kv_a_proj_with_mqa = Linear(config, rngs, rows, hidden, (None, "embed"))
        self.kv_a_layernorm = RMSNorm(config, rngs, latent, None, LATENT_EPS)
        rows = heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = Linear(config, rngs, rows, latent, ("heads", None))
        self.o_proj = Linear(config, rngs, hidden, heads * config.v_head_dim, ("embed", "heads"))

    def __call__(
        self, x: jax.Array, context: Context, cache: dict | None
    ) -> tuple[jax.Array, dict | None]:
        """x [B, T, D] -> [B, T, D], and the cache with the new latents written behind
        `context.start`."""
        config = self.config
        batch, queries, _ = x.shape
        if config.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.reshape(batch, queries, config.num_attention_heads, config.head_size)
        q_nope, q_rope = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
        cos, sin = context.cos[:, :, None], context.sin[:, :, None]
        q_rope = rotate(q_rope, cos, sin, interleaved=True)
        latent, k_rope = jnp.split(self.kv_a_proj_with_mqa(x), [config.kv_lora_rank], axis=-1)
        latent = self.kv_a_layernorm(latent)
        k_rope = rotate(k_rope, context.cos, context.sin, interleaved=True)
        up = self.kv_b_proj.dense(x.dtype).reshape(
            config.num_attention_heads, -1, config.kv_lora_rank
        )
        key_up, value_up = jnp.split(up, [config.qk_nope_head_dim], axis=1)
        scale = config.softmax_scale

        def absorbed(cache: dict, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
            q_latent = jnp.einsum("bthn,hnc->bthc", q_nope, key_up)
            mixed, lse = mla_decode(
                q_latent, q_rope, cache["latent"], cache["k_rope"], lengths, scale=scale
            )
            return jnp.einsum("bthc,hvc->bthv", mixed, value_up), lse

        if cache is not None and queries <= ABSORBED_QUERIES:
            cache = write(cache, {"latent": latent, "k_rope": k_rope}, context.start)
            out, _ = absorbed(cache, context.start[:, None] + 1 + jnp.arange(queries))
        else:
            keys = jnp.einsum("bsc,hnc->bshn", latent, key_up)
            values = jnp.einsum("bsc,hvc->bshv", latent, value_up)
            segments = context.segments
            out, lse = mla_prefill(
                q_nope,
                q_rope,
                keys,
                k_rope,
                values,
                scale=scale,
                q_segments=segments,
                k_segments=segments,
            )
            if cache is not None:
                old, alone = cache, out

                def with_history() -> jax.Array:
                    seen = jnp.broadcast_to(context.start[:, None], (batch, queries))
                    return merge(alone, lse, *absorbed(old, seen))[0]

                # A first chunk has none; a compiler that knows leaves nothing of it.
                out = jax.lax.cond((context.start > 0).any(), with_history, lambda: alone)
                cache = write(cache, {"latent": latent, "k_rope": k_rope}, context.start)
        return self.o_proj(out.reshape(batch, queries, -1)), cache


def write(cache: dict, new: dict, start: jax.Array) -> dict:
    """Puts `new` arrays [B, T, ...] behind each row's `start` in the cache arrays [B, S, ...].

    Positions past the capacity are dropped: they can only be padding, since the callers check the
        real lengths.
    """
    rows = jnp.arange(start.shape[0])[:, None]
    out = {}
    for name, value in new.items():
        slots = start[:, None] + jnp.arange(value.shape[1])
        out[name] = cache[name].at[rows, slots].set(value.astype(cache[name].dtype), mode="drop")
    return out
