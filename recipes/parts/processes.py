"""One run in several `jax.distributed` processes: how they start, agree, and who speaks.

    export JAX_COORDINATOR_ADDRESS=10.0.0.1:1234 JAX_NUM_PROCESSES=2
    JAX_PROCESS_ID=0 deepzoo train pretrain --out DIR --mesh fsdp=16      # on one machine
    JAX_PROCESS_ID=1 deepzoo train pretrain --out DIR --mesh fsdp=16      # on the other

All run the same program on arrays that are spread over the devices of all of them, and all see the
run's directory. The first one writes it and speaks; the others do their part of the arithmetic and
of the checkpoints. What only one of them knows (a refusal, a signal, a clock, a file) they agree
on before they act on it: processes that go different ways wait for each other for ever.

Where there is one process, everything here is free and does nothing.
"""

import hashlib
import itertools
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepzoo.recipes.parts.settings import differences, plain
from deepzoo.zoo.errors import DeepzooError, RequestError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

# Seconds that one which ends alone waits for the others before JAX ends them, too.
_LAST = 60
# Seconds that the others wait while one works alone, such as at writing a large model. One that
# dies is noticed by JAX itself, much sooner.
_PATIENCE = 24 * 3600
_barriers = itertools.count()  # each has a name of its own, the same in all processes


def initialize() -> None:
    """Joins the processes that the environment tells of; before JAX is used for anything else.

    Nothing is guessed from Slurm or the like: a single process may be started by those, too.

    Raises:
        RequestError: one of the three variables is missing or wrong, or the others cannot be
            reached.
    """
    given = {name: os.environ[name] for name in (ADDRESS, COUNT, INDEX) if os.environ.get(name)}
    if not given or jax.distributed.is_initialized():
        return
    if missing := [name for name in (ADDRESS, COUNT, INDEX) if name not in given]:
        raise RequestError(
            f"{' and '.join(given)}: set without {' and '.join(missing)}; several processes need"
            " all three, one process none of them"
        )
    count, index = (_number(name, given[name]) for name in (COUNT, INDEX))
    if not 0 <= index < count:
        raise RequestError(
            f"{INDEX}={index} with {COUNT}={count}: processes are counted from 0 to {COUNT} - 1"
        )
    address, port = given[ADDRESS], given[ADDRESS].rpartition(":")[2]
    if ":" not in address or not port.isdigit():
        raise RequestError(
            f"{ADDRESS}={address}: expected a host and a port, such as 10.0.0.1:1234"
        )
    if count == 1:
        return
    try:
        jax.distributed.initialize(
            address, count, index, cluster_detection_method="deactivate",
            shutdown_timeout_seconds=_LAST,
        )  # fmt: skip
    except jax.errors.JaxRuntimeError as error:
        told = str(error).split("\n")[0]
        raise RequestError(
            f"process {index} of {count} cannot join the others at {ADDRESS}={address} ({told});"
            " start all of them, each with its own number, at an address that all can reach"
        ) from None
    if threading.current_thread() is threading.main_thread():
        # JAX watches for SIGTERM by a handler of its own, behind Python's back: until a run takes
        # care of it, the signal shall end the process as ever.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def _number(name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise RequestError(f"{name}={text}: expected a number")
    return int(text)


def is_first() -> bool:
    """Whether this process writes and speaks; the only one does."""
    return jax.process_index() == 0


def only_one(what: str) -> None:
    """Refuses to do something in several processes.

    Raises:
        RequestError: there are several.
    """
    if (count := jax.process_count()) > 1:
        raise RequestError(
            f"{what} runs in one process, and this is one of {count}; start it once, without"
            f" {ADDRESS}, {COUNT} and {INDEX}"
        )


def barrier() -> None:
    """Waits for all processes, as long as it takes: a collective operation would give up first."""
    if jax.process_count() > 1:
        import orbax.checkpoint as ocp

        wait = ocp.multihost.get_barrier_sync_fn()
        wait(key=f"deepzoo/{next(_barriers)}", timeout_ms=_PATIENCE * 1000)


