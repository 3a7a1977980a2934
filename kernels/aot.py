"""Compiling cases to machine code for GPUs that are not there, and reading what the compiler says.

XLA's GPU compiler, Triton and Mosaic run on any machine: they need the CUDA plugin of JAX and the
assembler `ptxas`, but neither a driver nor a GPU. The work is done by a child process
(`kernels/aot_worker.py`), since JAX chooses its backends once per process and since a compiler that
aborts must cost one row and not the report. Registers and spills come from ptxas' own report, the
shared memory of a Triton kernel from XLA's log, that of a Mosaic kernel from its launch operation.
A figure that none of them reported is None; nothing is estimated.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, Self

INSTALL = "pip install 'deepzoo[aot]', in an environment of its own"


class Job(NamedTuple):
    """What to compile: the case `case` of `module`.CASES in the form `form` for a target.

    hlo: path that the scheduled HLO is written to, or None.
    """

    module: str
    case: str
    form: str
    target: str
    hlo: str | None = None


class Kernel(NamedTuple):
    """One kernel as ptxas reports it; bytes a thread, but `shared` (static) a block."""

    name: str
    registers: int | None
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    pallas: bool


class Report(NamedTuple):
    """What compiling one job gave. Everything after `error` is only there if it is None.

    error: one line, or None. refused: the form itself refuses this case on this GPU.
    lower, compile: seconds.
    kernels: every kernel of the program, XLA's own included.
    shared: most bytes of dynamic shared memory of a block of a Pallas kernel (of any Triton kernel
        of the program); None if not reported or if there is no such kernel.
    temp, arguments, outputs: bytes of device memory.
    largest: bytes and text of the largest array the program writes beside its outputs.
    custom_calls, collectives: how often each occurs in the scheduled program.
    """

    operation: str
    case: str
    form: str
    target: str
    jax: str
    error: str | None = None
    refused: bool = False
    lower: float | None = None
    compile: float | None = None
    kernels: tuple[Kernel, ...] = ()
    shared: int | None = None
    temp: int | None = None
    arguments: int | None = None
    outputs: int | None = None
    largest: tuple[int, str] | None = None
    custom_calls: dict[str, int] = {}  # noqa: RUF012  (never written to)
    collectives: dict[str, int] = {}  # noqa: RUF012

    def pallas(self) -> tuple[Kernel, ...]:
        """The kernels that Pallas made."""
        return tuple(k for k in self.kernels if k.pallas)

    def registers(self) -> int | None:
        """Most registers of a thread of a Pallas kernel, None if not reported."""
        return max((k.registers for k in self.pallas() if k.registers is not None), default=None)

    def spills(self) -> int | None:
        """Bytes that the Pallas kernels spill, stores and loads, None if not reported."""
        found = self.pallas()
        return sum(k.spill_stores + k.spill_loads for k in found) if found else None


def unavailable() -> list[str]:
    """Every reason why nothing can be compiled for an absent GPU here; none if it can."""
    reasons = []
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        reasons.append(f"jax-cuda13-plugin is not installed ({INSTALL})")
    else:
        jax, plugin = (importlib.metadata.version(n) for n in ("jax", "jax-cuda13-plugin"))
        if jax != plugin:
            reasons.append(f"jax is {jax} and jax-cuda13-plugin {plugin}; they must be the same")
    if ptxas() is None:
        reasons.append(f"no ptxas, CUDA's assembler, was found ({INSTALL})")
    return reasons


def ptxas() -> str | None:
    """The `ptxas` that XLA's compiler would find: the environment's own before the machine's."""
    folders = [Path("/usr/local/cuda")]
    nvidia = importlib.util.find_spec("nvidia")
    if nvidia is not None and nvidia.submodule_search_locations:
        folders = [Path(p) / "cu13" for p in nvidia.submodule_search_locations] + folders
    found = (str(p / "bin/ptxas") for p in folders if (p / "bin/ptxas").is_file())
    return next(found, shutil.which("ptxas"))


