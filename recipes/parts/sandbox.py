"""Runs programs that a model wrote, and judges them by what they print.

The verdict is made here, outside: a program gets a test's input on its standard input, and what it
prints is compared by this process. Expected outputs, tests and this process's environment never
are where a program could read them. Whether it says that it passed is of no interest.

What holds a program (Linux, no further package; `sandbox_init.py` has the steps): user, mount, pid,
network, ipc and uts namespaces; a root with /usr and Python, read-only, and an empty /tmp in
memory; an unknown user without rights, unable to gain any; limits for time, memory, files and
processes; 64 KiB of output. Where that cannot be had, nothing runs at all.

What does not: a hole in the kernel, and the time that it takes. Everything under /usr can be read.
"""

import dataclasses
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from deepzoo.zoo.errors import DeepzooError

OUTPUT = 64 << 10  # bytes that are kept of each of stdout and stderr
_INIT = Path(__file__).with_name("sandbox_init.py")
_VISIBLE = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


class SandboxUnavailable(DeepzooError):
    """Programs cannot be isolated on this machine, so none is run."""


class SandboxFailure(RuntimeError):
    """The sandbox itself failed, not the program: there is no verdict."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one program may use."""

    cpu: int = 5
    """Seconds of CPU time of each of its processes."""
    wall: float = 20.0
    """Seconds."""
    memory: int = 512 << 20
    """Bytes of address space of each of its processes."""
    disk: int = 32 << 20
    """Bytes in /tmp, and of a file."""
    processes: int = 8
    """Processes and threads."""


class Result(NamedTuple):
    """How a program ended.

    Attributes:
        end: "exit"; "signal", killed, by its limit of CPU time for example; "wall", still running
            at the limit; "output", printed too much.
        status: exit status, or the signal's number; 0 for the other two.
        stdout: at most 64 KiB.
        stderr: at most 64 KiB.
        seconds: wall time.
    """

    end: Literal["exit", "signal", "wall", "output"]
    status: int
    stdout: bytes
    stderr: bytes
    seconds: float


def check() -> None:
    """Runs a program that looks around.

    Raises:
        SandboxUnavailable: it did not run, or sees what it must not.
    """
    if not sys.platform.startswith("linux"):
        raise SandboxUnavailable(
            f"programs can be isolated on Linux alone, not on {sys.platform}: take a task without"
            " code, or run this on Linux"
        )
    try:
        result = execute(_LOOK, "seen")
    except SandboxFailure as error:
        raise SandboxUnavailable(
            f"programs cannot be isolated here ({error}): allow user namespaces (in a container,"
            " unshare and mount), or take a task without code"
        ) from None
    told = result.stdout.decode(errors="replace").strip()
    if result.end != "exit" or result.status or told != "seen":
        errors = result.stderr.decode(errors="replace").strip().splitlines()
        what = told or (errors[-1] if errors else f"{result.end} {result.status}")
        raise SandboxUnavailable(
            f"programs cannot be isolated here ({what}): take a task without code"
        )


# Prints its input, if it is where it should be.
_LOOK = """
import os, sys
faults = []
if os.getpid() > 2: faults.append("sees other processes")
if os.getuid() == 0: faults.append("runs as root")
if sorted(os.environ) != ["HOME", "LANG", "PATH"]: faults.append("has the environment")
if os.path.exists("/proc/1") or os.path.exists("/etc/passwd"): faults.append("sees the system")
try:
    open("/usr/x", "w")
    faults.append("can write")
except OSError:
    pass
print(", ".join(faults) or sys.stdin.read())
"""


def execute(source: str, given: str = "", limits: Limits | None = None) -> Result:
    """Runs a Python program once.

    Args:
        source: the program; it sees the standard library alone.
        given: its standard input.
        limits: what it may use.

    Raises:
        SandboxFailure: it could not be isolated or started, or the sandbox died.
    """
    limits, nonce = limits or Limits(), secrets.token_hex(16)
    begin = time.monotonic()
    listening, told = os.pipe()
    files = [listening, told]
    try:
        stdin = _sealed(given.encode(errors="replace"), "input")
        files.append(stdin)
        order = _sealed(json.dumps(_order(source, limits, nonce, told)).encode(), "order")
        files.append(order)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(_INIT), str(order)], stdin=stdin,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=(order, told), env={},
            cwd="/", start_new_session=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        for number in files:
            os.close(number)
        raise SandboxFailure(f"cannot start: {error}") from None
    for number in files[1:]:
        os.close(number)
    assert process.stdout is not None
    assert process.stderr is not None
    with process, os.fdopen(listening, "rb") as messages:
        streams: list[IO[bytes]] = [process.stdout, process.stderr, messages]
        texts, cut = _listen(streams, begin + limits.wall, process)
    events = _events(texts[2], nonce)
    seconds = time.monotonic() - begin
    if "failed" in events:
        raise SandboxFailure(events["failed"].get("why", "?"))
    if "started" not in events:
        raise SandboxFailure(f"did not start: {texts[1].decode(errors='replace')[-200:]}")
    if cut is not None:
        return Result(cut, 0, texts[0], texts[1], seconds)
    if "ended" not in events:
        raise SandboxFailure("died")
    status = events["ended"]["status"]
    end = "exit" if status >= 0 else "signal"
    return Result(end, abs(status), texts[0], texts[1], seconds)


