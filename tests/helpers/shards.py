"""Safetensors files as dicts of tensors, read and written without the library or the zoo."""

import contextlib
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from faults import snapshot

type Held = dict[str, tuple[str, list[int], bytes]]
"""name -> (dtype, shape, bytes)"""


def tensors(path: Path) -> Held:
    """The tensors of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def put(path: Path, held: Held) -> None:
    """Writes a safetensors file with these tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape, data) in held.items():
        end = position + len(data)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    body = b"".join(data for _, _, data in held.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def edit(path: Path, change: Callable[[Held], Any]) -> None:
    """Changes the tensors of a safetensors file; `change` edits the dict of `tensors`."""
    held = tensors(path)
    change(held)
    put(path, held)


def poke(path: Path, name: str, index: int, value: Any) -> None:
    """Overwrites element `index` of a tensor with the bytes of `value` (a numpy scalar)."""

    def change(held: Held) -> None:
        dtype, shape, data = held[name]
        raw = np.asarray(value).tobytes()
        at = index * len(raw)
        held[name] = (dtype, shape, data[:at] + raw + data[at + len(raw) :])

    edit(path, change)


@contextlib.contextmanager
def unchanged(directory: Path) -> Iterator[None]:
    """Fails if anything below `directory` is written, made or removed."""
    before = snapshot(directory)
    yield
    assert snapshot(directory) == before


def copy_case(case: Path, directory: Path) -> Path:
    """A golden checkpoint without the numbers beside it, to be damaged."""
    shutil.copytree(case, directory)
    for name in ("expected.npz", "config_published.json"):
        (directory / name).unlink(missing_ok=True)
    return directory
