"""Our figure of a claim: pure functions from released configs and published numbers.

The numbers are arguments and stand in the ledger beside the claim; a function holds none but those
of its unit. Operations are counted as in recipes/parts/flops.py: one multiplication and addition is
two, forward and backward pass together are three times the forward pass.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from deepzoo.recipes.parts.flops import flops_per_token
from deepzoo.zoo import catalog
from deepzoo.zoo.count import cache_bytes, count
from deepzoo.zoo.errors import ConfigError
from deepzoo.zoo.rope_scaling import RopeScaling


class Figure(NamedTuple):
    """A figure with its 95% interval; what is not measured has no width."""

    value: float
    low: float
    high: float


def exactly(value: float) -> Figure:
    """A figure without an interval."""
    return Figure(value, value, value)


# From a released config alone.


def parameters(*, model: str) -> float:
    """Billions of parameters, without the MTP layer and the scales of FP8 weights."""
    return count(catalog.config(model)).main / 1e9


def active_parameters(*, model: str, embedding: bool = False) -> float:
    """Billions of parameters that one token visits; the input embedding is a look-up."""
    sizes = count(catalog.config(model))
    return (sizes.active if embedding else sizes.active_without_embedding) / 1e9


def stored_numbers(*, model: str) -> float:
    """Billions of numbers in the published files: MTP layer with its copies, and scales, too."""
    return count(catalog.config(model)).elements / 1e9


def mtp_parameters(*, model: str) -> float:
    """Billions of parameters of the MTP layer without its copies of embedding and head."""
    return count(catalog.config(model)).mtp_unique / 1e9


def cache_kilobytes(*, model: str, bits: float = 16) -> float:
    """Thousand bytes of cache that a token takes, over all layers."""
    return cache_bytes(catalog.config(model)).stored / 16 * bits / 1e3


def cache_saving(
    *, model: str, bits: float, layers: int, kv_heads: int, head_size: int, other_bits: float = 16
) -> float:
    """Percent by which a model's cache is smaller than keys and values of another's kv heads.

    Args:
        model: ours.
        bits: of a number in its cache.
        layers: of the other model.
        kv_heads: of the other model, in each layer.
        head_size: of the other model.
        other_bits: of a number in the other's cache.
    """
    other = 2 * layers * kv_heads * head_size * other_bits / 8
    return 100 * (1 - 1e3 * cache_kilobytes(model=model, bits=bits) / other)


def cache_saving_over_own_heads(*, model: str) -> float:
    """Percent by which the latents are smaller than keys and values of all heads would be."""
    sizes = cache_bytes(catalog.config(model))
    return 100 * (1 - sizes.stored / sizes.expanded)


def cache_as_groups(*, model: str) -> float:
    """Groups of grouped-query attention whose keys and values take as much as the latent."""
    config = catalog.config(model)
    if not config.is_mla:
        raise ConfigError(f"{model} has no latent attention")
    return (config.kv_lora_rank + config.qk_rope_head_dim) / (2 * config.v_head_dim)


def _yarn(model: str) -> RopeScaling:
    scaling = catalog.config(model).rope_scaling
    if scaling is None or scaling.rope_type != "yarn":
        raise ConfigError(f"{model} is not extended by YaRN")
    return scaling


def context(*, model: str) -> float:
    """Thousand (1024) tokens that YaRN stretches the trained context to."""
    scaling = _yarn(model)
    return scaling.factor * scaling.original_max_position_embeddings / 1024


def training_gigaflops(*, model: str, length: int) -> float:
    """Billions of operations to train on one token of a row of `length`, causal attention
    included."""
    return flops_per_token(catalog.config(model), length) / 1e9


# From a released config and published numbers.


def utilisation(
    *, model: str, length: int, trillion_tokens: float, thousand_hours: float, teraflops: float
) -> float:
    """Percent of the GPUs' peak that a training reached, from the hours it took.

    Args:
        model: that was trained.
        length: tokens of a row.
        trillion_tokens: trained on.
        thousand_hours: GPU-hours, in thousands.
        teraflops: of one GPU at its peak.
    """
    operations = flops_per_token(catalog.config(model), length) * trillion_tokens * 1e12
    return 100 * operations / (thousand_hours * 1e3 * 3600 * teraflops * 1e12)


def training_days(
    *,
    model: str,
    trillion_tokens: float,
    gpus: int,
    teraflops: float,
    efficiency: float,
    operations: float = 6,
) -> float:
    """Days of a training on other GPUs: operations x active parameters x tokens / speed.

    Args:
        model: that is trained.
        trillion_tokens: trained on.
        gpus: how many.
        teraflops: of one GPU at its peak.
        efficiency: percent of the peak that is reached.
        operations: for each active parameter and token; 6 is a training step.
    """
    active = count(catalog.config(model)).active_without_embedding
    speed = gpus * teraflops * 1e12 * efficiency / 100
    return operations * active * trillion_tokens * 1e12 / speed / 86400


# From published numbers alone.


def total(*, parts: list[float]) -> float:
    """The sum."""
    return math.fsum(parts)


def quotient(*, product: list[float], over: list[float]) -> float:
    """Product of the one list over that of the other."""
    return math.prod(product) / math.prod(over)


def percent_less(*, one: float, other: float) -> float:
    """Percent by which `one` is smaller than `other`."""
    return 100 * (1 - one / other)


# From what was measured of the models that ship with the package, in percent.


def share(*, of: Figure) -> Figure:
    """A share as it is."""
    return of


def gain(*, later: Figure, earlier: Figure) -> Figure:
    """Percentage points from one share to another, with Newcombe's interval of the difference.

    It combines the two shares' own intervals (Newcombe 1998, method 10).
    """
    points = later.value - earlier.value
    down = math.hypot(later.value - later.low, earlier.high - earlier.value)
    up = math.hypot(later.high - later.value, earlier.value - earlier.low)
    return Figure(points, points - down, points + up)


CHECKS: Mapping[str, Callable[..., float | Figure]] = {
    check.__name__: check
    for check in (
        parameters, active_parameters, stored_numbers, mtp_parameters, cache_kilobytes,
        cache_saving, cache_saving_over_own_heads, cache_as_groups, context, training_gigaflops,
        utilisation, training_days, total, quotient, percent_less, share, gain,
    )
}  # fmt: skip
"""By name, for the ledger."""