def solves(
    source: str, tests: Sequence[tuple[str, str]], limits: Limits | None = None
) -> tuple[float, str]:
    """(1.0, "") if the program prints what is expected for every input, else (0.0, reason).

    (nan, reason) where the sandbox failed: that says nothing about the program, and such an answer
    is dropped.

    Args:
        source: the program.
        tests: (input, expected output) pairs; spaces at the ends of lines and empty lines at the
            end do not matter.
        limits: of each run.

    Raises:
        ValueError: there are no tests; every program would pass.
    """
    if not tests:
        raise ValueError("solves: no tests, which every program would pass")
    for number, (given, expected) in enumerate(tests, 1):
        try:
            result = execute(source, given, limits)
        except SandboxFailure as error:
            return float("nan"), f"sandbox: {error}"
        if result.end != "exit":
            return 0.0, f"test {number}: {result.end}"
        if result.status:
            return 0.0, f"test {number}: status {result.status}"
        if _lines(result.stdout.decode(errors="replace")) != _lines(expected):
            return 0.0, f"test {number}: another output"
    return 1.0, ""


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _order(source: str, limits: Limits, nonce: str, told: int) -> dict[str, Any]:
    python = os.path.realpath(sys.executable)
    prefix = os.path.realpath(sys.base_prefix)
    visible = [*_VISIBLE, *_DEVICES]
    if not prefix.startswith("/usr"):
        visible.append(prefix)
    return {
        "nonce": nonce, "told": told, "parent": os.getpid(), "source": source,
        "visible": visible, "disk": limits.disk,
        "argv": [python, "-I", "-S", "-B", "/tmp/program.py"],
        "environment": {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8"},
        "limits": {
            "RLIMIT_CPU": limits.cpu, "RLIMIT_AS": limits.memory, "RLIMIT_FSIZE": limits.disk,
            "RLIMIT_NPROC": limits.processes, "RLIMIT_NOFILE": 64, "RLIMIT_CORE": 0,
            "RLIMIT_MEMLOCK": 0, "RLIMIT_MSGQUEUE": 0,
        },
    }  # fmt: skip


def _sealed(data: bytes, name: str) -> int:
    """A descriptor to read `data` from, which nobody can change; it has no name in any folder."""
    import fcntl

    number = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(number, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(number, 0, os.SEEK_SET)
    every = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(number, fcntl.F_ADD_SEALS, every)
    return number


def _listen(
    streams: list[IO[bytes]], until: float, process: subprocess.Popen
) -> tuple[list[bytes], Literal["wall", "output"] | None]:
    """Reads until all are closed, time is up or one says too much; then ends the process."""
    texts = [bytearray() for _ in streams]
    cut: Literal["wall", "output"] | None = None
    with selectors.DefaultSelector() as selector:
        for index, stream in enumerate(streams):
            selector.register(stream, selectors.EVENT_READ, index)
        while selector.get_map() and cut is None:
            left = until - time.monotonic()
            ready = selector.select(max(0.0, left))
            if not ready and left <= 0:
                cut = "wall"
            for key, _ in ready:
                data = os.read(key.fd, OUTPUT)
                if not data:
                    selector.unregister(key.fileobj)
                texts[key.data] += data
                if len(texts[key.data]) > OUTPUT:
                    cut = "output"
    if cut is not None:
        # Its child, process 1 of the namespace, dies with it, and with that everything inside.
        os.kill(process.pid, signal.SIGKILL)
    return [bytes(text[:OUTPUT]) for text in texts], cut


def _events(text: bytes, nonce: str) -> dict[str, dict[str, Any]]:
    """Messages that carry the nonce of this run, by what they tell."""
    found = {}
    for line in text.decode(errors="replace").splitlines():
        try:
            message = json.loads(line)
        except ValueError:
            continue
        if isinstance(message, dict) and message.get("nonce") == nonce:
            found[message["what"]] = message
    return found
