"""Latent decode attention in Pallas Mosaic GPU, in the GPU interpreter: races are errors, memory
nobody wrote is NaN."""

from functools import partial

import jax
import numpy as np
import pytest
from decode_inputs import Sizes, check, error

from deepzoo.kernels.mla_decode import mla_decode, mosaic, reference, xla

SCALE = 0.06


@partial(jax.jit, static_argnames=("splits",))
def kernel(arrays, splits):
    return mosaic.mla_decode(*arrays, scale=SCALE, interpret=True, splits=splits)


CASES = {
    # More blocks than stages, a capacity that ends inside a block, a row that sees nothing.
    "contiguous": (Sizes(2, 1, 64, 512, 64, 200), 1, ([163, 0], [200, 64], [1, 129])),
    # The two row tiles of a query, two queries of unlike length, splits of unlike length.
    "pages, two tiles, two splits": (
        Sizes(1, 2, 128, 512, 64, 256, page=64), 2, ([200, 190], [64, 0]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name):
    sizes, splits, draws = CASES[name]
    for seed, lengths in enumerate(draws):
        arrays, clean = sizes.inputs(lengths, seed)
        expected = reference.mla_decode(*clean[:5], scale=SCALE, pages=clean[5])
        result = kernel(arrays, splits)
        check(result, expected, bound=1e-2)
        peer = xla.mla_decode(*arrays, scale=SCALE)
        assert error(result[0], expected[0]) <= 1.5 * error(peer[0], expected[0])


def test_more_than_the_capacity_is_all_of_it():
    sizes, splits, _ = CASES["contiguous"]
    arrays, clean = sizes.inputs([200, 0])
    over = (*arrays[:4], np.array([[300], [0]], np.int32), *arrays[5:])
    check(kernel(over, splits), reference.mla_decode(*clean[:5], scale=SCALE), bound=1e-2)


def test_the_public_entry_runs_it_and_reruns_give_the_same_bits():
    arrays, _ = Sizes(1, 1, 64, 512, 64, 128, page=64).inputs([100])
    once, again = (
        mla_decode(
            *arrays[:5], scale=SCALE, pages=arrays[5], implementation="mosaic", interpret=True
        )
        for _ in range(2)
    )
    for a, b in zip(once, again, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))
