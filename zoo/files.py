"""Reading checkpoint directories that came from somebody else.

Nothing in such a directory is trusted: names in it are never used as paths, files are opened once
and without following links, JSON is measured before it is parsed, and safetensors headers are
parsed by the safetensors library alone. What this file hands out is names, dtypes, shapes and bytes
whose ranges were checked.
"""

import errno
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from deepzoo.zoo.errors import ConfigError, DeepzooError, WeightError

JSON_LIMIT = 64 << 20
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_JSON_DEPTH = 64
_CALL = 1 << 30  # Linux moves at most 2 GiB in one call

# The dtypes that published checkpoints of these families use. A tensor of another dtype is refused.
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
_CODES = {str(dtype): code for code, dtype in DTYPES.items()}
# Sizes of the others, needed to know where each tensor of a file with a foreign tensor lies.
_FOREIGN = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4}
_FOREIGN |= {"F64": 8, "I64": 8, "U64": 8, "C64": 8}


def dtype_code(dtype: str) -> str:
    """The safetensors spelling of one of our dtype names ("bfloat16" -> "BF16")."""
    return _CODES[dtype]


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype of one of our dtype names."""
    return DTYPES[_CODES[dtype]]


def some(names: Iterable[str], limit: int = 10) -> str:
    """Up to ten names in order, then how many more there are."""
    names = sorted(names)
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(_short, names[:limit])) + more


def _short(name: str, limit: int = 120) -> str:
    """A name from a file as one printable piece of a message."""
    name = name.encode("unicode_escape").decode()
    return name if len(name) <= limit else name[:limit] + "..."


def bare_name(name: Any, suffix: str) -> bool:
    """Whether `name` names a file of this very directory: no path, no NUL, not hidden."""
    return (
        isinstance(name, str)
        and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}", name) is not None
        and name.endswith(suffix)
    )


@contextmanager
def open_file(directory: Path, name: str) -> Iterator[int]:
    """A descriptor of a regular file in `directory`; never blocks, never leaves the directory.

    The one link that is followed is the hub cache's own: `snapshots/<commit>/name` to
    `blobs/<hash>` of the same repository.

    Raises:
        FileNotFoundError: there is no such file.
        WeightError: it is a link elsewhere, a FIFO, a device, a directory, or cannot be read.
    """
    path = directory / name
    # Without O_NONBLOCK opening a FIFO would wait for a writer that never comes.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
    try:
        target = _cache_link(path) if path.is_symlink() else path
        fd = os.open(target, flags)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise WeightError(f"{path}: a symbolic link where a file was expected") from error
        raise WeightError(f"{path}: cannot be opened ({error.strerror})") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise WeightError(f"{path}: not a regular file; checkpoints hold plain files only")
        yield fd
    finally:
        os.close(fd)


def _cache_link(path: Path) -> Path:
    """The blob that an entry of the hub cache points to.

    Raises:
        WeightError: the link leads anywhere else.
    """
    text = os.readlink(path)
    snapshot = path.parent.absolute()
    blobs = snapshot.parent.parent / "blobs"
    target = Path(os.path.normpath(snapshot / text))
    inside = snapshot.parent.name == "snapshots" and target.parent == blobs
    if not inside or not re.fullmatch(r"[0-9a-f]{40,64}", target.name):
        raise WeightError(
            f"{path}: a symbolic link to {_short(text)}; links are followed only from a hub cache's"
            " snapshots/ to its own blobs/. Copy the file itself into the directory"
        )
    return target


def read_small(directory: Path, name: str, limit: int = JSON_LIMIT) -> bytes:
    """The bytes of a file of at most `limit` bytes.

    Raises:
        FileNotFoundError: there is no such file.
        WeightError: it is larger, or no regular file.
    """
    with open_file(directory, name) as fd:
        size = os.fstat(fd).st_size
        if size > limit:
            raise WeightError(
                f"{directory / name}: {size} bytes, over the limit of {limit >> 20} MB"
            )
        data = bytearray(size)
        _pread(fd, memoryview(data), 0, directory / name)
    return bytes(data)


def read_json(
    directory: Path, name: str, error: type[DeepzooError] = WeightError
) -> dict[str, Any]:
    """A JSON object, with limits on size and depth, no key twice, and no NaN or Infinity.

    Raises:
        FileNotFoundError: there is no such file.
        DeepzooError: of the class `error`; naming the file and the reason.
    """
    path = directory / name
    try:
        data = read_small(directory, name)
    except WeightError as reason:
        raise error(str(reason)) from reason
    try:
        value = json.loads(data, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise error(f"{path}: nested deeper than any published file; refused") from None
    except (ValueError, UnicodeDecodeError) as reason:
        raise error(f"{path}: not valid JSON ({_short(str(reason))})") from None
    if not isinstance(value, dict):
        raise error(f"{path}: holds a {type(value).__name__}; expected an object")
    if _depth(value) > _JSON_DEPTH:
        raise error(f"{path}: nested deeper than {_JSON_DEPTH} levels; refused")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        double = next(k for k, _ in pairs if k in seen or seen.add(k))
        raise ValueError(f"the key {double!r} appears twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level and depth <= _JSON_DEPTH:
        depth += 1
        inner = [
            v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)
        ]
        level = [v for values in inner for v in values]
    return depth


def read_config(directory: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint directory.

    Raises:
        ConfigError: it is missing, too large, damaged or no object.
    """
    try:
        return read_json(directory, "config.json", ConfigError)
    except FileNotFoundError:
        raise ConfigError(
            f"{directory}: no config.json; expected a directory with config.json and"
            f" {SINGLE_NAME} or {INDEX_NAME}"
        ) from None


