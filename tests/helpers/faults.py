"""What can be wrong with a directory of weights: every fault in one place, made on purpose.

Each function changes files in place. Nothing here reads with the code under test: a safetensors
file is 8 bytes of length, a JSON header and the data.
"""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
type Header = list[tuple[str, dict[str, Any]]]
"""Entries of a safetensors header in order; a list, because a file can name a key twice."""


def flip_bit(path: Path, at: int, bit: int = 0) -> None:
    """Flips one bit of the byte at `at` (negative: from the end)."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def truncate(path: Path, size: int) -> None:
    """Cuts a file to `size` bytes (negative: by that many)."""
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)


def symlink(path: Path, target: Path) -> None:
    """Moves the file to `target` and leaves a link to it."""
    path.rename(target)
    path.symlink_to(target)


def fifo(path: Path) -> None:
    """Puts a pipe in the place of a file."""
    path.unlink()
    os.mkfifo(path)


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Applies `change` to the object in a JSON file."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def read_shard(path: Path) -> tuple[Header, bytes]:
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length], object_pairs_hook=list)
    return [(name, dict(entry)) for name, entry in header], raw[8 + length :]


def write_shard(path: Path, header: Header, data: bytes) -> None:
    """Writes whatever it is given, right or wrong."""
    pairs = (f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in header)
    text = ("{" + ",".join(pairs) + "}").encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_shard(path: Path, change: Callable[[Header], Any]) -> None:
    """Applies `change` to the header of a safetensors file; the data stays as it is."""
    header, data = read_shard(path)
    change(header)
    write_shard(path, header, data)


def drop_tensor(path: Path, name: str) -> None:
    """Removes a tensor and its bytes, and closes the gap."""
    header, data = read_shard(path)
    ((start, stop),) = [entry["data_offsets"] for key, entry in header if key == name]
    kept: Header = []
    for key, entry in header:
        if "data_offsets" in entry:
            moved = [n - (stop - start) if n >= stop else n for n in entry["data_offsets"]]
            entry = entry | {"data_offsets": moved}
        if key != name:
            kept.append((key, entry))
    write_shard(path, kept, data[:start] + data[stop:])


def add_tensor(path: Path, name: str, dtype: str, shape: list[int], values: bytes) -> None:
    """Appends a tensor."""
    header, data = read_shard(path)
    entry = {
        "dtype": dtype,
        "shape": shape,
        "data_offsets": [len(data), len(data) + len(values)],
    }
    write_shard(path, [*header, (name, entry)], data + values)


def set_values(path: Path, name: str, at: int, values: bytes) -> None:
    """Overwrites bytes of a tensor from byte `at` of it."""
    header, data = read_shard(path)
    start = dict(header)[name]["data_offsets"][0] + at
    write_shard(path, header, data[:start] + values + data[start + len(values) :])


def shard_of(directory: Path, name: str) -> Path:
    """The file that holds a tensor."""
    if not (directory / INDEX).exists():
        return directory / "model.safetensors"
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][name]


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything below; equal before and after what must not write."""
    found = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(directory))] = (status.st_size, status.st_mtime_ns)
    return found
