"""T2: every case and form is compiled to machine code for GPUs that are not there.

Needs `deepzoo[aot]`, in an environment of its own; `.ci/run` makes two, with the newest and the
oldest jax.
"""

from collections.abc import Iterator

import jax
import pytest

from deepzoo.kernels import aot, cases
from deepzoo.kernels.cases import Case
from deepzoo.kernels.targets import TARGETS

pytestmark = pytest.mark.skipif(bool(aot.unavailable()), reason="; ".join(aot.unavailable()))

# Where each form is compiled: Mosaic's use instructions of Hopper. XLA's are the slowest to compile
# and ask the least of the compiler, so the newest jax and one GPU are enough for them.
NEWEST = jax.__version_info__ >= (0, 12)
WHERE = {
    "triton": ("h200", "a100", "b200") if NEWEST else ("h200", "a100"),
    "mosaic": ("h200",),
    "xla": ("h200",) if NEWEST else (),
}
SLACK = 64 * 2**20


@pytest.fixture(scope="module")
def compiler() -> Iterator[aot.Compiler]:
    with aot.Compiler() as compiler:
        yield compiler


def _jobs() -> list:
    return [
        pytest.param(case, form, gpu, id=f"{operation}-{case.name}-{form}-{gpu}")
        for operation in cases.operations()
        for case in cases.cases(operation)
        for form in case.forms
        for gpu in WHERE.get(form, ())
    ]


@pytest.mark.parametrize(("case", "form", "gpu"), _jobs())
def test_compiles(compiler: aot.Compiler, case: Case, form: str, gpu: str):
    report = compiler.compile(aot.Job(cases.module(case.operation), case.name, form, gpu))
    if report.refused and gpu != "h200":
        pytest.skip(f"refused on {gpu}: {report.error}")
    assert report.error is None, report.error
    if form != "xla":
        assert report.pallas(), f"ptxas reported none of the kernels: {report}"
        assert report.spills() == 0, report.pallas()
        assert report.shared is not None and report.shared <= TARGETS[gpu].shared_per_block
    assert report.collectives == {}
    assert report.temp is not None and report.arguments is not None and report.outputs is not None
    bound = case.temp or 3 * (report.arguments + report.outputs) + SLACK
    assert report.temp <= bound, f"{report.temp} bytes of scratch, largest {report.largest}"
