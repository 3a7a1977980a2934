"""transformers on the same GPU with the same sizes, in a process of its own."""

import contextlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepzoo.zoo.config import Config
from deepzoo.zoo.errors import RequestError

PEERS = {"transformers": Path(__file__).parent / "peers" / "transformers_gpu.py"}


def measure(
    against: str | None,
    python: str | None,
    config: Config,
    prefill: tuple[tuple[int, int], ...],
    decode: tuple[int, ...],
    context: int,
    steps: int,
    rounds: int,
    told: Callable[[str], None],
) -> dict[str, tuple[float | None, str]]:
    """Tokens a second of the peer, or why there are none, by the name of the row.

    Raises:
        RequestError: an unknown peer, no Python for it, or one that does not start.
    """
    from deepzoo.zoo.bench.gpu import decode_name, prefill_name

    if against is None:
        return {}
    if against not in PEERS:
        raise RequestError(f"unknown peer {against!r}; choose from {', '.join(PEERS)}")
    if python is None:
        raise RequestError(
            f"--against {against} needs --peer-python, the Python of an environment with torch and"
            f" {against}"
        )
    requests: list[tuple[str, int, dict[str, Any]]] = [
        (prefill_name(b, t), b * t, {"operation": "prefill", "batch": b, "tokens": t})
        for b, t in prefill
    ]
    for batch in decode:
        request = {"operation": "decode", "batch": batch, "tokens": context, "steps": steps}
        requests.append((decode_name(batch, context), batch, request))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    try:
        process = subprocess.Popen(
            [python, str(PEERS[against])], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
    except OSError as error:
        raise RequestError(
            f"{python}: cannot be run as the peer's Python: {error.strerror}"
        ) from None
    found: dict[str, tuple[float | None, str]] = {}
    try:
        told(f"{against}: random weights")
        _ask(process, {"config": config.to_hf()}, against)
        for name, tokens, request in requests:
            told(f"{against}: {name}")
            answer = _ask(process, request | {"rounds": rounds}, against)
            seconds = answer.get("seconds")
            said = f"peer: {answer['note']}" if answer.get("note") else ""
            found[name] = (tokens / seconds if seconds else None, said)
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # what it did not read any more
                    stream.close()
    return found


def _ask(process: "subprocess.Popen[str]", request: dict[str, Any], name: str) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    with contextlib.suppress(BrokenPipeError):  # what it said when it ended is read below
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        said = process.stderr.read().strip().splitlines() or ["nothing"]
        raise RequestError(f"the peer {name} ended; the last it said: {said[-1]}")
    return json.loads(line)
