"""Mixture of experts of V2 and V3 (V2 report 2.2, V3 report 2.1.2): shared experts beside routed
ones, dropless.

B batch  T token  M = B*T  D model  F expert width  E experts  K chosen
"""

import jax
import jax.numpy as jnp
from flax import nnx

from deepzoo.kernels import moe_dispatch
from deepzoo.kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from deepzoo.kernels.router import Routing, gate, router
from deepzoo.zoo.config import Config
from deepzoo.zoo.layers import MLP, Linear, param


class Router(nnx.Module):
    """Affinities in float32 from the stored weights, then the family's choice."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        shape = (config.n_routed_experts, config.hidden_size)
        self.weight = param(rngs, shape, (None, "embed"), config.dtype, config.initializer_range)
        if config.router_bias:
            self.e_score_correction_bias = param(
                rngs, (config.n_routed_experts,), (None,), jnp.float32, 0
            )

    def __call__(self, x: jax.Array, indices: jax.Array | None = None) -> Routing:
        """x [M, D] -> routing of M tokens; to experts `indices` [M, K] where they are given."""
        config = self.config
        logits = gate(x, self.weight[...])
        v2 = config.model_type == "deepseek_v2"
        return router(
            logits,
            self.e_score_correction_bias[...] if config.router_bias else None,
            k=config.num_experts_per_tok,
            scoring=config.scoring_func,  # pyright: ignore[reportArgumentType]  (checked by Config)
            groups=config.n_group if config.grouped else 1,
            top_groups=config.topk_group,
            group_score=config.group_score,
            normalise=config.norm_topk_prob,
            # V2's code scales only where it does not normalise; V3's does both.
            scale=1.0 if v2 and config.norm_topk_prob else config.routed_scaling_factor,
            indices=indices,
        )


class Experts(nnx.Module):
    """E SwiGLU networks, applied to rows that are sorted by expert."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        count, width, hidden = (
            config.n_routed_experts,
            config.moe_intermediate_size,
            config.hidden_size,
        )
        self.gate_proj = Linear(config, rngs, width, hidden, ("expert_ffn", "embed"), groups=count)
        self.up_proj = Linear(config, rngs, width, hidden, ("expert_ffn", "embed"), groups=count)
        self.down_proj = Linear(config, rngs, hidden, width, ("embed", "expert_ffn"), groups=count)

    def __call__(self, rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """rows [M*K, D] sorted by expert -> [M*K, D]."""

        def stored(layer: Linear) -> tuple[jax.Array, jax.Array | None]:
            if layer.quantized:
                return layer.weight[...], layer.weight_scale_inv[...]
            return layer.weight[...].astype(rows.dtype), None

        def product(x: jax.Array, layer: Linear) -> jax.Array:
            weight, scale = stored(layer)
            y = grouped_matmul(x, weight, group_sizes, scale)
            if layer.adapted:
                low = grouped_matmul(x, layer.lora_a[...].astype(x.dtype), group_sizes)
                y = y + grouped_matmul(low, layer.lora_b[...].astype(x.dtype), group_sizes)
            return y

        if self.gate_proj.adapted or self.up_proj.adapted:  # the fused product has no room for it
            inner = jax.nn.silu(product(rows, self.gate_proj)) * product(rows, self.up_proj)
        else:
            (gate, gate_scale), (up, up_scale) = stored(self.gate_proj), stored(self.up_proj)
            inner = grouped_swiglu(rows, gate, up, group_sizes, gate_scale, up_scale)
        return product(inner, self.down_proj)


class MoE(nnx.Module):
    """Feed-forward layer with experts."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        self.gate = Router(config, rngs)
        self.experts = Experts(config, rngs)
        if config.n_shared_experts:  # stored as one network of the joint width
            self.shared_experts = MLP(
                config, rngs, config.n_shared_experts * config.moe_intermediate_size
            )

    def __call__(self, x: jax.Array, indices: jax.Array | None = None) -> tuple[jax.Array, Routing]:
        """x [B, T, D] -> [B, T, D] and the routing, [B, T, ...]; `indices` [B, T, K] replace the
        choice of experts."""
        batch, length, width = x.shape
        flat = x.reshape(-1, width)
        given = None if indices is None else indices.reshape(-1, indices.shape[-1])
        routing = self.gate(flat, given)
        rows = moe_dispatch.plan(routing.indices, self.config.n_routed_experts)
        routed = self.experts(moe_dispatch.dispatch(flat, rows), rows.group_sizes)
        out = moe_dispatch.combine(routed, routing.weights, rows)
        if self.config.n_shared_experts:
            out = out + self.shared_experts(flat)
        routing = jax.tree.map(lambda a: a.reshape(batch, length, *a.shape[1:]), routing)
        return out.reshape(x.shape), routing
