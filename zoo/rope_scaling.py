"""Frequencies of rotary embedding: plain, YaRN (arXiv 2309.00071), Llama 3.1; without jax.

R rotated width
"""

import dataclasses
import math
from typing import Any

import numpy as np

from deepzoo.zoo.errors import ConfigError

_KEYS = {
    "yarn": {
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "attn_factor", "attention_factor",
    },
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """`rope_scaling` of a config.json: YaRN (both MLA families, the Qwen3 student) or Llama 3.1's
    rule.

    Raises:
        ConfigError: a value out of range, or one that the rule does not have.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attn_factor: float | None = None
    attention_factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    type_key: str = "rope_type"
    """The key the file used for the rule's name: `type` in the MLA families, `rope_type` in newer
    files."""

    def __post_init__(self) -> None:
        if self.rope_type not in _KEYS:
            raise ConfigError(
                f"rope_scaling: rule {self.rope_type!r} is not one of {', '.join(_KEYS)}"
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("rope_type", "type_key") or value is None:
                continue
            if field.name not in _KEYS[self.rope_type]:
                raise ConfigError(
                    f"rope_scaling.{field.name} does not belong to the rule {self.rope_type!r}"
                )
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not 0 < value < math.inf
            ):
                raise ConfigError(
                    f"rope_scaling.{field.name} is {value!r}; expected a positive finite number"
                )
        if self.rope_type == "llama3" and (
            self.low_freq_factor is None or self.high_freq_factor is None
        ):
            raise ConfigError(
                "rope_scaling of type 'llama3' needs low_freq_factor and high_freq_factor"
            )

    def softmax_mscale(self) -> float:
        """Factor that latent attention puts, squared, on the softmax scale: 0.1 * mscale_all_dim *
        ln(factor) + 1."""
        return yarn_mscale(self.factor, self.mscale_all_dim) if self.mscale_all_dim else 1.0

    def cos_sin_factor(self) -> float:
        """Factor on cos and sin.

        With mscale and mscale_all_dim (MLA families) their ratio, which is 1 in every release.
        Otherwise YaRN's 0.1 ln(factor) + 1 unless `attention_factor` replaces it, times
        `attn_factor` where the file has one: the 0528 Qwen3 student carries 1 / (0.1 ln 4 + 1)
        there, so its product is 1.
        """
        if self.rope_type != "yarn":
            return 1.0
        if self.mscale and self.mscale_all_dim:
            base = yarn_mscale(self.factor, self.mscale) / yarn_mscale(
                self.factor, self.mscale_all_dim
            )
        else:
            base = yarn_mscale(self.factor, 1.0)
        if self.attention_factor is not None:
            base = self.attention_factor
        return base * (self.attn_factor if self.attn_factor is not None else 1.0)

    @classmethod
    def pop_from(cls, hf: dict[str, Any]) -> dict[str, Any]:
        """Takes the rope keys out of `hf`: `rope_theta` + `rope_scaling` (published) or
        `rope_parameters` (newer)."""
        values: dict[str, Any] = {}
        if "rope_theta" in hf:
            values["rope_theta"] = hf.pop("rope_theta")
        scaling = hf.pop("rope_scaling", None)
        if (parameters := hf.pop("rope_parameters", None)) is not None:
            if scaling is not None:
                raise ConfigError(
                    "config.json has both rope_scaling and rope_parameters; keep one of them"
                )
            if not isinstance(parameters, dict):
                raise ConfigError(f"rope_parameters is {parameters!r}; expected an object")
            scaling = dict(parameters)
            values["rope_theta"] = scaling.pop("rope_theta", values.get("rope_theta", 10000.0))
            if scaling.get("rope_type") == "default":
                scaling = {
                    k: v for k, v in scaling.items() if k not in ("rope_type", "type")
                } or None
        if scaling is None:
            return values
        if not isinstance(scaling, dict):
            raise ConfigError(f"rope_scaling is {scaling!r}; expected an object")
        scaling = dict(scaling)
        names = {k: scaling.pop(k) for k in ("type", "rope_type") if k in scaling}
        rule = next(iter(names.values()), None)
        if any(name != rule for name in names.values()) or rule not in list(_KEYS):
            raise ConfigError(
                f"rope_scaling names its rule as {names or 'nothing'};"
                f" expected one of {', '.join(_KEYS)}"
            )
        for key in ("factor", "original_max_position_embeddings"):
            if scaling.get(key) is None:
                raise ConfigError(f"rope_scaling of type {rule!r} lacks {key}")
        if unknown := [k for k in scaling if k not in _KEYS[rule]]:
            raise ConfigError(f"unknown key 'rope_scaling.{unknown[0]}' for the rule {rule!r}")
        type_key = "type" if list(names) == ["type"] else "rope_type"
        return values | {"rope_scaling": cls(rope_type=rule, type_key=type_key, **scaling)}

    def to_hf(self) -> dict[str, Any]:
        """The `rope_scaling` object as published."""
        skip = ("rope_type", "type_key")
        values = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in skip
        }
        return {self.type_key: self.rope_type} | {k: v for k, v in values.items() if v is not None}


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature, 0.1 * mscale * ln(factor) + 1, or 1 without extension."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def inverse_frequencies(width: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Angular frequency of each rotated pair, float32 [width / 2].

    Args:
        width: rotated dimensions of a head.
        theta: `rope_theta`.
        scaling: None, YaRN (interpolate the slow pairs, keep the fast ones, ramp between) or Llama
            3.1's rule.
    """
    frequency = theta ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    if scaling is None:
        return frequency.astype(np.float32)
    length = scaling.original_max_position_embeddings
    if scaling.rope_type == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        assert low is not None and high is not None
        rotations = length * frequency / (2 * math.pi)
        ramp = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    else:
        fast, slow = scaling.beta_fast or 32.0, scaling.beta_slow or 1.0

        def pair(rotations: float) -> float:
            return width * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        first = max(math.floor(pair(fast)), 0)
        last = min(math.ceil(pair(slow)), width - 1)
        span = max(last - first, 0.001)
        ramp = 1.0 - np.clip((np.arange(width // 2, dtype=np.float64) - first) / span, 0.0, 1.0)
    return (frequency * ramp + frequency / scaling.factor * (1.0 - ramp)).astype(np.float32)
