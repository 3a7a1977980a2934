"""Directories that appear whole or not at all, whatever happens while they are written."""

import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from deepzoo.zoo.errors import DeepzooError, RequestError, WeightError

_SUFFIX = ".partial"


def check_destination(directory: str | Path, error: type[DeepzooError] = RequestError) -> Path:
    """The absolute path of a directory that can be written: it does not exist yet, or is empty.

    Raises:
        DeepzooError: of the class `error`; there is something already. Nothing is ever overwritten.
    """
    path = Path(directory).expanduser().resolve()
    if path.is_dir():
        if next(path.iterdir(), None) is not None:
            raise error(f"{path}: is not empty; name a new directory, or empty this one")
    elif os.path.lexists(path):
        raise error(f"{path}: is a file; name a new directory")
    return path


@contextmanager
def new_directory(
    directory: str | Path, needed: int, error: type[DeepzooError] = WeightError
) -> Iterator[Path]:
    """Yields a hidden directory beside `directory`, which becomes `directory` at the end.

    All files are on the disk before the one rename that makes them visible. After any exception
    nothing is left, parents made for it included; what a killed process left is removed by the next
    call for the same destination.

    Args:
        directory: must not exist or be empty.
        needed: bytes that will be written, about.
        error: class of the errors raised here.

    Raises:
        DeepzooError: of the class `error`; there is something at `directory`, there is too little
            space (checked before anything is written), or the files cannot be written; with the
            reason, the bytes needed and the bytes free.
    """
    path = check_destination(directory, error)
    made = [p for p in path.parents if not p.exists()]
    if (free := _free(path)) < needed:
        raise error(f"{path}: needs {needed:,} bytes, but {free:,} are free there")
    temporary = path.parent / f".{path.name[:150]}.{secrets.token_hex(4)}{_SUFFIX}"
    lock = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        temporary.mkdir()
        lock = _lock(temporary)
        yield temporary
        for folder, _, held in os.walk(temporary):
            for name in held:
                _sync(Path(folder, name))
            _sync(Path(folder))
        os.rename(temporary, path)  # fails if somebody put something there in the meantime
        _sync(path.parent)
    except BaseException as cause:
        free = _free(path)
        _remove(temporary)
        with suppress(OSError):
            for parent in made:
                parent.rmdir()
        if not isinstance(cause, OSError | SafetensorError):
            raise
        reason = str(cause)
        if isinstance(cause, OSError):
            taken = cause.errno in (errno.ENOTEMPTY, errno.EEXIST)
            reason = "somebody else filled it meanwhile" if taken else cause.strerror
        raise error(
            f"{path}: cannot be written ({reason}); needs {needed:,} bytes, {free:,} were free;"
            " what was written is removed"
        ) from cause
    finally:
        if lock is not None:
            os.close(lock)


def _free(path: Path) -> int:
    """Bytes that can still be written where `path` will be."""
    return shutil.disk_usage(next(p for p in path.parents if p.exists())).free


def _remove(directory: Path) -> None:
    """Removes it, and what threads still put there that did not know that another had failed."""
    gone = 0
    for _ in range(250):
        shutil.rmtree(directory, ignore_errors=True)
        gone = 0 if directory.exists() else gone + 1
        if gone == 3:
            return
        time.sleep(0.02)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _lock(directory: Path) -> int | None:
    """Marks a directory as in use for the life of this process; None if somebody else does."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def _remove_abandoned(path: Path) -> None:
    """Removes what killed processes left of earlier attempts: nobody holds their locks."""
    prefix = f".{path.name[:150]}."
    for entry in list(path.parent.iterdir()):
        token = entry.name.removeprefix(prefix).removesuffix(_SUFFIX)
        ours = entry.name == f"{prefix}{token}{_SUFFIX}" and len(token) == 8
        if not ours or entry.is_symlink() or not entry.is_dir():
            continue
        with suppress(OSError):  # such as: finished by its owner since it was listed
            if (fd := _lock(entry)) is not None:
                shutil.rmtree(entry, ignore_errors=True)
                os.close(fd)
