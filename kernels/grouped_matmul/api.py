"""Public entry, gradient and choice of implementation.

M rows  K input width  N output width  E groups
"""

from functools import partial

import jax
import jax.numpy as jnp

from deepzoo.kernels.grouped_matmul import xla


def grouped_matmul(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, w_scale: jax.Array | None = None
) -> jax.Array:
    """Multiplies each row by its group's matrix.

    Differentiable in `x`, and in `w` where it is not quantised; neither gradient transposes or
    copies `w`.

    Args:
        x: [M, K], rows sorted by group.
        w: [E, N, K], output-major like an `nn.Linear` weight; float8_e4m3fn with `w_scale`.
        group_sizes: int32 [E]; empty groups are allowed.
        w_scale: float32 [E, ceil(N / 128), ceil(K / 128)] block scales of a float8 `w`, dequantised
            a group at a time.

    Returns:
        [M, N] in x's dtype, accumulated in float32.

    Raises:
        ValueError: shapes that do not belong together, or float8 without scales.
    """
    x, w, group_sizes = (jnp.asarray(a) for a in (x, w, group_sizes))
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[2] or group_sizes.shape != (w.shape[0],):
        raise ValueError(
            f"grouped_matmul needs x [M, K], w [E, N, K], group_sizes [E]; got {x.shape},"
            f" {w.shape}, {group_sizes.shape}"
        )
    if (w.dtype == jnp.float8_e4m3fn) != (w_scale is not None):
        raise ValueError(
            f"grouped_matmul: w is {w.dtype}; float8_e4m3fn and w_scale come together or not at all"
        )
    if w_scale is not None:
        return _quantised(x, w, w_scale, group_sizes)
    return _plain(x, w, group_sizes)


@jax.custom_vjp
def _plain(x, w, group_sizes):
    return xla.rows_times_groups(x, w, None, group_sizes)


def _plain_fwd(x, w, group_sizes):
    return _plain(x, w, group_sizes), (x, w, group_sizes)


def _plain_bwd(saved, gradient):
    x, w, group_sizes = saved
    to_x = xla.rows_times_groups(gradient, w, None, group_sizes, transposed=True)
    return to_x, xla.group_outer(gradient, x, group_sizes, w.dtype), None


_plain.defvjp(_plain_fwd, _plain_bwd)


@jax.custom_vjp
def _quantised(x, w, w_scale, group_sizes):
    return xla.rows_times_groups(x, w, w_scale, group_sizes)


def _quantised_fwd(x, w, w_scale, group_sizes):
    return _quantised(x, w, w_scale, group_sizes), (w, w_scale, group_sizes)


def _quantised_bwd(saved, gradient):
    w, w_scale, group_sizes = saved
    to_x = partial(xla.rows_times_groups, transposed=True)(gradient, w, w_scale, group_sizes)
    return to_x, jnp.zeros_like(w), jnp.zeros_like(w_scale), None  # quantised weights are frozen


_quantised.defvjp(_quantised_fwd, _quantised_bwd)
