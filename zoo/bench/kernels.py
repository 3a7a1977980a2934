"""The kernels on this GPU: right or wrong, how fast, how near to the hardware's limit, and peers.

Without a GPU, what compiling them for absent GPUs tells: registers, spills, shared memory.
"""

import datetime
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepzoo.kernels import aot, cases
from deepzoo.kernels.cases import Case
from deepzoo.kernels.targets import TARGETS, floor_seconds
from deepzoo.zoo.bench import kernel_peers, timing
from deepzoo.zoo.errors import RequestError

Told = Callable[[str], None]

# A result this far from the reference is wrong, whatever its speed: by the narrowest float input.
WRONG = {"float32": 1e-3, "bfloat16": 1e-2, "float16": 1e-2, "float8_e4m3fn": 1e-2}


class Row(NamedTuple):
    """One case in one form, or by a peer, on this device.

    error: ||out - reference|| / ||reference||, the largest of the outputs; None if not compared.
    seconds, low, high: of one call; None if `note` says why there are none.
    floor: seconds, of arithmetic or memory traffic, on this GPU; None where its speeds are unknown.
    cold: whether the inputs were rotated through at least twice the cache.
    reach, least: seconds on one H200 that are aimed at.
    """

    operation: str
    case: str
    form: str
    peer: bool
    error: float | None = None
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    floor: float | None = None
    cold: bool | None = None
    reach: float | None = None
    least: float | None = None
    note: str = ""


def select(pattern: str | None) -> list[Case]:
    """The cases whose "operation, name" holds `pattern`, letters' case ignored.

    Raises:
        RequestError: there is none.
    """
    every = [case for operation in cases.operations() for case in cases.cases(operation)]
    found = [c for c in every if (pattern or "").lower() in f"{c.operation}, {c.name}".lower()]
    if not found:
        known = ", ".join(cases.operations()) or "none"
        raise RequestError(f"no case matches {pattern!r}; operations with cases: {known}")
    return found


def floor(case: Case, kind: str) -> float | None:
    """Seconds that the case takes at least on a GPU of this kind.

    The H200's are its measured speeds. An H100 has the same arithmetic and 3.35 instead of 4.8 TB/s
    by specification, so its memory floor is scaled by that. Others: None.
    """
    if "H200" in kind:
        return floor_seconds(case.flops, case.bytes, fp8=case.fp8)
    if "H100" in kind:
        slower = TARGETS["h200"].bandwidth / TARGETS["h100"].bandwidth
        return floor_seconds(case.flops, case.bytes * slower, fp8=case.fp8)
    return None


def cache_bytes(kind: str) -> int:
    """Bytes of level-2 cache of a GPU of this kind; 50 MiB, an H200's, where unknown."""
    known = [t.l2 for name, t in TARGETS.items() if name.upper() in kind.upper()]
    return known[0] if known else TARGETS["h200"].l2


def relative_error(found: Any, expected: Any) -> float:
    """Largest ||found - expected|| / ||expected|| over the leaves, in float64.

    Where the reference is infinite (the log-sum-exp of nothing) the result must be the same
    infinity; a NaN or a wrong infinity makes the error infinite.
    """
    worst = 0.0
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
        if a.shape != b.shape:
            raise ValueError(f"the reference has shape {b.shape}, the result {a.shape}")
        finite = np.isfinite(b)
        if not np.array_equal(a[~finite], b[~finite]) or not np.isfinite(a[finite]).all():
            return float("inf")
        size = np.linalg.norm(b[finite])
        gap = np.linalg.norm(a[finite] - b[finite])
        worst = max(worst, float(gap / size if size else gap))
    return worst


def expected(case: Case, inputs: Any) -> Any:
    """The case's reference; where it has none, the XLA form in float32."""
    if case.reference is not None:
        return case.reference(*jax.tree.map(np.asarray, inputs))

    def widen(a: jax.Array) -> jax.Array:
        return a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a

    with jax.default_matmul_precision("highest"):
        return case.outputs(jax.jit(case.bind("xla"))(*jax.tree.map(widen, inputs)))


