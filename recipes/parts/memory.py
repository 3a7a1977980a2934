"""Bytes that a step needs on each device, from the compiled step itself."""

from typing import Any, Literal

import jax

from deepzoo.recipes.parts.step import Batch, State

type Remat = Literal["none", "full", "dots"]
"""Rematerialisation of a recipe's layers, see `zoo.apply`."""


def estimate(step: Any, state: State, batch: Batch) -> str:
    """One line: bytes per device of parameters, optimiser, gradients, activations, in all.

    The step is compiled for it, and the first call uses that program. Gradients are float32, one a
    parameter; activations are what else the program needs while it runs. Frozen parameters, such as
    a teacher's, have a number of their own.

    Args:
        step: from `jitted`.
        state: its first argument, arrays or shapes with shardings.
        batch: its second.
    """
    found = step.lower(state, batch).compile().memory_analysis()
    parts = _held(state)
    if frozen := _bytes(getattr(step, "frozen", ())):
        parts = {"frozen parameters": frozen} | parts
    if found is None:
        told = ", ".join(f"{name} {size(n)}" for name, n in parts.items())
        return f"memory per device: {told}; this backend does not tell what the step needs"
    gradients = _bytes(state.params, itemsize=4)
    parts["gradients"] = min(gradients, found.temp_size_in_bytes)
    parts["activations"] = found.temp_size_in_bytes - parts["gradients"]
    total = found.argument_size_in_bytes + found.temp_size_in_bytes
    total += found.output_size_in_bytes - found.alias_size_in_bytes
    told = ", ".join(f"{name} {size(n)}" for name, n in parts.items())
    return f"memory per device: {size(total)} ({told})"


def planned(state: State) -> str:
    """The same from shapes alone, nothing is compiled: without activations.

    Args:
        state: arrays or shapes, with shardings where there are several devices.
    """
    parts = _held(state) | {"gradients": _bytes(state.params, itemsize=4)}
    told = ", ".join(f"{name} {size(n)}" for name, n in parts.items())
    return f"memory per device: {size(sum(parts.values()))} and activations ({told})"


def _held(state: State) -> dict[str, int]:
    """Bytes per device of what is kept between steps."""
    params, rest = _bytes(state.params), _bytes((state.bias, state.extra))
    parts = {"parameters": params, "optimiser": _bytes(state.opt_state)}
    return parts | ({"other arrays": rest} if rest > params / 100 else {})


def size(count: float) -> str:
    """Bytes with a unit that a person reads: 1.5 GiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _bytes(tree: Any, itemsize: int | None = None) -> int:
    """Of the largest part that one device holds."""

    def held(leaf: Any) -> int:
        shape = leaf.shape
        if (sharding := getattr(leaf, "sharding", None)) is not None:
            shape = sharding.shard_shape(shape)
        elements = 1
        for n in shape:
            elements *= n
        return elements * (itemsize or leaf.dtype.itemsize)

    return sum(held(leaf) for leaf in jax.tree.leaves(tree))
