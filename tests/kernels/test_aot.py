"""Compiling for absent GPUs: figures are the compilers' own, and every fault is one row's."""

from collections.abc import Iterator
from pathlib import Path

import aot_cases
import pytest

from deepzoo.kernels import aot
from deepzoo.kernels.targets import TARGETS

needs_compiler = pytest.mark.skipif(bool(aot.unavailable()), reason="; ".join(aot.unavailable()))


@pytest.fixture(scope="module")
def compiler() -> Iterator[aot.Compiler]:
    with aot.Compiler(path=(str(Path(aot_cases.__file__).parent),)) as compiler:
        yield compiler


def _job(case: str, target: str = "h200", **kwargs) -> aot.Job:
    return aot.Job("aot_cases", case, "triton", target, **kwargs)


@needs_compiler
@pytest.mark.parametrize("target", TARGETS)
def test_a_triton_kernel_is_reported(compiler: aot.Compiler, target: str):
    report = compiler.compile(_job("good", target))
    assert report.error is None
    (kernel,) = report.pallas()
    assert kernel.name == "multiply_kernel"
    assert report.registers() == kernel.registers and 16 <= (kernel.registers or 0) <= 255
    assert report.spills() == 0
    assert report.shared is not None and 2 * 64 * 64 * 2 <= report.shared <= 20000
    assert (report.arguments, report.outputs, report.temp) == (2 * 64 * 64 * 2, 64 * 64 * 2, 0)
    assert report.custom_calls == {"__gpu$xla.gpu.triton": 1} and report.collectives == {}


@needs_compiler
def test_a_mosaic_kernel_is_reported(compiler: aot.Compiler):
    report = compiler.compile(_job("mosaic"))
    assert report.error is None and report.custom_calls == {"mosaic_gpu_v2": 1}
    assert report.spills() == 0 and report.registers() is not None
    assert report.shared is not None and 65536 <= report.shared < 66000  # its buffer, a barrier


@needs_compiler
def test_spills_are_found(compiler: aot.Compiler):
    report = compiler.compile(_job("spills"))
    assert report.error is None and (report.spills() or 0) > 0


@needs_compiler
def test_a_dense_blow_up_is_found(compiler: aot.Compiler):
    report = compiler.compile(_job("blows up"))
    assert report.temp == 2 * 512**3 and report.largest == (2 * 512**3, "bf16[512,512,512]")
    assert report.spills() is None and report.shared is None  # no kernel of Pallas: no figure


@needs_compiler
def test_too_much_shared_memory_is_one_line(compiler: aot.Compiler):
    error = compiler.compile(_job("too much shared memory")).error
    assert error is not None and "Shared memory size limit exceeded" in error
    assert "\n" not in error


@needs_compiler
def test_an_abort_costs_one_row(compiler: aot.Compiler):
    """Triton's conversion from FP8 ends the process on sm_80."""
    error = compiler.compile(_job("aborts", "a100")).error
    assert (
        error is not None and "ended the process" in error and "compute capability >= 89" in error
    )
    assert compiler.compile(_job("good", "a100")).error is None


@needs_compiler
def test_refusals_and_unknown_names_are_rows(compiler: aot.Compiler):
    report = compiler.compile(_job("refuses"))
    assert report.refused and report.error == "a reason, and another"
    report = compiler.compile(_job("nothing"))
    assert not report.refused and report.error == "aot_cases has no case 'nothing'"
    report = compiler.compile(aot.Job("no_module", "x", "xla", "h200"))
    assert report.error == "ModuleNotFoundError: No module named 'no_module'"


@needs_compiler
def test_a_slow_job_is_given_up():
    with aot.Compiler(path=(str(Path(aot_cases.__file__).parent),), limit=0.01) as compiler:
        assert compiler.compile(_job("good")).error == "still compiling after 0 s"


@needs_compiler
def test_the_program_is_written_where_asked(compiler: aot.Compiler, tmp_path: Path):
    compiler.compile(_job("good", hlo=str(tmp_path / "hlo")))
    assert "is_scheduled=true" in (tmp_path / "hlo").read_text()


LOG = """
I0101 12:00:00.000001 11 xtile_compiler.cc:595] Shared memory usage: 1024 B
I0101 12:00:00.000002 11 subprocess_compilation.cc:356] ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'mine_1' for 'sm_90a'
ptxas info    : Function properties for mine_1
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 70 registers, used 1 barriers, 376 bytes cmem[0]
I0101 12:00:00.000003 12 xtile_compiler.cc:595] Shared memory usage: 65536 B
ptxas info    : Compiling entry function 'loop_add_fusion' for 'sm_90a'
ptxas info    : Function properties for loop_add_fusion
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers
ptxas info    : Compiling entry function 'loop_add_fusion' for 'sm_90a'
ptxas info    : Function properties for loop_add_fusion
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
ptxas info    : Compiling entry function 'x_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for x_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""


def test_reports_of_the_assembler_are_read():
    assert aot.kernels(LOG, frozenset({"mine"})) == (
        aot.Kernel("mine_1", 70, 8, 4, 12, 0, True),
        aot.Kernel("loop_add_fusion", 8, 0, 0, 0, 0, False),
        aot.Kernel("x_mosaic_gpu_kernel", 168, 0, 0, 0, 1, True),
    )
    assert aot.triton_shared(LOG) == 65536
    assert aot.kernels("", frozenset()) == () and aot.triton_shared("") is None


def test_without_the_plugin_every_reason_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(aot, "ptxas", lambda: None)
    first, second = aot.unavailable()
    assert "jax-cuda13-plugin is not installed" in first and "deepzoo[aot]" in first
    assert "ptxas" in second
