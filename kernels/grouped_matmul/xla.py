"""Grouped matmul in XLA: the form for CPUs where a program is lowered for a CPU, loops elsewhere.

M rows  K input width  N output width  E groups
"""

from functools import partial

import jax

from deepzoo.kernels.grouped_matmul import cpu, loops


def rows_times_groups(
    x: jax.Array,
    w: jax.Array,
    w_scale: jax.Array | None,
    group_sizes: jax.Array,
    *,
    transposed: bool = False,
) -> jax.Array:
    """x [M, K] times w[e] [N, K] transposed -> [M, N]; with `transposed`, x [M, N] times w[e] ->
    [M, K]. Rows beyond the sum of the sizes are zeros.

    Quantised matrices are dequantised a group at a time, on every platform in the loop.
    """
    if w_scale is not None or x.shape[0] == 0:
        return loops.rows_times_groups(x, w, w_scale, group_sizes, transposed=transposed)

    def looped(x, w, group_sizes):
        return loops.rows_times_groups(x, w, None, group_sizes, transposed=transposed)

    on_cpu = partial(cpu.rows_times_groups, transposed=transposed)
    return jax.lax.platform_dependent(x, w, group_sizes, cpu=on_cpu, default=looped)


def group_outer(left: jax.Array, right: jax.Array, group_sizes: jax.Array, dtype) -> jax.Array:
    """Gradient to the matrices: left [M, N], right [M, K] -> [E, N, K] in `dtype`, each group's own
    outer products, float32 sums."""
    if left.shape[0] == 0:
        return loops.group_outer(left, right, group_sizes, dtype)
    on_cpu, looped = (partial(form.group_outer, dtype=dtype) for form in (cpu, loops))
    return jax.lax.platform_dependent(left, right, group_sizes, cpu=on_cpu, default=looped)
