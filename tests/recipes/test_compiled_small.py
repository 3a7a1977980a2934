"""The steps of R1's preset `small` as a compiler for GPUs makes them: they fit, their kernels do not
spill. `python tests/recipes/test_compiled_small.py` prints the table of recipes/README.md."""

from pathlib import Path

import pytest

from deepzoo.kernels import aot

pytestmark = pytest.mark.skipif(bool(aot.unavailable()), reason="; ".join(aot.unavailable()))

NAMES = ("pretraining", "reinforcement")
H200 = 141e9  # bytes of device memory


def compiled():
    with aot.Compiler(path=(str(Path(__file__).parents[1] / "helpers"),)) as compiler:
        return [compiler.compile(aot.Job("small_cases", name, "auto", "h200")) for name in NAMES]


def test_the_steps_compile_and_fit():
    for report in compiled():
        assert report.error is None, report.error
        assert report.spills() == 0
        assert {"mla_prefill", "grouped_matmul"} <= {k.name.split("-")[0] for k in report.pallas()}
        assert report.temp is not None and report.arguments is not None
        assert report.temp + report.arguments < H200 / 2, report


def table() -> str:
    lines = ["| step | parameters, state, batch | scratch | Pallas kernels |", "|---|---|---|---|"]
    for report in compiled():
        assert report.error is None and report.arguments is not None and report.temp is not None
        sizes = " | ".join(f"{n / 2**30:.2f} GiB" for n in (report.arguments, report.temp))
        lines.append(f"| {report.case} | {sizes} | {len(report.pallas())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
