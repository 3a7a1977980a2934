"""tokamax's grouped matmul behind this folder's contract: a baseline for benchmarks, forward only.

tokamax (tested: 0.0.17) takes matrices [E, K, N]. They are passed as a transposed view, which its
kernels copy; and it leaves rows beyond the sum of the sizes as they may be, so they are cleared
here. Both count as its time: they are what a caller with `nn.Linear` weights has to pay.
M rows  K input width  N output width  E groups
"""

import jax
import jax.numpy as jnp


def rows_times_groups(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """x [M, K] times w[e] [N, K] transposed -> [M, N], by tokamax's Mosaic kernel."""
    import tokamax  # pyright: ignore[reportMissingImports]

    out = tokamax.ragged_dot(
        x,
        jnp.swapaxes(w, 1, 2),
        group_sizes,
        preferred_element_type=x.dtype,
        implementation="mosaic",
    )
    real = jnp.arange(x.shape[0]) < group_sizes.sum()
    return jnp.where(real[:, None], out, jnp.zeros((), out.dtype))