def allgather(text: str) -> list[str]:
    """What each process says, in their order."""
    if jax.process_count() == 1:
        return [text]
    barrier()
    data = text.encode(errors="replace")
    sizes = _gathered(np.array(len(data), np.int32))
    width = 1 << max(8, int(sizes.max()).bit_length())  # few programs for texts of all lengths
    padded = np.zeros(width, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = zip(_gathered(padded), sizes.tolist(), strict=True)
    return [bytes(row[:size]).decode(errors="replace") for row, size in rows]


def broadcast(text: str) -> str:
    """The first process's text, in all of them."""
    return allgather(text)[0]


def decided(flag: bool) -> bool:
    """What the first process says, in all of them."""
    return any_of(flag and is_first())[0]


def any_of(*flags: bool) -> list[bool]:
    """Of each flag whether it is set in some process; cheap enough for every step."""
    if jax.process_count() == 1:
        return list(flags)
    return _gathered(np.array(flags)).any(axis=0).tolist()


def same(told: Mapping[str, Any]) -> None:
    """Compares plain values of all processes.

    Raises:
        RequestError: one has others than the first; in all of them, with the differences.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(plain(told), sort_keys=True)
    if len(set(allgather(hashlib.sha256(text.encode()).hexdigest()))) == 1:
        return
    first, *others = map(json.loads, allgather(text))
    for index, other in enumerate(others, 1):
        if found := [f"{k}: {v}" for k, v in differences(first, other).items()]:
            more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
            raise RequestError(
                f"process {index} was started with other settings or data than process 0"
                f" ({'; '.join(found[:5])}{more}); give all processes the same command and files"
            )


@contextmanager
def together() -> Iterator[None]:
    """Waits at its end for all processes; what failed in one of them fails in all.

    Nothing inside may need the other processes: one that failed is not there any more.

    Raises:
        DeepzooError: with the message of the first that failed; in that process, its own error.
        RuntimeError: the same where it was no mistake of the user's.
    """
    if jax.process_count() == 1:
        yield
        return
    failed = None
    try:
        yield
    except Exception as error:
        failed = error
    found = allgather("" if failed is None else _told(failed))
    index = next((i for i, text in enumerate(found) if text), None)
    if index is None:
        return
    if index == jax.process_index():
        assert failed is not None
        raise failed
    kind, text = found[index][0], found[index][1:]
    raise (DeepzooError(text) if kind == "u" else RuntimeError(text)) from failed


def _told(error: Exception) -> str:
    """Whose mistake it is, user's or program's, and the message."""
    if isinstance(error, OSError):
        named = f"{error.filename}: " if error.filename is not None else ""
        return f"u{named}{error.strerror or error}"
    if isinstance(error, DeepzooError):
        return f"u{error}"
    return f"p{type(error).__name__}: {error}"


def on_first[T](call: Callable[[], T]) -> T | None:
    """What `call` returns in the first process, None in the others; they wait for it.

    Raises:
        DeepzooError: see `together`.
    """
    with together():
        return call() if is_first() else None


def on_host(array: jax.Array) -> np.ndarray:
    """A whole array in host memory of every process, wherever it lies; all of them call it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return _gathered(array, tiled=True)


def local[T](tree: T) -> T:
    """Arrays that are spread over the processes, whole on one device of each; all call it.

    For what a process does alone, such as writing text: the model must fit into one device.
    """
    return _whole(tree, lambda array: jnp.asarray(_layer_by_layer(array, True)))


def for_first[T](tree: T) -> T:
    """The same in host memory of the first process alone, for what it writes; all call it.

    The others keep the tree as it is.
    """
    keep = is_first()

    def change(array: jax.Array) -> Any:
        found = _layer_by_layer(array, keep)
        return found if keep else array

    return _whole(tree, change)


def _whole(tree: Any, change: Callable[[jax.Array], Any]) -> Any:
    def one(leaf: Any) -> Any:
        spread = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        return change(leaf) if spread else leaf

    return jax.tree.map(one, tree)


def _layer_by_layer(array: jax.Array, keep: bool) -> Any:
    """The whole array: no device holds more than one layer of a stack besides its own part."""
    if array.ndim < 3:
        return on_host(array)
    out = np.empty(array.shape, array.dtype) if keep else None
    for i in range(len(array)):
        layer = on_host(_layer(array, i))
        if out is not None:
            out[i] = layer
    return out


@jax.jit
def _layer(array: jax.Array, i: int) -> jax.Array:
    return array[i]  # traced, or every layer would be compiled anew


def _gathered(array: Any, *, tiled: bool = False) -> np.ndarray:
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array, tiled=tiled)