class Entry(NamedTuple):
    """Where one tensor lies: its shard, its dtype as the file spells it, shape and byte range."""

    shard: "Shard"
    code: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """One open safetensors file."""

    path: Path
    fd: int
    size: int
    identity: tuple[int, int, int]

    def read(self, out: memoryview, offset: int) -> None:
        """Fills `out` from `offset` of the file; safe from several threads.

        Raises:
            WeightError: the file ends early: it was cut after it was checked.
        """
        _pread(self.fd, out, offset, self.path)

    def verify_unchanged(self) -> None:
        """Raises WeightError if the file was written to since it was opened."""
        if _identity(self.fd) != self.identity:
            raise WeightError(
                f"{self.path}: changed while it was read; load again when it is whole"
            )


class Checkpoint(NamedTuple):
    """The weight files of a directory, open and checked against each other."""

    directory: Path
    shards: tuple[Shard, ...]
    entries: dict[str, Entry]

    def verify_unchanged(self) -> None:
        """Raises WeightError if any shard was written to since it was opened."""
        for shard in self.shards:
            shard.verify_unchanged()


@contextmanager
def open_checkpoint(directory: Path) -> Iterator[Checkpoint]:
    """Opens every shard once and reads the headers; tensors are named but not yet judged.

    Raises:
        WeightError: no weights, a damaged index or header, a shard missing or left over, a tensor
            in no shard, in two, or in another than the index says.
    """
    mapping, total = _index(directory)
    names = sorted(set(mapping.values())) if mapping is not None else [SINGLE_NAME]
    present = {name for name in os.listdir(directory) if name.endswith(".safetensors")}
    if missing := set(names) - present:
        raise WeightError(f"{directory}: missing shards: {some(missing)}; download them again")
    if extra := present - set(names):
        raise WeightError(
            f"{directory}: {some(extra)} not named by {INDEX_NAME if mapping else SINGLE_NAME};"
            " remove what does not belong to this checkpoint"
        )
    with ExitStack() as stack:
        shards, entries = [], {}
        for name in names:
            fd = stack.enter_context(open_file(directory, name))
            shard = Shard(directory / name, fd, os.fstat(fd).st_size, _identity(fd))
            shards.append(shard)
            found = _header(shard)
            if twice := found.keys() & entries.keys():
                raise WeightError(
                    f"{shard.path}: tensors that another shard has, too: {some(twice)}"
                )
            entries |= found
        if mapping is not None:
            _check_index(directory, mapping, total, entries, shards)
        yield Checkpoint(directory, tuple(shards), entries)


def _index(directory: Path) -> tuple[dict[str, str] | None, float | None]:
    """weight_map and total_size of the index, or None where there is a single file."""
    path = directory / INDEX_NAME
    try:
        index = read_json(directory, INDEX_NAME)
    except FileNotFoundError:
        if os.path.lexists(directory / SINGLE_NAME):
            return None, None
        raise WeightError(
            f"{directory}: no weights; expected {SINGLE_NAME} or {INDEX_NAME}"
        ) from None
    mapping, metadata = weight_map(index, str(path)), index.get("metadata") or {}
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total is not None and (isinstance(total, bool) or not isinstance(total, int | float)):
        raise WeightError(f"{path}: metadata.total_size is {total!r}; expected a number")
    return mapping, total


