"""Steps of R1's preset `small` as the compiler for a GPU that is not there makes them: they fit.

`python tests/recipes/test_compiled_small.py` prints the table of recipes/README.md.
"""

from pathlib import Path

import pytest

from deepzoo.kernels import aot

pytestmark = pytest.mark.skipif(bool(aot.unavailable()), reason="; ".join(aot.unavailable()))

NAMES = ("pretraining", "reinforcement")
H200 = 141e9  # bytes of device memory


def compiled(name: str) -> aot.Report:
    with aot.Compiler(limit=3000, path=(str(Path(__file__).parents[1] / "helpers"),)) as compiler:
        report = compiler.compile(aot.Job("small_cases", name, "auto", "h200"))
    assert report.error is None, report.error
    return report


def test_a_step_of_pretraining_compiles_and_fits():
    report = compiled("pretraining")
    assert report.spills() == 0
    assert {"mla_prefill_forward", "grouped_outer"} <= {k.name for k in report.pallas()}
    assert report.temp is not None and report.arguments is not None
    assert report.temp + report.arguments < H200 / 2, report


def table() -> str:
    lines = ["| step | parameters, state, batch | scratch | Pallas kernels | spilled bytes |"]
    lines.append("|---|---|---|---|---|")
    for report in map(compiled, NAMES):
        assert report.arguments is not None and report.temp is not None
        sizes = " | ".join(f"{n / 2**30:.2f} GiB" for n in (report.arguments, report.temp))
        lines.append(f"| {report.case} | {sizes} | {len(report.pallas())} | {report.spills()} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
