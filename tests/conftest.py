"""For every test: no network, and a fixed hypothesis profile.

JAX keeps its defaults: one CPU device, or the GPU. What needs several devices runs in a child
process (tests/helpers/child.py).
"""

import ipaddress
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

hypothesis.settings.register_profile("default", max_examples=50, deadline=None)
hypothesis.settings.register_profile("nightly", max_examples=5000, deadline=None)
hypothesis.settings.load_profile("default")  # another: pytest --hypothesis-profile nightly

# A shell starts what it sends to the background with Ctrl-C ignored, and children inherit that: the
# tests of Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class NetworkForbiddenError(OSError):
    """A test tried to leave this machine; an OSError, as without a network."""


def _is_local(host: object) -> bool:
    """Whether `host` is this machine: loopback, its name, or nothing (a wildcard)."""
    if host in (None, "", b"", "localhost", b"localhost"):
        return True
    try:
        return ipaddress.ip_address(str(host).partition("%")[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True, scope="module")
def forgotten_programs() -> Iterator[None]:
    """A file's compiled programs are not kept for the next file.

    Each takes some of the memory maps that Linux allows a process, 65,530; with thousands of
    programs, compiling ends the process.
    """
    yield
    if (jax := sys.modules.get("jax")) is not None:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuse connections and name look-ups beyond loopback.

    An attempt fails the test even if the code under test forgave it. A test of behaviour without
    a network carries the mark `offline`: there the refusal is the point. Sockets opened by native
    code, and by child processes, are not covered.
    """
    attempts: list[str] = []

    def refuse(host: object) -> None:
        attempts.append(str(host))
        raise NetworkForbiddenError(f"tests must not use the network; this one asked for {host!r}")

    def guard(original: Any) -> Any:
        def connect(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address[0]):
                refuse(address[0])
            return original(self, address)

        return connect

    getaddrinfo = socket.getaddrinfo

    def look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_local(host):
            refuse(host)
        return getaddrinfo(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guard(socket.socket.connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guard(socket.socket.connect_ex))
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    yield
    if attempts and request.node.get_closest_marker("offline") is None:
        pytest.fail(f"the test tried to reach {', '.join(attempts)}")