def weight_map(index: dict[str, Any], where: str) -> dict[str, str]:
    """The table of an index: tensor -> shard, every shard a bare file name.

    Raises:
        WeightError: it is missing, empty, or names anything but a file of the same directory.
    """
    mapping = index.get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise WeightError(f"{where}: weight_map is missing, empty or no object")
    for tensor, name in mapping.items():
        if not bare_name(name, ".safetensors"):
            raise WeightError(
                f"{where}: {_short(tensor)} is mapped to {_short(repr(name))}; expected the bare"
                " name of a .safetensors file in the same directory"
            )
    return mapping


def _check_index(
    directory: Path,
    mapping: dict[str, str],
    total: float | None,
    entries: dict[str, Entry],
    shards: list[Shard],
) -> None:
    path = directory / INDEX_NAME
    if lacking := mapping.keys() - entries.keys():
        raise WeightError(f"{path}: maps tensors that no shard has: {some(lacking)}")
    if extra := entries.keys() - mapping.keys():
        raise WeightError(f"{path}: does not map tensors that the shards have: {some(extra)}")
    wrong = [n for n, file in mapping.items() if entries[n].shard.path.name != file]
    if wrong:
        raise WeightError(f"{path}: maps tensors to shards that lack them: {some(wrong)}")
    # Publishers write the bytes of the tensors; some tools wrote the bytes of the files.
    held = sum(e.stop - e.start for e in entries.values())
    if total is not None and total not in (held, sum(s.size for s in shards)):
        raise WeightError(
            f"{path}: metadata.total_size is {total}, but the shards hold {held} bytes of tensors;"
            " a shard is from another checkpoint, or the index is"
        )


def _header(shard: Shard) -> dict[str, Entry]:
    """Names, dtypes, shapes and byte ranges, as the safetensors library reads them.

    The library proves that the tensors lie one after the other without holes and end at the end of
    the file. Their order and sizes therefore give every byte range, and no second parser is needed,
    not even for the float8 tensors that the library cannot hand to numpy.
    """
    length = bytearray(8)
    if shard.size >= 8:
        shard.read(memoryview(length), 0)
    if (claimed := int.from_bytes(length, "little")) > JSON_LIMIT:
        raise WeightError(
            f"{shard.path}: not a whole safetensors file (a header of {claimed} bytes, over the"
            f" limit of {JSON_LIMIT >> 20} MB)"
        )
    try:
        # Through the open descriptor: the path could by now name another file.
        with safe_open(f"/dev/fd/{shard.fd}", framework="numpy") as file:
            listed = []
            for name in file.offset_keys():
                view = file.get_slice(name)
                listed.append((name, str(view.get_dtype()), tuple(view.get_shape())))
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise WeightError(
            f"{shard.path}: not a whole safetensors file ({_short(str(error))})"
        ) from error
    _refuse_double_keys(shard)
    sizes = []
    for name, code, shape in listed:
        width = DTYPES[code].itemsize if code in DTYPES else _FOREIGN.get(code)
        if width is None:
            raise WeightError(f"{shard.path}: {_short(name)} has the unsupported dtype {code}")
        count = 1
        for n in shape:
            count *= n
        sizes.append(count * width)
    position = shard.size - sum(sizes)
    if position < 8:
        raise WeightError(f"{shard.path}: its tensors do not fit into the file")
    entries = {}
    for (name, code, shape), size in zip(listed, sizes, strict=True):
        entries[name] = Entry(shard, code, shape, position, position + size)
        position += size
    return entries


def _refuse_double_keys(shard: Shard) -> None:
    """The library takes the last of two entries with one name; the header is right otherwise."""
    length = bytearray(8)
    shard.read(memoryview(length), 0)
    text = bytearray(int.from_bytes(length, "little"))
    shard.read(memoryview(text), 8)

    def unique(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise WeightError(f"{shard.path}: its header names {_short(name)} twice")
            seen.add(name)

    try:
        json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise WeightError(
            f"{shard.path}: not a whole safetensors file ({_short(str(error))})"
        ) from error


def _identity(fd: int) -> tuple[int, int, int]:
    status = os.fstat(fd)
    return status.st_size, status.st_mtime_ns, status.st_ino


def _pread(fd: int, out: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(out):
        try:
            n = os.preadv(fd, [out[done : done + _CALL]], offset + done)
        except OSError as error:
            raise WeightError(f"{path}: cannot be read ({error.strerror})") from error
        if n == 0:
            raise WeightError(f"{path}: ended early; it was cut while it was read")
        done += n
