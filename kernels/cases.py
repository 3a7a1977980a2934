"""A case: one operation at one real shape, shared by tests, compilation without a GPU and benches.

Each operation's folder lists its own in `cases.py`, as `CASES`.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Case(NamedTuple):
    """One operation at one shape.

    operation: the folder's name.
    name: what a person reads, e.g. "V2-Lite, batch 128, 4096 tokens, 16 heads, bf16".
    forms: implementations worth compiling and timing here, e.g. ("mosaic", "triton", "xla").
    bind: implementation -> function of the arrays, through the operation's public entry.
    inputs: seed -> arrays with realistic values (ragged lengths, shuffled pages, uneven
        groups). Called under `jax.eval_shape` where only shapes are needed, so it uses jax.random
        alone.
    flops: multiply-adds times two that the result needs.
    bytes: that must cross device memory once.
    reference: arrays as NumPy -> expected outputs in float64, a subset of rows if all would take
        minutes; None where the XLA form in float32 is the reference.
    outputs: result -> the part that `reference` returns.
    fp8: whether the floor is that of FP8 arithmetic.
    reach, least: seconds on one H200 that are aimed at, and at least to be had; None if not set.
    temp: bytes of scratch memory that a form may take; None for three times the inputs and
        outputs, and 64 MiB.
    """

    operation: str
    name: str
    forms: tuple[str, ...]
    bind: Callable[[str], Callable[..., Any]]
    inputs: Callable[[int], tuple[Any, ...]]
    flops: float
    bytes: float
    reference: Callable[..., Any] | None = None
    outputs: Callable[[Any], Any] = lambda result: result
    fp8: bool = False
    reach: float | None = None
    least: float | None = None
    temp: float | None = None

    def abstract(self) -> tuple[Any, ...]:
        """Shapes and dtypes of the inputs, without making them."""
        return jax.eval_shape(lambda: self.inputs(0))


def operations() -> tuple[str, ...]:
    """The operations that list cases, by their folders."""
    return tuple(sorted(p.parent.name for p in Path(__file__).parent.glob("*/cases.py")))


def module(operation: str) -> str:
    """Import path of an operation's cases."""
    return f"deepzoo.kernels.{operation}.cases"


def cases(operation: str) -> tuple[Case, ...]:
    """The cases of one operation."""
    return importlib.import_module(module(operation)).CASES
