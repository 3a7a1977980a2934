"""Trees of arrays on disk: Orbax data and a manifest that proves it.

    <directory>/manifest.json     what is there: shapes, dtypes, fingerprints, files, versions
    <directory>/<tree>/           an Orbax tree (a plain nested dict) each: params, opt_state, ...

Manifest and trees appear together or not at all. Every read compares the manifest with its own
hash, every listed file with its size (small ones with their hash), and every leaf with its
fingerprint, before an array is handed out.
"""

import errno
import hashlib
import json
import logging
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepzoo.zoo import files, names
from deepzoo.zoo.atomic import new_directory
from deepzoo.zoo.errors import CheckpointError, DeepzooError
from deepzoo.zoo.fingerprint import leaf_fingerprint, named
from deepzoo.zoo.progress import Progress, track

MANIFEST = "manifest.json"
FORMAT = 1
_PACKAGES = ("deepzoo", "jax", "flax", "orbax-checkpoint")
_CHUNK = 64 << 20
_HASHED = 16 << 20  # files up to this size are hashed; the larger ones are array data


class Manifest(NamedTuple):
    """What a checkpoint directory says about itself, after its files were compared with it.

    Attributes:
        directory: where it lies.
        trees: tree -> leaf -> {"shape", "dtype", "fingerprint"}.
        extra: what the writer added: config, step, data cursor.
        written_by: version of this package that wrote it.
    """

    directory: Path
    trees: dict[str, dict[str, dict[str, Any]]]
    extra: dict[str, Any]
    written_by: str


def write_tree(
    directory: str | Path,
    trees: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
    *,
    finish: Callable[[Path], None] | None = None,
    progress: Progress = None,
) -> Path:
    """Writes trees of arrays and their manifest in one atomic step.

    Of several `jax.distributed` processes all call it, with arrays that are spread over all of them
    and a directory on a file system that they share. Each writes its part of the arrays, the first
    everything else; all return once the directory is there.

    Args:
        directory: must not exist, or be empty; its parents are made.
        trees: name -> any tree of arrays; what is not a dict (an optimiser's state) is written as
            one, keys being field names and indices.
        extra: JSON values for the manifest, such as config, step, data cursor.
        finish: adds more files to the directory before it appears.
        progress: see `progress.Progress`.

    Raises:
        CheckpointError: the directory is in use, the disk is full, a leaf is no array, or another
            process failed.
    """
    directory = Path(directory)
    arrays = {
        tree: {k: _array(k, v) for k, v in named(value).items()} for tree, value in trees.items()
    }
    total = sum(x.nbytes for leaves in arrays.values() for x in leaves.values())
    with (
        _told_once(),
        _directory_of_all(directory, total) as temporary,
        track(f"writing {directory.name}", total, progress) as advance,
    ):
        for tree, leaves in arrays.items():
            _write_orbax(temporary / tree, leaves)
            advance(sum(x.nbytes for x in leaves.values()))
        described = {tree: {k: _describe(x) for k, x in v.items()} for tree, v in arrays.items()}
        if jax.process_index():
            return directory
        if finish is not None:
            finish(temporary)
        manifest = {
            **(extra or {}),
            "format": FORMAT,
            "written_by": version("deepzoo"),
            "versions": {name: version(name) for name in _PACKAGES},
            "trees": described,
            "files": _listed(temporary),
        }
        manifest["sha256"] = _digest(manifest)
        text = json.dumps(manifest, indent=1, allow_nan=False)
        (temporary / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return directory


@contextmanager
def _directory_of_all(directory: Path, needed: int) -> Iterator[Path]:
    """`new_directory`, made by the first process and known to all."""
    if jax.process_count() == 1:
        with new_directory(directory, needed, CheckpointError) as temporary:
            yield temporary
        return
    failed = f"{directory}: another process could not write its part"
    with _all_or_none(failed), ExitStack() as stack:
        told = ""
        if jax.process_index() == 0:
            try:
                made = stack.enter_context(new_directory(directory, needed, CheckpointError))
                told = f" {made}"
            except CheckpointError as error:
                told = str(error)
        told = _of_first(told)
        if not told.startswith(" "):
            raise CheckpointError(told)
        with _all_or_none(failed):  # before the first process makes it visible
            yield Path(told[1:])


@contextmanager
def _all_or_none(failed: str) -> Iterator[None]:
    """Waits at its end for all processes, and fails in each if it failed in one."""
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        yield
        return
    fine = False
    try:
        yield
        fine = True
    finally:
        every = np.all(multihost_utils.process_allgather(np.array(fine)))
    if not every:
        raise CheckpointError(failed)


def _of_first(text: str) -> str:
    """The first process's text, in all of them."""
    from jax.experimental import multihost_utils

    raw = np.zeros(8192, np.uint8)
    data = text.encode()[: raw.size]
    raw[: len(data)] = np.frombuffer(data, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(raw)).rstrip(b"\0").decode(errors="replace")


def read_manifest(directory: str | Path) -> Manifest:
    """Reads manifest.json and compares the directory's files with it; no array is read yet.

    Raises:
        CheckpointError: no manifest (unfinished, or not ours), a file missing or of another size, a
            link, or a newer format.
    """
    directory = Path(directory).resolve()
    try:
        raw = files.read_json(directory, MANIFEST, CheckpointError)
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory}: no {MANIFEST}; it was never finished, or deepzoo did not write it"
        ) from None
    path = directory / MANIFEST
    found = raw.get("format")
    if not isinstance(found, int) or isinstance(found, bool):
        raise CheckpointError(f"{path}: names no format; deepzoo did not write it")
    if found > FORMAT:
        raise CheckpointError(
            f"{path}: format {found}, written by deepzoo {raw.get('written_by')}; this one"
            f" ({version('deepzoo')}) reads up to {FORMAT}: install a newer deepzoo"
        )
    digest = raw.pop("sha256", None)
    if digest != _digest(raw):
        raise CheckpointError(f"{path}: its text is not what was written; it is damaged")
    trees, listed = raw.pop("trees", None), raw.pop("files", None)
    if not _well_formed(trees) or not isinstance(listed, dict):
        raise CheckpointError(f"{path}: trees or files are missing or damaged")
    _compare_files(directory, listed)
    return Manifest(directory, trees, raw, str(raw.get("written_by")))


