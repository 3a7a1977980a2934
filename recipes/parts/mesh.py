"""One recipe on several devices: where parameters, optimiser state and batches lie.

    mesh = parsed("data=2,fsdp=2,expert=2")
    state = begun(lambda: start(zoo.init(config, key), tx, seed), config, mesh)
    batch = spread(batch, mesh)

* `data`: rows of a batch; parameters are whole on every device of this axis.
* `fsdp`: rows of a batch, too; parameters and moments are divided, gathered where they are used.
* `expert`: the experts of a layer.
* `tensor`: heads, the feed-forward width, the vocabulary.

Parameters follow the zoo's table (`zoo.functional.RULES`), moments their parameters; scalars and
router biases are on every device. The step is the same program as on one device, cut up by XLA's
partitioner: sums of losses and gradients are over the whole batch, routing is dropless, and numbers
differ by the order of additions only. No expert's parameters or moments are stored twice over
`expert`. What is gathered for a while, a layer at a time: the tokens of all rows, since they are
sorted by expert across the whole batch, and on GPUs the matrices of that layer's experts. Kernels
are not used: the partitioner cannot cut them (see `kernels/dispatch.py`).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deepzoo import zoo
from deepzoo.recipes.parts.step import State
from deepzoo.zoo.config import Config
from deepzoo.zoo.errors import RequestError
from deepzoo.zoo.fingerprint import named
from deepzoo.zoo.functional import RULES, axes

_ROWS = ("data", "fsdp")


class Sizes(NamedTuple):
    """Devices along each axis."""

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1

    def __str__(self) -> str:
        return ",".join(f"{k}={v}" for k, v in self._asdict().items() if v > 1) or "data=1"


def mesh(data: int = 1, fsdp: int = 1, expert: int = 1, tensor: int = 1) -> Mesh:
    """All devices, those of every process, as a grid.

    Raises:
        RequestError: the sizes do not multiply to the number of devices.
    """
    sizes = Sizes(data, fsdp, expert, tensor)
    count = len(jax.devices())
    if min(sizes) < 1 or math.prod(sizes) != count:
        raise RequestError(
            f"mesh {sizes}: is for {math.prod(sizes)} devices, and there are {count}; the sizes of"
            " data, fsdp, expert and tensor must multiply to that number"
        )
    return jax.make_mesh(sizes, Sizes._fields, axis_types=(AxisType.Auto,) * len(sizes))


def parsed(text: str) -> Mesh | None:
    """The mesh that an option names, such as "data=2,fsdp=2,expert=2"; None for "".

    Raises:
        RequestError: it cannot be read, or does not fit the devices.
    """
    if not text:
        return None
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        if name not in Sizes._fields or name in sizes or not value.isascii() or not value.isdigit():
            raise RequestError(
                f"mesh {text!r}: {part.strip()!r} cannot be read; expected sizes of"
                f" {', '.join(Sizes._fields)}, each at most once, such as data=2,fsdp=2"
            )
        sizes[name] = int(value)
    return mesh(**sizes)


def placements[T](state: T, config: Config | None, on: Mesh, *, frozen: Config | None = None) -> T:
    """A `NamedSharding` for every leaf of a state, or of a model's parameters.

    A leaf, wherever it is, lies as the parameter that its path ends with: moments and a reference
    policy as the policy. Adapters lie as their weight does, whole along the rank. A dimension that
    is not divisible stays whole, and so does every leaf that is none of these (counters, router
    biases of a state).

    Args:
        state: arrays or shapes.
        config: the model that `state.params` are of.
        on: the mesh.
        frozen: the model that adapters belong to, or a teacher: what it divides is divided, too.
            Without it and `config` every leaf is whole on every device.

    Raises:
        RequestError: an axis of the mesh divides no parameter at all.
    """
    sizes = dict(on.shape)
    specs: dict[tuple[str, ...], PartitionSpec] = {}
    models = [c for c in (frozen, config) if c is not None]
    if not models:
        if idle := [k for k, n in sizes.items() if k != "data" and n > 1]:
            raise RequestError(
                f"mesh {Sizes(**sizes)}: what is trained here is whole on every device;"
                f" {', '.join(idle)} would divide nothing, use data"
            )
    else:
        _check(models, sizes)
    if frozen is not None:
        for path, spec in _specs(frozen, on).items():
            if path[-1] == "weight" and len(spec) > 1:
                *leading, outputs, inputs = spec
                layer = ".".join(path[:-1])
                specs[layer, "a"] = PartitionSpec(*leading, None, inputs)
                specs[layer, "b"] = PartitionSpec(*leading, outputs, None)
    if config is not None:
        specs |= _specs(config, on)

    def place(path: Any, leaf: Any) -> NamedSharding:
        keys = [jax.tree_util.keystr((k,), simple=True) for k in path]
        # A moment in 8 bits has one key more than its parameter: its codes or its scales.
        found = next(
            (specs[p] for end in (len(keys), len(keys) - 1) for i in range(end)
             if (p := tuple(keys[i:end])) in specs),
            PartitionSpec(),
        )  # fmt: skip
        if len(found) != leaf.ndim or keys[0] == "bias":
            return NamedSharding(on, PartitionSpec())
        fitting = (
            axis if axis and n % sizes[axis] == 0 else None
            for n, axis in zip(leaf.shape, found, strict=True)
        )
        return NamedSharding(on, PartitionSpec(*fitting))

    return jax.tree_util.tree_map_with_path(place, state)


def placed[T](state: T, config: Config | None, on: Mesh, *, frozen: Config | None = None) -> T:
    """The same state, spread over the mesh; see `placements`."""
    return jax.tree.map(_put, state, placements(state, config, on, frozen=frozen))


def begun(
    make: Callable[..., State],
    config: Config | None,
    on: Mesh,
    *given: Any,
    frozen: Config | None = None,
) -> State:
    """`make(*given)`, made where it lies: no leaf is whole on a device that holds a part of it.

    Args:
        make: a pure function that jax can trace. What it has from outside, and not as arguments, is
            copied to every device.
        config: see `placements`.
        on: the mesh.
        given: trees of arrays, such as a model's parameters. Those that lie as they shall, as
            `zoo.load(..., mesh=on)` puts them, become part of the state without a copy.
        frozen: see `placements`.

    Raises:
        RequestError: see `placements`.
    """
    program, shapes = jax.make_jaxpr(make, return_shape=True)(*given)
    where, form = jax.tree.flatten(placements(shapes, config, on, frozen=frozen))
    given = placed(given, config, on, frozen=frozen)
    # Of what is handed on unchanged a compiled program would make a copy: it is left out of it.
    named_in = zip(program.jaxpr.invars, jax.tree.leaves(given), strict=True)
    held = {id(name): leaf for name, leaf in named_in}
    leaves = [held.get(id(name)) for name in program.jaxpr.outvars]
    new = [i for i, leaf in enumerate(leaves) if leaf is None]

    def rest(*given: Any) -> list[jax.Array]:
        made = jax.tree.leaves(make(*given))
        return [made[i] for i in new]

    made = jax.jit(rest, out_shardings=[where[i] for i in new])(*given)
    for i, leaf in zip(new, made, strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(form, map(_put, leaves, where))


def spread(batch: Any, on: Mesh) -> Any:
    """A batch with its rows divided over `data` and `fsdp`; every leaf's first axis is rows.

    Every process passes the whole batch and keeps its part.

    Raises:
        RequestError: the rows cannot be divided.
    """
    sizes = Sizes(**on.shape)
    parts = sizes.data * sizes.fsdp
    rows = NamedSharding(on, PartitionSpec(_ROWS))

    def put(leaf: Any) -> jax.Array:
        if leaf.ndim == 0 or leaf.shape[0] % parts:
            held = leaf.shape[0] if leaf.ndim else "no"
            raise RequestError(
                f"mesh {sizes}: a batch of {held} rows cannot be divided into {parts} equal parts"
                " (data times fsdp); change the rows of a batch, or the mesh"
            )
        return _put(leaf, rows)

    return jax.tree.map(put, batch)


def _put(leaf: Any, where: NamedSharding) -> jax.Array:
    spread = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    if where.is_fully_addressable or spread:
        return jax.device_put(leaf, where)
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])


def _specs(config: Config, on: Mesh) -> dict[tuple[str, ...], PartitionSpec]:
    return {tuple(k.split("/")): s.spec for k, s in named(zoo.shardings(config, on)).items()}


def _check(models: list[Config], sizes: dict[str, int]) -> None:
    meant: dict[str, dict[str, int]] = {axis: {} for axis in sizes}

    def note(leaf: jax.ShapeDtypeStruct, names: tuple[str, ...]) -> None:
        for name, n in zip(names, leaf.shape, strict=True):
            if (axis := RULES.get(name)) in meant:
                meant[axis][name] = n

    for config in models:
        jax.tree.map(note, zoo.abstract(config), axes(config))
    for axis, there in meant.items():
        count = sizes[axis]
        if axis != "data" and count > 1 and not any(n % count == 0 for n in there.values()):
            told = ", ".join(f"{k} ({n})" for k, n in there.items())
            what = f"does not divide {told}" if told else "divides nothing in this model"
            raise RequestError(f"mesh {axis}={count}: {what}; leave it out, or change its size")
