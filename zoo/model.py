"""The decoder of all families, its MTP module, and the pure functions over plain parameter dicts.

B batch  T token  D model  V vocabulary  L layers of a stack  E experts  K chosen  S cache capacity
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepzoo.kernels.router import Routing
from deepzoo.zoo.cache import Cache
from deepzoo.zoo.config import Config
from deepzoo.zoo.gqa import GQA
from deepzoo.zoo.layers import MLP, Embedding, Linear, RMSNorm, matmul, stack
from deepzoo.zoo.mla import MLA, Context
from deepzoo.zoo.moe import MoE
from deepzoo.zoo.rope import cos_sin

Params = dict[str, Any]
STACKS = ("dense", "moe")
_POLICIES = {"full": "nothing_saveable", "dots": "dots_with_no_batch_dims_saveable"}


class Output(NamedTuple):
    """Result of a forward pass.

    Attributes:
        logits: float32 [B, T, V].
        cache: the cache with this pass's tokens, or None where none was given.
        routing: Routing with a leading axis of the expert layers, [L, B, T, ...]; None for the
            students.
        hidden: [B, T, D] after the final norm; what the head and the MTP module read.
    """

    logits: jax.Array
    cache: Cache | None
    routing: Routing | None
    hidden: jax.Array


class Block(nnx.Module):
    """Pre-norm attention and feed-forward, dense or with experts."""

    def __init__(self, config: Config, rngs: nnx.Rngs, *, moe: bool):
        self.input_layernorm = RMSNorm(config, rngs, config.hidden_size, "embed")
        self.self_attn = (MLA if config.is_mla else GQA)(config, rngs)
        self.post_attention_layernorm = RMSNorm(config, rngs, config.hidden_size, "embed")
        self.mlp = MoE(config, rngs) if moe else MLP(config, rngs, config.intermediate_size)

    def __call__(self, x: jax.Array, context: Context, cache: dict | None, experts=None):
        """x [B, T, D] -> (x, cache, routing or None); `experts` [B, T, K] replace the router's."""
        attended, cache = self.self_attn(self.input_layernorm(x), context, cache)
        x = x + attended
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            y, routing = self.mlp(normed, experts)
        else:
            y, routing = self.mlp(normed), None
        return x + y, cache, routing


