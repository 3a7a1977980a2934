"""What every process of a comparison shares: lines of JSON, and the memory it needed.

Standard library only, for peers run it in environments of their own.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Channel:
    """Answers on what was standard output; whatever a library prints goes to standard error."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, **answer: Any) -> None:
        """Writes one answer."""
        print(json.dumps(answer), file=self._out, flush=True)

    def requests(self) -> Iterator[dict[str, Any]]:
        """Requests, until the other side is done."""
        for line in sys.stdin:
            yield json.loads(line)


def clock() -> float:
    """Seconds: of the wall, or, where PEERS_CLOCK is cpu, of all threads of this process."""
    return time.process_time() if os.environ.get("PEERS_CLOCK") == "cpu" else time.perf_counter()


def memory() -> dict[str, int]:
    """Bytes of this process: resident, the most since `forget`, and what is not a mapped file."""
    rows = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    names = {"resident": "VmRSS", "peak": "VmHWM", "anonymous": "RssAnon"}
    return {name: int(rows[row].split()[0]) << 10 for name, row in names.items()}


def forget() -> int:
    """Lets the peak start from what is resident now; returns that."""
    _CLEAR.write_text("5")
    return memory()["resident"]
