"""Event files for TensorBoard, without TensorFlow.

A file is a sequence of records: length uint64, its checksum, a protocol buffer `Event`, its
checksum (little endian; CRC-32C, masked as TFRecord does it). The few fields used here are
numbered in TensorFlow's `event.proto` and `summary.proto`, which have not changed since 2017.
"""

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Events:
    """Appends rows of metrics.jsonl to a new event file in `folder`."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"events.out.tfevents.{int(time.time())}.deepzoo").open("wb")
        self._file.write(record(_double(1, time.time()) + _bytes(3, b"brain.Event:2")))

    def add(self, row: dict[str, Any]) -> None:
        """Numbers as scalars, texts as texts, under the row's step and time."""
        values = b"".join(
            _bytes(1, _value(name, value))
            for name, value in row.items()
            if name not in ("step", "time") and value is not None
        )
        head = _double(1, row.get("time") or 0.0) + _varint(2 << 3) + _varint(row["step"])
        self._file.write(record(head + _bytes(5, values)))

    def flush(self) -> None:
        """Hands everything to the system."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def record(data: bytes) -> bytes:
    """One record of the file."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked(length)) + data + struct.pack("<I", masked(data))


def masked(data: bytes) -> int:
    """Masked CRC-32C."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _value(name: str, value: Any) -> bytes:
    tag = _bytes(1, name.encode())
    if not isinstance(value, str):
        return tag + _varint(2 << 3 | 5) + struct.pack("<f", value)
    plugin = _bytes(9, _bytes(1, _bytes(1, b"text")))
    shape = _bytes(2, _bytes(2, _varint(1 << 3) + _varint(1)))
    kind = _varint(1 << 3) + _varint(7)  # DT_STRING
    return tag + plugin + _bytes(8, kind + shape + _bytes(8, value.encode()))


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _double(field: int, value: float) -> bytes:
    return _varint(field << 3 | 1) + struct.pack("<d", value)


def _bytes(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _crc_table() -> Iterator[int]:
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
        yield byte


_TABLE = tuple(_crc_table())
