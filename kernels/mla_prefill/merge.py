"""The union of two attention results over disjoint keys.

V value
"""

import jax
import jax.numpy as jnp


def merge(
    left: jax.Array, left_lse: jax.Array, right: jax.Array, right_lse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attention over the union of two disjoint key sets from the results over each.

    Differentiable; where neither part saw a key the result is 0 and -inf, with zero gradients.

    Args:
        left: [..., V].
        left_lse: float32 [...], log-sum-exp of the scores; -inf where nothing was seen.
        right: [..., V].
        right_lse: float32 [...].

    Returns:
        [..., V] in left's dtype, and float32 [...].
    """
    top = jnp.maximum(jnp.maximum(left_lse, right_lse), jnp.finfo(jnp.float32).min)
    top = jax.lax.stop_gradient(top)  # cancels, and must not see the -inf
    a, b = jnp.exp(left_lse - top), jnp.exp(right_lse - top)
    total = jnp.where(a + b > 0, a + b, 1.0)
    out = (left * (a / total)[..., None] + right * (b / total)[..., None]).astype(left.dtype)
    return out, jnp.where(a + b > 0, jnp.log(total) + top, -jnp.inf)
