"""Run Python source in a child process: another device count, a kill, a clean memory peak."""

import os
import subprocess
import sys
import textwrap


def on_cpu(devices: int) -> dict[str, str]:
    """Environment for `devices` CPU devices; compiled in half the time, for programs that are
    compiled once and run a few times."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags += ["--xla_backend_optimization_level=0"]
    flags += [f"--xla_force_host_platform_device_count={devices}"]
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}


def run(
    source: str,
    *args: str,
    devices: int = 1,
    timeout: float = 300,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `source` with `devices` CPU devices and return the finished process.

    Args:
      source: a script; common indentation is removed. `args` arrive in its `sys.argv[1:]`.
      devices: how many devices jax sees on the CPU.
      timeout: seconds, then the child is killed and subprocess.TimeoutExpired raised.
      env: variables on top of the parent's.

    Raises:
      AssertionError: the child failed; the message carries the end of what it wrote.
    """
    environment = {**os.environ, **on_cpu(devices), **(env or {})}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(source), *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=os.path.dirname(
            os.path.abspath(__file__)
        ),  # not the root: `import zoo` must not find the folder
        check=False,
    )
    if done.returncode:
        tail = (done.stdout + done.stderr)[-4000:]
        raise AssertionError(f"child ended with {done.returncode}:\n{tail}")
    return done
