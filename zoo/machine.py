"""What this machine is: versions, devices, memory, disk, sandbox. Facts only; `doctor` judges them.

Nothing here imports JAX: what it sees is asked of a child process (`probe`).
"""

import csv
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SECONDS = 300  # that JAX may take to find its devices and compile the trials
PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")

# Settings that change what works; none of them holds a secret.
SETTINGS = (
    "CUDA_VISIBLE_DEVICES", "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE",
    "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_X64", "JAX_PLATFORMS", "LD_LIBRARY_PATH",
    "TRANSFORMERS_OFFLINE", "XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """An NVIDIA GPU as its driver tells, whether or not JAX can use it.

    Attributes:
        name: its model.
        driver: version of the driver.
        capability: compute capability, "9.0".
    """

    name: str
    driver: str
    capability: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """A device as JAX sees it, tried.

    Attributes:
        kind: its model.
        platform: "cpu" or "gpu".
        capability: compute capability of an NVIDIA GPU.
        free: bytes that JAX may still take of its own memory; None for the CPU.
        wrong: what is wrong with small products on it, or None.
        kernels: what is wrong with one Pallas kernel of each form, or None; GPUs only.
    """

    kind: str
    platform: str
    capability: str | None = None
    free: int | None = None
    wrong: str | None = None
    kernels: Mapping[str, str | None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """What a process that uses JAX gets here.

    Attributes:
        platform: of the default backend.
        devices: of this process.
        model: what is wrong with a shipped model, or None.
    """

    platform: str
    devices: tuple[Device, ...]
    model: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Everything that `doctor.diagnose` judges.

    Attributes:
        system: operating system and processor.
        python: its version.
        requires_python: the range that deepzoo's metadata tells.
        requirements: deepzoo's requirements, those of extras with their markers.
        jax_requirements: the same of the installed JAX, which tells the jaxlib and plugins it fits.
        installed: versions of all packages that the two lists name, and of deepzoo.
        backend: what JAX sees, or in words why it sees nothing.
        gpus: NVIDIA GPUs that the driver lists.
        memory: bytes of host memory that are free, a container's limit counted in.
        cache: the folder that downloads go to.
        disk: bytes that are free there.
        writable: whether this user may write there.
        sandbox: why programs cannot be isolated, or None.
        settings: environment variables that change what works.
    """

    system: str
    python: str
    requires_python: str
    requirements: tuple[str, ...]
    jax_requirements: tuple[str, ...]
    installed: Mapping[str, str]
    backend: Backend | str
    gpus: tuple[Gpu, ...]
    memory: int | None
    cache: str
    disk: int
    writable: bool
    sandbox: str | None
    settings: Mapping[str, str]


def look() -> Machine:
    """Looks at this machine; takes some seconds, most of them JAX's."""
    about = importlib.metadata.metadata("deepzoo")
    requirements, jax_requirements = _requires("deepzoo"), _requires("jax")
    names = {canonicalize_name(Requirement(r).name) for r in (*requirements, *jax_requirements)}
    found = {name: _version(name) for name in sorted({"deepzoo", *names, *PLUGINS})}
    cache = _cache_folder(os.environ)
    held = next(p for p in (cache, *cache.parents) if p.exists())
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        requires_python=str(about.get("Requires-Python", "")),
        requirements=requirements,
        jax_requirements=jax_requirements,
        installed={name: version for name, version in found.items() if version is not None},
        backend=ask(),
        gpus=_gpus(),
        memory=free_memory(),
        cache=str(cache),
        disk=shutil.disk_usage(held).free,
        writable=os.access(held, os.W_OK),
        sandbox=_sandbox(),
        settings={name: os.environ[name] for name in SETTINGS if name in os.environ},
    )


def ask(module: str = "deepzoo.zoo.probe", seconds: float = SECONDS) -> Backend | str:
    """What `module`, run in a child process, prints of JAX; or why there is no answer."""
    # Else JAX would take most of a GPU's memory at once, which others may be using.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", module], env=environment, capture_output=True, text=True,
            timeout=seconds, check=False, errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no answer within {seconds:g} s"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if done.returncode:
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
        return f"{lines[-1] if lines else 'it said nothing'} ({how})"
    return _backend(json.loads(done.stdout.splitlines()[-1]))


def _backend(told: dict[str, Any]) -> Backend:
    devices = tuple(Device(**device) for device in told["devices"])
    return Backend(platform=told["platform"], devices=devices, model=told["model"])


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that a program may still take: the host's or, where it is less, the container's.

    Args:
        root: where /proc and /sys are.
    """
    try:
        told = (root / "proc/meminfo").read_text()
    except OSError:
        return None
    rows = dict(line.split(":", 1) for line in told.splitlines() if ":" in line)
    free = [int(rows["MemAvailable"].split()[0]) << 10] if "MemAvailable" in rows else []
    groups = root / "sys/fs/cgroup"
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = (groups / limit).read_text().strip(), (groups / used).read_text()
        except OSError:
            continue
        if most != "max":
            free.append(max(0, int(most) - int(now)))
    return min(free, default=None)


def gpus(listed: str) -> tuple[Gpu, ...]:
    """The GPUs in nvidia-smi's table of name, driver_version, compute_cap."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(listed.splitlines())]
    return tuple(Gpu(name=r[0], driver=r[1], capability=r[2]) for r in rows if len(r) == 3)


def _gpus() -> tuple[Gpu, ...]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = "--query-gpu=name,driver_version,compute_cap"
    try:
        done = subprocess.run(
            [program, query, "--format=csv,noheader"], capture_output=True, text=True,
            timeout=30, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return gpus(done.stdout) if done.returncode == 0 else ()


def _requires(name: str) -> tuple[str, ...]:
    try:
        return tuple(importlib.metadata.requires(name) or ())
    except importlib.metadata.PackageNotFoundError:
        return ()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cache_folder(settings: Mapping[str, str]) -> Path:
    """The hub's cache, by its library's rules; the library itself may be what is missing."""
    home = settings.get("HF_HOME") or os.path.join(
        settings.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    old = settings.get("HUGGINGFACE_HUB_CACHE")
    found = settings.get("HF_HUB_CACHE") or old or os.path.join(home, "hub")
    return Path(os.path.expandvars(found)).expanduser().absolute()


def _sandbox() -> str | None:
    """Why a program that a model wrote cannot be isolated here, or None."""
    try:
        # By name, as the recipes themselves: the zoo depends on none of them.
        import_module("deepzoo.recipes.parts.sandbox").check()
    except Exception as error:
        return " ".join(str(error).split())
    return None
