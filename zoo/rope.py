"""Rotary position embedding (arXiv 2104.09864): cosines and sines of positions, and the rotation.

B batch  T token  R rotated dimensions of a head
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepzoo.zoo.rope_scaling import RopeScaling, inverse_frequencies


def cos_sin(
    positions: Int[Array, "B T"], width: int, theta: float, scaling: RopeScaling | None
) -> tuple[Float[Array, "B T R/2"], Float[Array, "B T R/2"]]:
    """Cosine and sine of every position's angles, float32 [B, T, width / 2], with the rule's factor
    applied."""
    angle = positions[..., None].astype(jnp.float32) * inverse_frequencies(width, theta, scaling)
    factor = scaling.cos_sin_factor() if scaling is not None else 1.0
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(
    x: Float[Array, "*B T R"],
    cos: Float[Array, "*B T R/2"],
    sin: Float[Array, "*B T R/2"],
    *,
    interleaved: bool,
) -> Float[Array, "*B T R"]:
    """Rotates pairs of `x` in float32; the result has the first members of all pairs first, then
    the second.

    Args:
        interleaved: True where pairs are neighbours (x0, x1), as in every V2/V3/R1/Kimi/Moonlight
            checkpoint; False where a pair is (x_i, x_{i + R/2}), as in the students. The output
            order is the same for both; it cancels in the dot product of a query and a key.
    """
    wide = x.astype(jnp.float32)
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = jnp.split(wide, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