def tolerance(inputs: Any) -> float:
    """The error beyond which a result is wrong, by the narrowest floating input."""
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(inputs)}
    return max((WRONG[k] for k in kinds if k in WRONG), default=1e-3)


def rows_of(
    case: Case, kind: str, *, seconds: float = 60, told: Told = lambda _: None,
    peers: kernel_peers.Torch | None = None,
) -> Iterator[Row]:  # fmt: skip
    """Measures every form of a case, then its peers.

    Args:
        case: what to measure.
        kind: of the device.
        seconds: that a form may take, beside compiling it.
        told: is told what is being done.
        peers: a process with torch, or None.
    """
    base = Row(case.operation, case.name, "", False, floor=floor(case, kind))
    on_h200 = "H200" in kind
    cache = cache_bytes(kind) if jax.default_backend() == "gpu" else 0
    name = f"{case.operation}, {case.name}"
    try:
        told(f"{name}: inputs")
        inputs = case.inputs(0)
        sets = [inputs, *map(case.inputs, range(1, timing.copies(inputs, cache)))]
        told(f"{name}: reference")
        wanted = expected(case, inputs)
    except Exception as error:  # out of memory, above all: the other cases go on
        yield base._replace(form="all", note=_one_line(error))
        return
    for form in case.forms:
        told(f"{name}: {form}")
        row = base._replace(form=form)
        if on_h200 and form != "xla":
            row = row._replace(reach=case.reach, least=case.least)
        yield _measured(row, case.bind(form), case.outputs, inputs, sets, wanted, cache, seconds)
    for peer in kernel_peers.of(case):
        told(f"{name}: {peer.name}")
        row = base._replace(form=peer.name, peer=True)
        yield _measured(row, peer.function, peer.outputs, inputs, sets, wanted, cache, seconds)
    if peers is not None:
        for peer_name, found in peers.measure(case):
            yield base._replace(form=peer_name, peer=True, **found)


def _measured(row: Row, function, outputs, inputs, sets, wanted, cache, seconds) -> Row:
    try:
        if outputs is not None:
            error = relative_error(outputs(jax.jit(function)(*inputs)), wanted)
            row = row._replace(error=error)
            if error > tolerance(inputs):
                return row._replace(note=f"wrong: more than {tolerance(inputs):g} away")
        found = timing.measure(function, sets, cache=cache, seconds=seconds)
    except Exception as error:  # a form that does not run is a row that says so
        return row._replace(note=_one_line(error))
    row = row._replace(seconds=found.seconds, low=found.low, high=found.high, cold=found.cold)
    if found.seconds <= 0 or (row.floor is not None and found.seconds < 0.8 * row.floor):
        # Faster than the hardware can be: something was not computed, or the floor is wrong.
        return row._replace(note="below the floor: not credible")
    return row


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def facts() -> dict[str, Any]:
    """Date, device and versions."""
    device = jax.devices()[0]
    named = (
        "deepzoo", "jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cuda-nvcc", "tokamax", "torch",
        "triton",
    )  # fmt: skip
    versions = {"python": platform.python_version()}
    for name in named:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device.device_kind,
        "versions": versions,
    }


def compiled(
    chosen: Sequence[Case], targets: Sequence[str], told: Told = lambda _: None
) -> Iterator[aot.Report]:
    """Compiles every form of the cases for GPUs that need not be there."""
    with aot.Compiler() as compiler:
        for case in chosen:
            for form in case.forms:
                if form not in ("xla", "triton", "mosaic"):
                    continue
                fitting = [
                    t for t in targets if form != "mosaic" or TARGETS[t].capability == (9, 0)
                ]
                for target in fitting if form != "xla" else targets[:1]:
                    told(f"{case.operation}, {case.name}: {form} for {target}")
                    job = aot.Job(cases.module(case.operation), case.name, form, target)
                    yield compiler.compile(job)


def microseconds(seconds: float | None) -> str:
    """Three figures, in us or ms."""
    if seconds is None:
        return ""
    return f"{seconds * 1e6:.3g} us" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


HEADER = ("case", "form", "error", "median", "floor", "of the floor", "aim", "remarks")


