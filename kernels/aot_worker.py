"""The child process of `kernels/aot.py`: one job a line on stdin, one report a line on stdout."""

import importlib
import json
import os
import re
import sys
import time
from collections import Counter
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.extend.mlir import ir
from jax.interpreters import mlir

from deepzoo.kernels import aot
from deepzoo.kernels.cases import Case
from deepzoo.kernels.dispatch import UnsupportedError
from deepzoo.kernels.targets import TARGETS

TRITON, MOSAIC = "__gpu$xla.gpu.triton", "mosaic_gpu_v2"
COLLECTIVES = (
    "all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter",
)  # fmt: skip


def compile_case(case: Case, form: str, target: str) -> tuple[Any, Any, float, float]:
    """Lowered and compiled program of a case, and the seconds of each."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGETS[target].config_text(), topology="1x1x1"
    )
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    inputs = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), case.abstract()
    )
    # The default device tells dispatch and both Pallas backends which GPU this is for.
    with jax.default_device(topology.devices[0]):
        start = time.perf_counter()
        lowered = jax.jit(case.bind(form)).lower(*inputs)
        middle = time.perf_counter()
        compiled = lowered.compile()
    return lowered, compiled, middle - start, time.perf_counter() - middle


def mosaic_shared(lowered: Any) -> int | None:
    """Most bytes of dynamic shared memory that a Mosaic kernel of the program asks for."""
    blobs: list[bytes] = []

    def collect(op: Any) -> ir.WalkResult:
        op = op.operation
        if op.name == "stablehlo.custom_call" and MOSAIC in str(op.attributes["call_target_name"]):
            config = ir.DictAttr(op.attributes["mhlo.backend_config"])
            blobs.append(ir.StringAttr(config["module"]).value_bytes)
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(collect)
    sizes: list[int] = []

    def launch(op: Any) -> ir.WalkResult:
        op = op.operation
        if op.name.endswith("gpu.launch"):  # its one operand of type i32 is the dynamic memory
            wide = [o for o in op.operands if str(o.type) == "i32"]
            for operand in wide:
                constant = operand.owner.attributes["value"]
                sizes.append(int(ir.IntegerAttr(constant).value))
        return ir.WalkResult.ADVANCE

    if not blobs:
        return None
    from jax.experimental.mosaic.gpu import core

    for blob in blobs:
        context = mlir.make_ir_context()
        core.dialect.register_dialect(context)  # pyright: ignore[reportPrivateImportUsage]
        context.load_all_available_dialects()
        context.allow_unregistered_dialects = True
        with context, ir.Location.unknown():
            ir.Module.parse(blob).operation.walk(launch)
    return max(sizes, default=None)


_SHAPE = re.compile(r"\b(pred|[bfsuc]\w*\d+\w*)\[([\d,]*)\]")
_RESULT = re.compile(r"^\s+(?P<root>ROOT )?%\S+ = (?P<shape>\(?[^=]*?\)?) (?P<op>[a-z][\w-]*)\(")
_NOT_WRITTEN = {
    "parameter",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "conditional",
    "call",
}


def array_bytes(kind: str, dimensions: str) -> int:
    """Bytes of an HLO array such as ("bf16", "64,128")."""
    bits = 8 if kind == "pred" else int(re.search(r"\d+", kind.split("e")[0])[0])  # type: ignore[index]
    sizes = [int(d) for d in dimensions.split(",") if d]
    return int(np.prod(sizes, dtype=np.int64)) * bits // 8


def written(hlo: str) -> tuple[int, str] | None:
    """The largest array that an instruction outside of fusions writes, but the entry's result."""
    best: tuple[int, str] | None = None
    fused = set(re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", hlo))
    inside, entry = False, False
    for line in hlo.splitlines():
        if line and not line[0].isspace():
            name = re.match(r"(?:ENTRY )?%?([\w.-]+) ", line)
            inside, entry = bool(name and name[1] in fused), line.startswith("ENTRY")
            continue
        match = _RESULT.match(line)
        if inside or not match or match["op"] in _NOT_WRITTEN or (entry and match["root"]):
            continue
        if match["op"].endswith("-start"):  # its result repeats its operands; -done has the rest
            continue
        for kind, dimensions in _SHAPE.findall(match["shape"]):
            size = array_bytes(kind, dimensions)
            if best is None or size > best[0]:
                best = size, f"{kind}[{dimensions}]"
    return best


def pallas_names(hlo: str) -> frozenset[str]:
    """Names of the Triton kernels that the program's custom calls carry."""
    lines = [line for line in hlo.splitlines() if f'custom_call_target="{TRITON}"' in line]
    names = [re.findall(r'\bname = "([^"]+)"', line) for line in lines]
    return frozenset(re.sub(r"\W", "_", n) for found in names for n in found)


def run(job: aot.Job, log: Any) -> aot.Report:
    """Compiles a job; `log` returns what has been printed since it began."""
    operation = job.module.split(".")[-2] if "." in job.module else job.module
    report = aot.Report(operation, job.case, job.form, job.target, jax.__version__)
    try:
        cases: tuple[Case, ...] = importlib.import_module(job.module).CASES
        case = next((c for c in cases if c.name == job.case), None)
        if case is None:
            return report._replace(error=f"{job.module} has no case {job.case!r}")
        report = report._replace(operation=case.operation)
        lowered, compiled, lower, compile_ = compile_case(case, job.form, job.target)
        hlo, shared = compiled.as_text(), mosaic_shared(lowered)
    except UnsupportedError as error:
        return report._replace(error=_line(error), refused=True)
    except Exception as error:  # whatever a compiler raises is this job's result
        return report._replace(error=f"{type(error).__name__}: {_line(error)}")
    if job.hlo is not None:
        with open(job.hlo, "w", encoding="utf-8") as file:
            file.write(hlo)
    said = log()
    calls = Counter(re.findall(r'custom_call_target="([^"]+)"', hlo))
    both = (shared, aot.triton_shared(said) if TRITON in calls else None)
    memory = compiled.memory_analysis()
    return report._replace(
        lower=lower,
        compile=compile_,
        kernels=aot.kernels(said, pallas_names(hlo)),
        shared=max((s for s in both if s is not None), default=None),
        temp=memory.temp_size_in_bytes,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        largest=written(hlo),
        custom_calls=dict(calls),
        collectives={
            name: count
            for name in COLLECTIVES
            if (count := len(re.findall(rf" {name}(?:-start)?\(", hlo)))
        },
    )


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def main() -> None:
    """Serves jobs until stdin ends. What is printed meanwhile goes to the log, which is stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def log() -> str:
        sys.stdout.flush()
        size = os.fstat(2).st_size
        return os.pread(2, size, 0).decode(errors="replace")

    for line in sys.stdin:
        os.ftruncate(2, 0)
        os.lseek(2, 0, os.SEEK_SET)
        report = run(aot.Job(**json.loads(line)), log)
        print(json.dumps(aot.as_json(report)), file=answers, flush=True)


if __name__ == "__main__":
    main()
