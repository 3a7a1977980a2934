"""What XLA's GPU compiler makes of a decode step, for a GPU that is not there: does a scan over
stacked layers copy each layer's weights before a kernel of Pallas reads them? It does."""

from pathlib import Path

import decode_cases
import pytest

from deepzoo.kernels import aot

pytestmark = pytest.mark.skipif(bool(aot.unavailable()), reason="; ".join(aot.unavailable()))

MATRIX = decode_cases.LAYER // 3


def test_a_scan_copies_the_experts_and_unrolled_layers_do_not():
    with aot.Compiler(path=(str(Path(decode_cases.__file__).parent),)) as compiler:
        jobs = (aot.Job("decode_cases", n, "auto", "h200") for n in ("scanned", "unrolled"))
        scanned, unrolled = map(compiler.compile, jobs)
    for report in (scanned, unrolled):
        assert report.error is None, report.error
        assert report.spills() == 0
        assert {"mla_decode", "grouped_matmul"} <= {k.name for k in report.pallas()}
        assert report.temp is not None and report.largest is not None
    assert scanned.temp >= decode_cases.LAYER and scanned.largest[0] == MATRIX  # pyright: ignore
    assert unrolled.temp < MATRIX and unrolled.largest[0] < MATRIX  # pyright: ignore