def read_tree(manifest: Manifest, tree: str, target: Any, *, progress: Progress = None) -> Any:
    """Restores one tree into the structure of `target` and compares every leaf's fingerprint.

    Of several `jax.distributed` processes all call it, and each reads what its devices hold.

    Args:
        manifest: from `read_manifest`.
        tree: name given to `write_tree`.
        target: same structure; leaves are `jax.ShapeDtypeStruct`, with a sharding if they are to be
            spread over devices, or arrays, whose placement is taken over.
        progress: see `progress.Progress`.

    Raises:
        CheckpointError: keys, shapes or dtypes differ from the target (nothing is cast), the data
            cannot be read, or a fingerprint differs.
    """
    where = f"{manifest.directory}: {tree}"
    if tree not in manifest.trees:
        raise CheckpointError(
            f"{where} is not in this checkpoint ({', '.join(manifest.trees)} are)"
        )
    wanted, stored = named(target), manifest.trees[tree]
    _compare(where, wanted, stored)
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    structs = {
        name: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=getattr(x, "sharding", None) or default
        )
        for name, x in wanted.items()
    }
    total = sum(x.size * x.dtype.itemsize for x in structs.values())
    with track(f"loading {manifest.directory.name}", total, progress) as advance:
        with _all_or_none(f"{where}: another process could not read its part"):
            found = _read_orbax(manifest.directory / tree, structs, where)
        for name, leaf in found.items():
            if leaf_fingerprint(leaf) != stored[name]["fingerprint"]:
                raise CheckpointError(
                    f"{where}/{name} is not what was written: its fingerprint differs; the disk or"
                    " a copy damaged it, use another copy of this checkpoint"
                )
            advance(leaf.nbytes)
    return jax.tree.unflatten(jax.tree.structure(target), [found[name] for name in wanted])


def _digest(manifest: Mapping[str, Any]) -> str:
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _listed(directory: Path) -> dict[str, dict[str, Any]]:
    """What the manifest says about files: size, and the hash of small ones."""
    listed = {}
    for name, size in _walk(directory).items():
        listed[name] = {"size": size}
        if size <= _HASHED:
            listed[name]["sha256"] = _hash(directory / name)
    return listed


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _compare_files(directory: Path, listed: dict[str, Any]) -> None:
    held = _walk(directory)
    if missing := listed.keys() - held.keys():
        raise CheckpointError(f"{directory}: incomplete: missing {files.some(missing)}")
    for name, entry in sorted(listed.items()):
        size, digest = entry.get("size"), entry.get("sha256")
        if held[name] != size:
            raise CheckpointError(
                f"{directory / name}: {held[name]} bytes, but {size} were written; it is damaged"
            )
        if digest is not None and _hash(directory / name) != digest:
            raise CheckpointError(f"{directory / name}: is not what was written; it is damaged")


def _array(name: str, leaf: Any) -> jax.Array:
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float | bool):
        raise CheckpointError(f"{name} is a {type(leaf).__name__}; checkpoints hold arrays only")
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise CheckpointError(f"{name} is a random key; keep the seed and the step instead")
    if jax.process_count() > 1 and getattr(leaf, "is_fully_addressable", True):
        raise CheckpointError(
            f"{name} is on this process alone; put it on a mesh of all {jax.process_count()}"
        )
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def _describe(x: jax.Array) -> dict[str, Any]:
    return {"shape": list(x.shape), "dtype": str(x.dtype), "fingerprint": leaf_fingerprint(x)}