class MTP(nnx.Module):
    """Multi-token prediction depth (V3 report, arXiv 2412.19437, 2.2, eq. 21-23); embedding and
    head are the model's."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        width = config.hidden_size
        self.enorm = RMSNorm(config, rngs, width, "embed")
        self.hnorm = RMSNorm(config, rngs, width, "embed")
        self.eh_proj = Linear(config, rngs, width, 2 * width, ("embed", None), quantized=False)
        self.block = Block(config, rngs, moe=True)
        self.norm = RMSNorm(config, rngs, width, "embed")

    def __call__(
        self, hidden: jax.Array, embedded: jax.Array, context: Context, cache: dict | None
    ):
        """hidden [B, T, D] of tokens i and embeddings [B, T, D] of tokens i+1 -> (hidden, cache,
        routing)."""
        both = jnp.concatenate([self.enorm(embedded), self.hnorm(hidden)], axis=-1)
        x, cache, routing = self.block(self.eh_proj(both), context, cache)
        return self.norm(x), cache, routing


class Decoder(nnx.Module):
    """Embedding, dense layers, expert layers, final norm, head, MTP depths."""

    def __init__(self, config: Config, rngs: nnx.Rngs, *, stacked: bool = True):
        self.config = config
        self.stacked = stacked
        self.embed_tokens = Embedding(config, rngs)
        counts = {"dense": config.num_dense_layers, "moe": config.num_moe_layers}
        for name, count in counts.items():
            if count:
                make = functools.partial(_make_block, config, name == "moe")
                setattr(self, name, stack(count, make, rngs, stacked=stacked))
        self.norm = RMSNorm(config, rngs, config.hidden_size, "embed")
        if not config.tie_word_embeddings:
            self.lm_head = Embedding(config, rngs)
        if config.num_nextn_predict_layers:
            make = functools.partial(MTP, config)
            self.mtp = stack(config.num_nextn_predict_layers, make, rngs, stacked=stacked)

    def __call__(
        self,
        tokens: jax.Array,
        cache: Cache | None = None,
        lengths: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        *,
        experts: jax.Array | None = None,
        remat: bool | str = False,
        logits: bool = True,
    ) -> Output:
        """See `apply`."""
        context = self.context(tokens, cache, segment_ids, positions)
        x = self.embed_tokens(tokens)
        layers, routing = {}, None
        for name in STACKS:
            if hasattr(self, name):
                old = None if cache is None else cache.layers[name]
                x, layers[name], found = self._run(
                    getattr(self, name), x, context, old, remat, experts if name == "moe" else None
                )
                routing = found if found is not None else routing
        hidden = self.norm(x)
        if cache is not None:
            added = jnp.full_like(cache.lengths, tokens.shape[1]) if lengths is None else lengths
            layers |= {name: value for name, value in cache.layers.items() if name not in layers}
            cache = Cache(layers, cache.lengths + added.astype(jnp.int32))
        return Output(self.logits(hidden) if logits else hidden, cache, routing, hidden)

    def context(self, tokens, cache, segment_ids, positions) -> Context:
        """Positions, rotation angles and segments of a pass."""
        batch, length = tokens.shape
        start = jnp.zeros((batch,), jnp.int32) if cache is None else cache.lengths
        if positions is None:
            positions = start[:, None] + jnp.arange(length, dtype=jnp.int32)
            if segment_ids is not None:
                positions = positions - segment_starts(segment_ids)
        config = self.config
        width = config.qk_rope_head_dim if config.is_mla else config.head_size
        cos, sin = cos_sin(positions, width, config.rope_theta, config.rope_scaling)
        return Context(cos, sin, segment_ids, start)

    def _run(self, layers, x, context, cache, remat, experts):
        """All layers of one stack: scanned where their parameters are stacked, unrolled where they
        are not."""

        def step(x, layer_and_more):
            layer, cache, experts = layer_and_more
            x, cache, routing = layer(x, context, cache, experts)
            return x, (cache, routing)

        step = recomputed(step, remat)
        if self.stacked:
            x, (cache, routing) = jax.lax.scan(step, x, (layers, cache, experts))
            return x, cache, routing
        new, found = {}, []
        for i in range(len(layers)):
            name = str(i)
            old = None if cache is None else cache[name]
            given = None if experts is None else experts[i]
            x, (new[name], routing) = step(x, (layers[name], old, given))
            found.append(routing)
        routing = None if found[0] is None else jax.tree.map(lambda *a: jnp.stack(a), *found)
        return x, (None if cache is None else new), routing

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [B, T, D] -> float32 [B, T, V]."""
        return matmul(hidden, self.head()).astype(jnp.float32)

    def head(self) -> jax.Array:
        """Output head [V, D]."""
        return (self.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight[...]

    def predict_next(
        self,
        hidden: jax.Array,
        next_tokens: jax.Array,
        cache: Cache | None = None,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        *,
        depth: int = 0,
        logits: bool = True,
    ) -> Output:
        """See `apply_mtp`."""
        context = self.context(next_tokens, cache, segment_ids, positions)
        index = str(depth)
        if self.stacked:
            layer = jax.tree.map(lambda a: a[depth], self.mtp)
            old = None if cache is None else jax.tree.map(lambda a: a[depth], cache.layers["mtp"])
        else:
            layer = self.mtp[index]
            old = None if cache is None else cache.layers["mtp"][index]
        hidden, new, routing = layer(hidden, self.embed_tokens(next_tokens), context, old)
        if cache is not None:
            assert new is not None
            if self.stacked:
                kept = jax.tree.map(lambda a, b: a.at[depth].set(b), cache.layers["mtp"], new)
            else:
                kept = cache.layers["mtp"] | {index: new}
            cache = cache._replace(layers=cache.layers | {"mtp": kept})
        return Output(self.logits(hidden) if logits else hidden, cache, routing, hidden)


def recomputed(layer: Callable, remat: bool | str) -> Callable:
    """`layer` with the rematerialisation of `apply`.

    Raises:
        ValueError: there is no policy of that name.
    """
    if remat in (False, "none"):
        return layer
    name = "full" if remat is True else remat
    policy = getattr(jax.checkpoint_policies, _POLICIES.get(name, name), None)
    if policy is None:
        raise ValueError(
            f"remat {remat!r}: expected none, full, dots, or a name in jax.checkpoint_policies"
        )
    return jax.checkpoint(layer, policy=policy)


def _make_block(config: Config, moe: bool, rngs: nnx.Rngs) -> Block:
    return Block(config, rngs, moe=moe)


def segment_starts(segment_ids: jax.Array) -> jax.Array:
    """Index of the first token of each token's segment, int32 [B, T]."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    first = jnp.pad(
        segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True
    )
    return jax.lax.cummax(jnp.where(first, index, 0), axis=1)
