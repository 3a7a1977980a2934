"""Arguments for latent decode attention, with poison wherever nobody may look."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

GARBAGE = 2147480000  # an entry of a page table that no pool has


class Sizes(NamedTuple):
    batch: int = 3
    queries: int = 1
    heads: int = 16
    latent: int = 32
    rope: int = 16
    capacity: int = 96
    page: int | None = None
    fp8: bool = False
    dtype: Any = jnp.bfloat16

    def inputs(self, lengths, seed: int = 0) -> tuple:
        """(arrays in the order of the forms, the same without poison as NumPy)."""
        rng = np.random.default_rng(seed)
        lengths = np.asarray(lengths, np.int32).reshape(self.batch, self.queries)
        last = lengths.max(axis=1)
        pages = None
        if self.page is None:
            lead = (self.batch, self.capacity)
            held = np.arange(self.capacity) < last[:, None]
        else:
            count = -(-self.capacity // self.page)
            lead = (self.batch * count + 2, self.page)
            pages = rng.permutation(lead[0])[: self.batch * count].reshape(self.batch, count)
            pages = pages.astype(np.int32)
            held = np.zeros(lead, bool)
            for row, length in zip(pages, last, strict=True):
                for position in range(length):
                    held[row[position // self.page], position % self.page] = True
                row[-(-length // self.page) :] = GARBAGE
        rows = (self.batch, self.queries, self.heads)
        q_latent, q_rope, latent, k_rope = (
            rng.standard_normal(shape).astype(np.float32)
            for shape in (
                (*rows, self.latent), (*rows, self.rope), (*lead, self.latent), (*lead, self.rope)
            )
        )  # fmt: skip
        factors = None
        if self.fp8:
            factors = (np.abs(latent).max(axis=-1) / 448).astype(np.float32)
            latent = np.asarray(jnp.asarray(latent / factors[..., None], jnp.float8_e4m3fn))
        else:
            latent = np.asarray(jnp.asarray(latent, self.dtype))
        q_latent, q_rope, k_rope = (
            np.asarray(jnp.asarray(a, self.dtype)) for a in (q_latent, q_rope, k_rope)
        )
        clean = (q_latent, q_rope, latent, k_rope, lengths, pages, factors)
        poisoned = []
        for a in (latent, k_rope, factors):
            if a is not None:
                a = a.copy()
                a[~held] = np.nan
            poisoned.append(a)
        latent, k_rope, factors = poisoned
        return (q_latent, q_rope, latent, k_rope, lengths, pages, factors), clean


def error(a, exact) -> float:
    """Relative error in the norm; 0 where both are 0."""
    a, exact = np.asarray(a, np.float64), np.asarray(exact, np.float64)
    return float(np.linalg.norm(a - exact) / max(np.linalg.norm(exact), 1e-30))


def cosine_difference(a, exact) -> float:
    """1 - cosine of the angle between them, in the form that also sees a wrong length."""
    a, exact = np.asarray(a, np.float64).ravel(), np.asarray(exact, np.float64).ravel()
    size = a @ a + exact @ exact
    return float(1 - 2 * (a @ exact) / size) if size else 0.0


def check(result, expected, *, bound: float, lse_bound: float = 1e-5) -> None:
    """Holds a result against float64: exactly empty where it must be, close elsewhere."""
    out, lse = (np.asarray(a, np.float64) for a in result)
    exact, exact_lse = expected
    empty = np.isneginf(exact_lse)
    assert np.array_equal(np.isneginf(lse), empty)
    assert not out[empty].any()
    assert np.abs(lse[~empty] - exact_lse[~empty]).max(initial=0) < lse_bound * max(
        1.0, np.abs(exact_lse[~empty]).max(initial=0)
    )
    assert error(out, exact) < bound
    assert cosine_difference(out, exact) < 5e-6