def _compare(where: str, wanted: dict[str, Any], stored: dict[str, dict[str, Any]]) -> None:
    missing, left = wanted.keys() - stored.keys(), stored.keys() - wanted.keys()
    parts = []
    if missing:
        parts.append(f"{len(missing)} leaves are missing: {files.some(missing)}")
    if left:
        parts.append(f"{len(left)} leaves are not expected: {files.some(left)}")
    for name in sorted(wanted.keys() & stored.keys()):
        x, entry = wanted[name], stored[name]
        if (list(x.shape), str(x.dtype)) != (entry["shape"], entry["dtype"]):
            found = f"{entry['dtype']}{entry['shape']}"
            parts.append(f"{name} is {found}, expected {x.dtype}{list(x.shape)}")
    if parts:
        more = f"; and {len(parts) - 10} more" if len(parts) > 10 else ""
        raise CheckpointError(f"{where} does not fit: {'; '.join(parts[:10])}{more}")


def _well_formed(trees: Any) -> bool:
    if not isinstance(trees, dict):
        return False
    leaves = [leaf for tree in trees.values() if isinstance(tree, dict) for leaf in tree.values()]
    return all(isinstance(t, dict) for t in trees.values()) and all(
        isinstance(x, dict)
        and isinstance(x.get("shape"), list)
        and isinstance(x.get("dtype"), str)
        and isinstance(x.get("fingerprint"), str)
        for x in leaves
    )


def _walk(directory: Path) -> dict[str, int]:
    """Size of every file below; a link or anything but files and directories is refused."""
    found = {}
    for base, folders, held in os.walk(directory):
        for name in folders + held:
            path = Path(base, name)
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                raise CheckpointError(f"{path}: a symbolic link; checkpoints hold plain files only")
            if stat.S_ISREG(status.st_mode):
                found[path.relative_to(directory).as_posix()] = status.st_size
            elif not stat.S_ISDIR(status.st_mode):
                raise CheckpointError(
                    f"{path}: not a regular file; checkpoints hold plain files only"
                )
    return found


def _write_orbax(path: Path, leaves: dict[str, jax.Array]) -> None:
    import orbax.checkpoint as ocp

    # Orbax refuses arrays without elements; the manifest has all there is to know about them.
    tree = names.nest({tuple(k.split("/")): x for k, x in leaves.items() if x.size})
    # In chunks, so that a block of an array can be read later without all of it.
    how = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), tree)
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            checkpointer.save(path, args=ocp.args.StandardSave(tree, how))
    except Exception as error:  # a full disk arrives as one of many types
        text = " ".join(str(error).split())
        code = re.search(r"os_error_code='(\d+)'", text)  # what TensorStore tells of the system's
        raise OSError(errno.EIO, os.strerror(int(code[1])) if code else text[:300]) from error


@contextmanager
def _told_once() -> Iterator[None]:
    """While it lasts, Orbax's threads do not print the failure that `_write_orbax` raises.

    That is, three messages: the record that a thread logs before it hands its exception over; and
    what becomes of further writes of the same tree, which TensorStore ends after the first that
    failed, when their event loop has been closed: nobody can be told, so it is "unraisable", or,
    whenever the garbage is collected later, an exception that nobody asked for.
    """
    tasks = logging.getLogger("asyncio")
    tasks.addFilter(_asked_for)
    logger, hook = logging.getLogger("absl"), sys.unraisablehook

    def others(record: logging.LogRecord) -> bool:
        return "_SignalingThread.run() raised an exception" not in record.getMessage()

    def unraisable(told: "sys.UnraisableHookArgs") -> None:
        closed = told.exc_type is RuntimeError and str(told.exc_value) == "Event loop is closed"
        if not (closed and told.object is None):
            hook(told)

    logger.addFilter(others)
    sys.unraisablehook = unraisable
    try:
        yield
        tasks.removeFilter(_asked_for)  # behind a failure it stays
    finally:
        sys.unraisablehook = hook
        logger.removeFilter(others)


def _asked_for(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return "never retrieved" not in text or "async_serialize_from_host" not in text


def _read_orbax(
    path: Path, structs: dict[str, jax.ShapeDtypeStruct], where: str
) -> dict[str, jax.Array]:
    import orbax.checkpoint as ocp

    tree = names.nest({tuple(k.split("/")): x for k, x in structs.items() if x.size})
    try:
        # Each process for itself: Orbax would wait for the others, though one may have failed.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(), active_processes={jax.process_index()}
        )
        handler = ocp.StandardCheckpointHandler()
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            restored = checkpointer.restore(path, args=ocp.args.StandardRestore(tree))
    except DeepzooError:
        raise
    except Exception as error:  # whatever Orbax and TensorStore throw, it means damaged data
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{where} cannot be read, it is damaged ({reason})") from error
    found = {"/".join(p): x for p, x in names.flatten(restored)}
    empty = {k: jnp.zeros(x.shape, x.dtype) for k, x in structs.items() if not x.size}
    return {**found, **empty}