class Compiler:
    """A child process that compiles jobs one by one, and is started again if it dies.

    Args:
        limit: seconds a job may take.
        path: folders put in front of the child's import path.
    """

    def __init__(self, *, limit: float = 300, path: tuple[str, ...] = ()):
        self.limit = limit
        self.path = path
        self.process: subprocess.Popen[bytes] | None = None
        self.log = tempfile.TemporaryFile()  # what compilers print, of the present job

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child."""
        self._stop()
        self.log.close()

    def compile(self, job: Job) -> Report:
        """Compiles `job`. Does not raise for what goes wrong in it: the report says so."""
        if self.process is None or self.process.poll() is not None:
            self._start()
        process = self.process
        assert process is not None and process.stdin is not None
        try:
            process.stdin.write(json.dumps(job._asdict()).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return self._died(job)
        line = self._read(process)
        if line is None:
            self._stop()
            return self._failed(job, f"still compiling after {self.limit:.0f} s")
        if not line:
            return self._died(job)
        found = json.loads(line)
        found["kernels"] = tuple(Kernel(**k) for k in found["kernels"])
        found["largest"] = found["largest"] and tuple(found["largest"])
        return Report(**found)

    def _start(self) -> None:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu,cuda",
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # a cached program would have no report
            "MOSAIC_GPU_DUMP_PTXAS": "1",
            "TF_CPP_MIN_LOG_LEVEL": "0",
            "TF_CPP_VMODULE": "subprocess_compilation=2,xtile_compiler=2",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # where there is a GPU, leave it to others
        }
        before = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([*self.path, *([before] if before else [])])
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "deepzoo.kernels.aot_worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=environment,
            cwd=tempfile.gettempdir(),
        )  # fmt: skip

    def _read(self, process: subprocess.Popen[bytes]) -> bytes | None:
        """The next line of the child; b"" if it died, None if it took too long."""
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], self.limit)
        return process.stdout.readline() if ready else None

    def _stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def _died(self, job: Job) -> Report:
        assert self.process is not None
        code = self.process.wait()
        self.process.communicate()
        self.process = None
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        self.log.seek(0)
        said = _reason(self.log.read().decode(errors="replace"))
        return self._failed(job, f"the compiler ended the process ({how}){said}")

    def _failed(self, job: Job, error: str) -> Report:
        version = importlib.metadata.version("jax")
        operation = job.module.split(".")[-2] if "." in job.module else job.module
        return Report(operation, job.case, job.form, job.target, version, error=error)


def _reason(log: str) -> str:
    """The line of a dead compiler's log that says why, as ": line", or nothing."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    pattern = r"Fatal Error|Check failed|LLVM ERROR|UNREACHABLE|Assertion|\berror:|\w+Error: "
    hits = [line for line in lines if re.search(pattern, line)]
    return ": " + re.sub(r"^[EFIW]\d{4} .*?\] ", "", hits[0])[:300] if hits else ""


_PTXAS = re.compile(
    r"Compiling entry function '(?P<name>[^']+)' for '[^']+'\s*"
    r"(?P<rest>.*?)Used (?P<registers>\d+) registers(?P<used>[^\n]*)",
    re.DOTALL,
)
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def kernels(log: str, pallas: frozenset[str]) -> tuple[Kernel, ...]:
    """The kernels in a log with ptxas' reports.

    XLA assembles some of its own kernels twice, so of those the last report of a name counts.
    Kernels of Pallas may share a name and are all listed.

    Args:
        log: what the compilers printed.
        pallas: names that Triton kernels of Pallas carry in the program.
    """
    found: dict[Any, Kernel] = {}
    for match in _PTXAS.finditer(log):
        frames = [tuple(map(int, f)) for f in _FRAME.findall(match["rest"])]
        stack, stores, loads = (sum(f[i] for f in frames) for i in range(3))
        shared = re.search(r"(\d+) bytes smem", match["used"])
        name = match["name"]
        mine = name.endswith("mosaic_gpu_kernel") or re.sub(r"_\d+$", "", name) in pallas
        kernel = Kernel(
            name, int(match["registers"]), stack, stores, loads, int(shared[1]) if shared else 0,
            mine or name in pallas,
        )  # fmt: skip
        found[kernel if kernel.pallas else name] = kernel
    return tuple(found.values())


def triton_shared(log: str) -> int | None:
    """Most bytes of shared memory of a Triton kernel, by XLA's log."""
    return max(map(int, re.findall(r"Shared memory usage: (\d+) B", log)), default=None)


def as_json(report: Report) -> dict[str, Any]:
    """`report` as JSON can hold it."""
    return report._asdict() | {"kernels": [k._asdict() for k in report.kernels]}