def line(row: Row) -> tuple[str, ...]:
    """A row as the table shows it."""
    share = "" if not row.seconds or not row.floor else f"{100 * row.floor / row.seconds:.0f} %"
    aim = "" if row.reach is None else microseconds(row.reach)
    if row.least is not None:
        aim += f", at least {microseconds(row.least)}"
    remarks = [row.note] if row.note else []
    if row.cold is False:
        remarks.append("inputs in cache")
    if row.least is not None and row.seconds is not None and not row.note:
        remarks.append(
            "reached" if row.seconds <= (row.reach or 0) else
            "enough" if row.seconds <= row.least else "too slow"
        )  # fmt: skip
    return (
        f"{row.operation}: {row.case}",
        row.form,
        "" if row.error is None else f"{row.error:.1e}",
        microseconds(row.seconds),
        microseconds(row.floor),
        share,
        aim,
        "; ".join(remarks),
    )


COMPILED_FOR = ("h200", "a100", "b200")
COMPILED_HEADER = (
    "case", "form", "GPU", "registers", "spilled", "shared memory", "scratch", "compile", "remarks",
)  # fmt: skip


def compiled_line(report: aot.Report) -> tuple[str, ...]:
    """A report of the compilers as the table shows it; what none of them reported stays empty."""
    shown = ("", "", "", "", "")
    if report.error is None:
        registers, spills = report.registers(), report.spills()
        shown = (
            "" if registers is None else str(registers),
            "" if spills is None else f"{spills} B",
            "" if report.shared is None else f"{report.shared / 1024:.1f} KiB",
            "" if report.temp is None else f"{report.temp / 2**20:.1f} MiB",
            f"{(report.lower or 0) + (report.compile or 0):.1f} s",
        )
    remark = "" if report.error is None else report.error
    if report.refused:
        remark = f"refused: {remark}"
    where = (f"{report.operation}: {report.case}", report.form, report.target)
    return (*where, *shown, remark)


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    shown = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in shown)


def readme() -> Path:
    """`kernels/README.md` of this checkout.

    Raises:
        RequestError: there is none, since this is an installed package.
    """
    import deepzoo.kernels

    path = Path(next(iter(deepzoo.kernels.__path__))) / "README.md"
    if not path.is_file():
        raise RequestError(f"--write needs a checkout; there is no {path}")
    return path


def write_between(path: Path, name: str, text: str) -> None:
    """Replaces what stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->`.

    Raises:
        RequestError: the file has no such markers.
    """
    before = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(before):
        raise RequestError(f"{path} has no markers {begin} and {end}")
    after = pattern.sub(lambda _: f"{begin}\n{text}\n{end}", before, count=1)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(after, encoding="utf-8")
    os.replace(temporary, path)


class Deadline:
    """Minutes that all cases together may take."""

    def __init__(self, minutes: float):
        self.minutes = minutes
        self.end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Seconds; negative once it is over."""
        return self.end - time.monotonic()


def bench(
    chosen: Sequence[Case],
    *,
    minutes: float = 30,
    told: Told = lambda _: None,
    torch: kernel_peers.Torch | None = None,
) -> Iterator[Row]:
    """Measures the cases one by one; those for which no time is left get a row that says so."""
    kind = jax.devices()[0].device_kind
    deadline = Deadline(minutes)
    for n, case in enumerate(chosen):
        if deadline.left() <= 0:
            yield Row(
                case.operation, case.name, "all", False, floor=floor(case, kind),
                note=f"not measured: {minutes:g} minutes were over",
            )  # fmt: skip
            continue
        # What is left is shared among the cases to come; half of it goes to compiling.
        share = deadline.left() / (len(chosen) - n) / (2 * max(1, len(case.forms)))
        yield from rows_of(case, kind, seconds=max(1.0, min(60.0, share)), told=told, peers=torch)


def as_json(rows: Sequence[Row | aot.Report], known: dict[str, Any]) -> str:
    """The rows and what was measured on what."""
    shown = [aot.as_json(row) if isinstance(row, aot.Report) else row._asdict() for row in rows]
    return json.dumps(known | {"rows": shown}, indent=2)
