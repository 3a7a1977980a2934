"""Settings of a run as plain values, and what differs between two of them."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any


def plain(value: Any) -> Any:
    """A dataclass, and whatever it holds, as JSON has it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{value!r}: settings of a recipe are plain values")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Dotted name -> "was -> is" for every value that is not the same in both."""
    old, new = _flat(before), _flat(now)
    return {
        name: f"{_told(old, name)} -> {_told(new, name)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, _NONE) != new.get(name, _NONE)
    }


_NONE = object()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, value in tree.items():
        found |= (
            _flat(value, f"{prefix}{name}.")
            if isinstance(value, Mapping) and value
            else {f"{prefix}{name}": value}
        )
    return found


def _told(flat: Mapping[str, Any], name: str) -> str:
    return repr(flat[name]) if name in flat else "nothing"
