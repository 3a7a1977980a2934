"""Step checkpoints: the whole state of a run in one directory that appears at once.

checkpoints/00001000/params        with the router biases, so that `zoo.load` reads the
                                   directory as a model, where the run told its config
checkpoints/00001000/opt_state, counters, extra
checkpoints/00001000/manifest.json fingerprints of all of it (see `zoo.trees`)
"""

import functools
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from deepzoo.recipes.parts import processes
from deepzoo.recipes.parts.bias import split_bias, with_bias
from deepzoo.recipes.parts.step import State
from deepzoo.zoo.errors import CheckpointError, DeepzooError
from deepzoo.zoo.fingerprint import all_finite, named
from deepzoo.zoo.trees import read_manifest, read_tree, write_tree

_COUNTERS = ("step", "seed", "skipped", "streak")
_NAME = re.compile(r"[0-9]{8,}")
_DELETING = ".deleting"


def save_state(
    folder: Path,
    state: State,
    extra: Mapping[str, Any] | None = None,
    *,
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """Writes `folder`/<step>; returns it.

    Raises:
        CheckpointError: it exists, or the disk is full; nothing is left of it then.
    """
    path = folder / f"{int(state.step):08d}"
    trees = {name: tree for name, tree in _trees(state).items() if jax.tree.leaves(tree)}
    return write_tree(path, trees, extra, finish=finish, progress=False)


def restore_state(path: Path, like: State) -> State:
    """Reads a step directory, verifies it, and places it as `like` is placed.

    Of several processes each reads its part; what fails in one of them fails in all.

    Args:
        path: the step directory.
        like: state of arrays, or of `jax.ShapeDtypeStruct` with shardings.

    Raises:
        CheckpointError: anything missing, damaged, or of another shape or dtype.
    """
    with processes.together():
        manifest = read_manifest(path)
    found = {
        name: read_tree(manifest, name, tree, progress=False) if jax.tree.leaves(tree) else tree
        for name, tree in _trees(like).items()
    }
    params, bias = split_bias(found["params"])
    counters = found["counters"]
    if int(counters["step"]) != int(path.name):
        raise CheckpointError(f"{path}: holds step {int(counters['step'])}; it was renamed")
    return State(
        params=params, bias=bias, opt_state=found["opt_state"], extra=found["extra"], **counters,
    )  # fmt: skip


def abstract(state: State) -> State:
    """Shapes, dtypes and placement of a state, without its memory."""
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
    )


def newest(folder: Path, like: State, say: Callable[[str], None]) -> State | None:
    """The newest state in `folder` that is whole; None where there is none at all.

    A damaged one is put aside under a name that begins with `damaged-`, and `say` is told.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged; or they hold another model.
    """
    steps = processes.broadcast("\n".join(path.name for path in saved(folder))).split()
    for path in [folder / step for step in reversed(steps)]:
        try:
            return restore_state(path, like)
        except DeepzooError as error:
            if "does not fit" in str(error):  # a difference that the settings did not show
                raise
            processes.on_first(functools.partial(_put_aside, path))
            say(f"{error}; put aside as {_aside(path).name}")
    if steps:
        raise CheckpointError(
            f"{folder}: none of its {len(steps)} checkpoints is whole; start again in another"
            " directory"
        )
    return None


def _aside(path: Path) -> Path:
    return path.with_name(f"damaged-{path.name}")


def _put_aside(path: Path) -> None:
    shutil.rmtree(_aside(path), ignore_errors=True)
    path.rename(_aside(path))


def saved(folder: Path) -> list[Path]:
    """Step directories, oldest first."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name))


def prune(folder: Path, keep: int) -> None:
    """Deletes all but the newest `keep`, none if that is 0.

    What is half deleted is never taken for a checkpoint: it is renamed before.
    """
    for path in saved(folder)[:-keep] if keep else []:
        hidden = path.with_name(f".{path.name}{_DELETING}")
        path.rename(hidden)
        shutil.rmtree(hidden)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left of saving and deleting; only for the run's owner."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith(".") and path.suffix in (_DELETING, ".partial"):
                remove(path)


def remove(path: Path) -> None:
    """Removes a file or a directory, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_finite(params: Any, where: object) -> None:
    """Raises CheckpointError that names the first leaf with NaN or infinity."""
    for name, leaf in named(params).items():
        if not all_finite(leaf):
            raise CheckpointError(
                f"{where}: params/{name} holds NaN or infinity; nothing can be trained from it"
            )


def _trees(state: State) -> dict[str, Any]:
    return {
        "params": with_bias(state.params, state.bias),
        "opt_state": state.opt_state,
        "counters": {name: getattr(state, name) for name in _COUNTERS},
        "extra": state.extra,
    }
