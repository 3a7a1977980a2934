"""Floating-point operations of training, from a config; what a device can do at most."""

import jax
import jax.numpy as jnp
import numpy as np

from deepzoo.zoo.config import Config
from deepzoo.zoo.count import count
from deepzoo.zoo.model import segment_starts

# Dense bfloat16 operations per second from the makers' data sheets, by a part of jax's device_kind.
_PEAK = {
    "B200": 2250e12, "H200": 989e12, "H100": 989e12, "H800": 989e12, "H20": 148e12,
    "A100": 312e12, "A800": 312e12, "L40S": 362e12, "A6000": 155e12, "RTX 4090": 165e12,
    "RTX 3090": 71e12, "L4": 121e12,
}  # fmt: skip


def flops_per_token(config: Config, length: int, *, mtp: bool = False) -> float:
    """Operations of the model for one token of training, forward and backward.

    6 for every parameter that a token is multiplied with (2 forward, 4 backward), and those of
    causal attention over half of `length` positions on average. Recomputed layers do not count:
    this is what model-FLOPs utilisation (arXiv 2204.02311, appendix B) is measured by.

    Args:
        config: the model.
        length: tokens of a row.
        mtp: the multi-token-prediction layers are trained, too.
    """
    sizes = count(config)
    multiplied = sizes.active_without_embedding
    layers = config.num_hidden_layers
    if mtp:
        multiplied += sizes.mtp_active - config.vocab_size * config.hidden_size
        layers += config.num_nextn_predict_layers
    width = config.head_size + (config.v_head_dim if config.is_mla else config.head_size)
    attention = layers * config.num_attention_heads * width * length / 2
    return 6.0 * (multiplied + attention)


def flops_of_rows(config: Config, lengths: np.ndarray) -> float:
    """`flops_per_token` of all tokens of rows of unequal `lengths`, int [N]."""
    multiplied = flops_per_token(config, 0)
    attention = flops_per_token(config, 1) - multiplied
    lengths = lengths.astype(np.float64)
    return float((lengths * (multiplied + attention * lengths)).sum())


def counted(config: Config, segments: jax.Array, *, mtp: bool = False) -> dict[str, jax.Array]:
    """Tokens of a batch and the operations of training on them, as metrics of a loss.

    `flops_per_token`, with attention to what a token sees: its segment from the beginning on.

    Args:
        config: the model.
        segments: int32 [B, T]; below 0 is padding, which does not count.
        mtp: see `flops_per_token`.

    Returns:
        Sums "tokens" int32 [] and "flops" float32 [].
    """
    multiplied = flops_per_token(config, 0, mtp=mtp)
    attention = 2 * (flops_per_token(config, 1, mtp=mtp) - multiplied)  # of one token that is seen
    seen = jnp.arange(segments.shape[1]) - segment_starts(segments) + 0.5
    flops = jnp.where(segments >= 0, multiplied + attention * seen, 0.0)
    return {"tokens": (segments >= 0).sum(dtype=jnp.int32), "flops": flops.sum()}


def peak_flops() -> float | None:
    """Dense bfloat16 operations per second of one device, None where it is not known (a CPU)."""
    kind = jax.devices()[0].device_kind
    return next((peak for name, peak in _PEAK.items() if name in kind), None)
