"""What every family is built of: parameters with logical axes, linear maps (float or block FP8),
RMSNorm, SwiGLU.

Modules are definitions only: attributes are set in `__init__` and never again; parameters live
    outside, in plain dicts.
Weights keep the published orientation, [outputs, inputs], so that loading copies and never
transposes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepzoo.kernels import block_fp8
from deepzoo.zoo.config import Config

Axes = tuple[str | None, ...]


def param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, dtype: Any, std: float | None = None
) -> nnx.Param:
    """The only place a parameter is made; `axes` is plain metadata, so no mesh is needed.

    Args:
        rngs: source of the key.
        shape: shape of one layer's parameter; stacking adds a leading axis that `axes` does not
            name.
        axes: logical name of each dimension.
        dtype: stored dtype.
        std: standard deviation of a normal; None for ones, 0 for zeros.
    """
    if std is None:
        value = jnp.ones(shape, dtype)
    elif std == 0:
        value = jnp.zeros(shape, dtype)
    else:
        value = (jax.random.normal(rngs.params(), shape, jnp.float32) * std).astype(dtype)
    return nnx.Param(value, axes=axes)


class Linear(nnx.Module):
    """y = x W^T (+ b); W is [..., outputs, inputs], float or float8_e4m3fn with
    `weight_scale_inv`.

    `functional.bind` adds `lora_a` [..., r, inputs] and `lora_b` [..., outputs, r] where the
    parameters have them: y += x A^T B^T (arXiv 2106.09685, eq. 3), W whatever it is.
    """

    lora_a: nnx.Param
    lora_b: nnx.Param

    def __init__(
        self,
        config: Config,
        rngs: nnx.Rngs,
        outputs: int,
        inputs: int,
        axes: Axes,
        *,
        groups: int | None = None,
        bias: bool = False,
        quantized: bool = True,
    ):
        leading = () if groups is None else (groups,)
        axes = axes if groups is None else ("expert", *axes)
        shape = (*leading, outputs, inputs)
        self.quantized = config.quantization_config is not None and quantized
        self.has_bias = bias
        if config.quantization_config is not None and quantized:
            made = param(rngs, shape, axes, jnp.float32, config.initializer_range)
            ue8m0 = config.quantization_config.scale_fmt == "ue8m0"
            values, scales = block_fp8.quantize(made[...], ue8m0=ue8m0)
            self.weight = nnx.Param(values, axes=axes)
            self.weight_scale_inv = nnx.Param(scales, axes=axes)
        else:
            self.weight = param(rngs, shape, axes, config.dtype, config.initializer_range)
        if bias:
            self.bias = param(rngs, (outputs,), (axes[-2],), config.dtype, 0)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., inputs] -> [..., outputs] in x's dtype, accumulated in float32."""
        if self.quantized:
            y = block_fp8.matmul(x, self.weight[...], self.weight_scale_inv[...])
        else:
            y = matmul(x, self.weight[...])
        if self.adapted:
            y = y + matmul(matmul(x, self.lora_a[...]), self.lora_b[...])
        return y + self.bias[...].astype(y.dtype) if self.has_bias else y

    @property
    def adapted(self) -> bool:
        """Whether it has a low-rank adapter."""
        return hasattr(self, "lora_a")

    def dense(self, dtype: Any) -> jax.Array:
        """The weight as one float array, dequantised where it is FP8 (kv_b_proj, which absorption
        takes apart), the adapter's product added."""
        if self.quantized:
            weight = block_fp8.dequantize(self.weight[...], self.weight_scale_inv[...], dtype)
        else:
            weight = self.weight[...].astype(dtype)
        if self.adapted:
            weight = weight + (self.lora_b[...] @ self.lora_a[...]).astype(dtype)
        return weight


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., K] times w [N, K] transposed, float32 accumulation, in x's dtype."""
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(
        x, w.astype(x.dtype), contract, preferred_element_type=jnp.float32
    ).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight, statistics in float32 (arXiv 1910.07467)."""

    def __init__(
        self,
        config: Config,
        rngs: nnx.Rngs,
        width: int,
        axis: str | None = None,
        eps: float | None = None,
    ):
        self.weight = param(rngs, (width,), (axis,), config.norm_dtype or config.dtype)
        self.eps = config.rms_norm_eps if eps is None else eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., width] -> the same shape and dtype."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * self.weight[...].astype(x.dtype)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: Config, rngs: nnx.Rngs, width: int):
        hidden = config.hidden_size
        self.gate_proj = Linear(config, rngs, width, hidden, ("ffn", "embed"))
        self.up_proj = Linear(config, rngs, width, hidden, ("ffn", "embed"))
        self.down_proj = Linear(config, rngs, hidden, width, ("embed", "ffn"))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> [..., D]."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Embedding(nnx.Module):
    """Token table [V, D]; also the head where it is tied."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        self.weight = param(rngs, shape, ("vocab", "embed"), config.dtype, config.initializer_range)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32 [B, T] -> [B, T, D]."""
        return self.weight[...][tokens]


def stack[M: nnx.Module](
    count: int, make: Callable[[nnx.Rngs], M], rngs: nnx.Rngs, *, stacked: bool
) -> Any:
    """`count` layers made by `make`: one module whose parameters have a leading layer axis, or one
    module a layer."""
    keys = jax.random.split(rngs.params(), count)
    if stacked:
        return jax.vmap(lambda key: make(nnx.Rngs(params=key)))(keys)
    return nnx.Dict({str(i): make(nnx.Rngs(params=keys[i])) for i in range(count)})
