"""Wall and CPU time of the parts of a long job, kept in a file however often the job is ended."""

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax


class Clock:
    """Adds up the times of named parts in a JSON file.

    A part that is running is written down about once a second, so a kill costs no more than that.

    Attributes:
        parts: name -> {"wall", "cpu": seconds, children included; "starts"}.
    """

    def __init__(self, path: Path, *, every: float = 1.0):
        """Goes on from what `path` holds; `every`: seconds between writes."""
        self._path, self._every = path, every
        self.parts: dict[str, dict[str, Any]] = read(path).get("parts", {})

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the block to `name`."""
        before = self.parts.get(name, {"wall": 0.0, "cpu": 0.0, "starts": 0})
        begin, ended = (time.perf_counter(), _cpu()), threading.Event()

        def write() -> None:
            self.parts[name] = {
                "wall": round(before["wall"] + time.perf_counter() - begin[0], 3),
                "cpu": round(before["cpu"] + _cpu() - begin[1], 3),
                "starts": before["starts"] + 1,
            }
            self._write()

        def now_and_then() -> None:
            while not ended.wait(self._every):
                with contextlib.suppress(OSError):  # such as a full disk: the last write tells it
                    write()

        write()
        thread = threading.Thread(target=now_and_then, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            write()

    def _write(self) -> None:
        device = jax.devices()[0].device_kind
        machine = f"{platform.machine()}, {os.cpu_count()} CPU cores, jax on {device}"
        partial = self._path.with_suffix(".tmp")
        text = json.dumps({"machine": machine, "parts": self.parts}, indent=1)
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, self._path)


def read(path: Path) -> dict[str, Any]:
    """What a clock has written: {"machine": text, "parts": see `Clock`}; empty without a file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _cpu() -> float:
    """CPU seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])
