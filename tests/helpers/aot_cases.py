"""Programs for the tests of `deepzoo.kernels.aot`: good ones, and one for each way to fail."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from deepzoo.kernels.cases import Case
from deepzoo.kernels.dispatch import UnsupportedError


def multiply(x: jax.Array, y: jax.Array, *, warps: int = 4) -> jax.Array:
    """x @ y in one block of a Triton kernel."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plt

    def multiply_kernel(x_ref, y_ref, out_ref):
        out_ref[...] = plt.dot(x_ref[...], y_ref[...]).astype(out_ref.dtype)

    return pl.pallas_call(
        multiply_kernel,
        out_shape=jax.ShapeDtypeStruct((x.shape[0], y.shape[1]), jnp.bfloat16),
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=2),
        name="multiply_kernel",
    )(x, y)


def copy_through_shared(x: jax.Array) -> jax.Array:
    """A Mosaic kernel that moves 64 KiB through shared memory."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def copy_kernel(x_ref, out_ref, buffer, barrier):
        plgpu.copy_gmem_to_smem(x_ref, buffer, barrier)
        plgpu.barrier_wait(barrier)
        plgpu.copy_smem_to_gmem(buffer, out_ref)
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        copy_kernel,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()],
    )(x)


def outer(x: jax.Array, y: jax.Array) -> jax.Array:
    """A sum of outer products, all of them held at once: what a dense blow-up looks like."""
    products = jax.lax.optimization_barrier(x[:, None, :] * y[None, :, :])
    return products.sum(axis=-1)


def product_of_group(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [M, K] times w[0] [N, K] transposed, by a kernel that is given all of w [E, N, K]."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plt

    def product_kernel(x_ref, w_ref, out_ref):
        out_ref[...] = plt.dot(x_ref[...], w_ref[0].T).astype(out_ref.dtype)

    return pl.pallas_call(
        product_kernel,
        out_shape=jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        name="product_kernel",
    )(x, w)


def scanned(x: jax.Array, w: jax.Array) -> jax.Array:
    """Layers [L, E, N, K] one after another by a scan over the first axis."""
    return jax.lax.scan(lambda x, w: (product_of_group(x, w), None), x, w)[0]


def unrolled(x: jax.Array, *w: jax.Array) -> jax.Array:
    """The same with an array a layer."""
    for layer in w:
        x = product_of_group(x, layer)
    return x


def refuse(*_: jax.Array) -> jax.Array:
    """A form that refuses."""
    raise UnsupportedError("a reason, and another")


def _case(name: str, function: Callable[..., Any], *shapes: tuple[int, ...], dtype=jnp.bfloat16):
    def inputs(seed: int) -> tuple[Any, ...]:
        keys = jax.random.split(jax.random.key(seed), len(shapes))
        return tuple(
            jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)
        )

    return Case("aot_cases", name, ("triton",), lambda form: function, inputs, 1.0, 1.0)


CASES = (
    _case("good", multiply, (64, 64), (64, 64)),
    _case("mosaic", copy_through_shared, (256, 128)),
    _case("spills", partial(multiply, warps=1), (64, 64), (64, 128)),
    _case("too much shared memory", multiply, (512, 512), (512, 512)),
    _case("aborts", multiply, (64, 64), (64, 64), dtype=jnp.float8_e4m3fn),
    _case("blows up", outer, (512, 512), (512, 512)),
    _case("refuses", refuse, (1,)),
    _case("scanned", scanned, (64, 64), (4, 64, 64, 64)),
    _case("unrolled", unrolled, (64, 64), *[(64, 64, 64)] * 4),
)
