"""`deepzoo bench kernels`: times are of the calls themselves, wrong results are told, tables stand
where they should."""

import json
import sys
from pathlib import Path

import aot_cases
import bench_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepzoo.kernels import aot, cases
from deepzoo.zoo import cli
from deepzoo.zoo.bench import kernel_peers, kernels, timing
from deepzoo.zoo.errors import RequestError

HELPERS = (str(Path(aot_cases.__file__).parent),)


def _by_name(name: str):
    return next(c for c in bench_cases.CASES if c.name == name)


# Times.


def test_a_time_is_that_of_one_call_and_every_call_counts(monkeypatch: pytest.MonkeyPatch):
    """On a clock that ticks 1 ms for a start and 5 us for each call that was really made: a call
    gives 1, and the loop returns the sum."""
    clock, calls = [0.0], []

    def wait(result: jax.Array) -> jax.Array:
        calls.append(float(result))
        clock[0] += 1e-3 + 5e-6 * calls[-1]
        return result

    monkeypatch.setattr(timing.jax, "block_until_ready", wait)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    sets = [(jnp.ones((2, 2)),)] * 3
    found = timing.measure(lambda x: x, sets, rounds=4)
    assert (found.seconds, found.low, found.high) == pytest.approx((5e-6,) * 3)
    assert found.calls == max(calls) and found.calls % 9 == 0
    assert found.calls * 5e-6 > timing.LEAST  # long enough to be measured
    assert len([c for c in calls if c == found.calls]) == 4


def test_little_time_measures_three_rounds():
    x = jnp.ones((2, 2))
    assert timing.measure(lambda x: x, [(x,)], seconds=0, rounds=50).cold
    assert not timing.measure(lambda x: x, [(x,)], seconds=0, cache=1 << 30).cold


def test_sets_of_inputs_fill_the_cache_twice():
    x = jnp.zeros((1024,), jnp.float32)
    assert timing.nbytes((x, (x,))) == 8192
    assert timing.copies((x,), 4096) == 2 and timing.copies((x,), 1 << 30) == timing.ROTATED
    assert timing.copies((x,), 0) == 1


@pytest.mark.skipif(bool(aot.unavailable()), reason="; ".join(aot.unavailable()))
def test_the_compiled_loop_holds_every_call_and_copies_nothing(tmp_path: Path):
    """XLA may drop a call whose result is not used, or copy what a loop carries: it must not."""
    with aot.Compiler(path=HELPERS) as compiler:
        job = aot.Job("bench_cases", "loop of 3", "triton", "h200", hlo=str(tmp_path / "hlo"))
        report = compiler.compile(job)
    assert report.error is None and report.custom_calls == {"__gpu$xla.gpu.triton": 3}
    assert report.temp is not None and report.temp < 2 * 64 * 64 * 2 * 2  # results, no inputs
    body = next(
        part
        for part in (tmp_path / "hlo").read_text().split("\n}")
        if part.count("custom-call(") == 3
    )
    assert "ENTRY" not in body  # in the loop, not hoisted out of it


# Right or wrong.


def test_relative_error():
    a = np.array([3.0, 4.0])
    assert kernels.relative_error((a, a), (a, a)) == 0
    assert kernels.relative_error(a * 1.1, a) == pytest.approx(0.1)
    assert kernels.relative_error((a, a * 1.1), (a, a)) == pytest.approx(0.1)
    assert kernels.relative_error(np.array([1.0, np.nan]), np.array([1.0, 2.0])) == np.inf
    empty = np.array([1.0, -np.inf])
    assert kernels.relative_error(empty, empty) == 0
    assert kernels.relative_error(np.array([1.0, 0.0]), empty) == np.inf
    with pytest.raises(ValueError, match="shape"):
        kernels.relative_error(a, a[:1])


def test_every_form_is_a_row_and_what_is_wrong_says_so(monkeypatch: pytest.MonkeyPatch):
    found = timing.Timing(2e-3, 1e-3, 3e-3, 3, True)  # on a busy CPU anything could come out
    monkeypatch.setattr(timing, "measure", lambda *a, **k: found)
    good, refused, wrong, broken = kernels.rows_of(_by_name("product"), "cpu", seconds=0.1)
    assert (good.form, refused.form, wrong.form, broken.form) == (
        "xla",
        "triton",
        "mosaic",
        "tokamax",
    )
    assert good.error is not None and good.error < 1e-5 and good.note == ""
    assert good.seconds is not None and good.low is not None and good.high is not None
    assert good.low <= good.seconds <= good.high
    assert refused.seconds is None and "NVIDIA GPUs only" in refused.note
    assert wrong.seconds is None and wrong.error == pytest.approx(1) and "wrong" in wrong.note
    assert broken.seconds is None and broken.note == "ZeroDivisionError: division by zero"


def test_without_a_reference_the_xla_form_in_float32_is_it():
    (row, *_) = kernels.rows_of(_by_name("no reference"), "cpu", seconds=0.1)
    assert row.error is not None and 1e-4 < row.error < 1e-2  # rounded to bfloat16


def test_a_case_that_cannot_be_made_is_a_row():
    (row,) = kernels.rows_of(_by_name("no inputs"), "cpu")
    assert row.form == "all" and row.note == "MemoryError: too large"


def test_faster_than_the_hardware_is_not_believed(monkeypatch: pytest.MonkeyPatch):
    found = timing.Timing(1e-9, 1e-9, 1e-9, 3, True)
    monkeypatch.setattr(timing, "measure", lambda *a, **k: found)
    (row, *_) = kernels.rows_of(_by_name("product"), "NVIDIA H200", seconds=0.1)
    assert row.floor == pytest.approx(1e-3) and "not credible" in row.note


def test_floors_by_gpu():
    case = _by_name("product")  # 790 GFLOP, 43 bytes
    assert kernels.floor(case, "NVIDIA H200") == pytest.approx(1e-3)
    memory = case._replace(flops=0.0, bytes=4.3e9)
    assert kernels.floor(memory, "NVIDIA H200") == pytest.approx(1e-3)
    assert kernels.floor(memory, "NVIDIA H100 80GB HBM3") == pytest.approx(1e-3 * 4.8 / 3.35232)
    assert kernels.floor(case, "another") is None


def test_time_that_is_over_leaves_rows_that_say_so():
    rows = list(kernels.bench(bench_cases.CASES[:2], minutes=1e-9))
    assert [row.seconds for row in rows] == [None, None]
    assert all("not measured" in row.note for row in rows)


# Tables.


def test_lines_show_shares_aims_and_verdicts():
    row = kernels.Row("op", "c", "triton", False, 1e-3, 2e-4, 1e-4, 3e-4, 1e-4, True, 1.5e-4, 3e-4)
    assert kernels.line(row) == (
        "op: c", "triton", "1.0e-03", "200 us", "100 us", "50 %", "150 us, at least 300 us",
        "enough",
    )  # fmt: skip
    assert kernels.line(row._replace(seconds=1e-4))[-1] == "reached"
    assert kernels.line(row._replace(seconds=4e-4, cold=False))[-1] == "inputs in cache; too slow"
    assert kernels.line(row._replace(seconds=None, note="no"))[-1] == "no"
    report = aot.Report("op", "c", "triton", "a100", "0", error="why", refused=True)
    assert kernels.compiled_line(report)[-1] == "refused: why"


def test_a_table_replaces_what_stood_between_its_markers(tmp_path: Path):
    path = tmp_path / "README.md"
    path.write_text("a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n")
    kernels.write_between(path, "x", kernels.markdown(("h",), [("1|2",)]))
    assert path.read_text() == (
        "a\n<!-- x: begin -->\n| h |\n| --- |\n| 1\\|2 |\n<!-- x: end -->\nb\n"
    )
    with pytest.raises(RequestError, match="no markers"):
        kernels.write_between(path, "y", "")


def test_the_readme_has_the_markers():
    text = kernels.readme().read_text()
    for name in ("bench kernels", "compiled kernels"):
        assert f"<!-- {name}: begin -->" in text and f"<!-- {name}: end -->" in text


# Peers.


def test_every_case_with_a_peer_says_its_sizes(monkeypatch: pytest.MonkeyPatch):
    plain = jax.nn.dot_product_attention  # cuDNN is asked for even where only shapes are wanted

    def attention(*arrays, implementation: str, **kwargs):
        assert implementation == "cudnn"
        return plain(*arrays, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    by_operation: dict[str, int] = {}
    for operation in cases.operations():
        for case in cases.cases(operation):
            found = kernel_peers.problem(case)
            by_operation[operation] = by_operation.get(operation, 0) + (found is not None)
            for peer in kernel_peers.of(case):
                jax.eval_shape(peer.function, *case.abstract())  # its shapes fit ours
    assert by_operation["mla_prefill"] > 0 and by_operation["mla_decode"] > 0
    assert by_operation["router"] == 0


def test_problem_of_the_first_prefill_case():
    case = next(c for c in cases.cases("mla_prefill") if "8192 tokens, 16 heads, f" in c.name)
    assert kernel_peers.problem(case) == {
        "operation": "mla_prefill", "backward": False, "batch": 1, "queries": 8192, "keys": 8192,
        "heads": 16, "kv_heads": 16, "width": 192, "value": 128,
    }  # fmt: skip


def test_a_peer_that_does_not_start_is_told():
    with pytest.raises(RequestError, match="cannot be run as the peer's Python"):
        kernel_peers.Torch("/nowhere/python")
    with pytest.raises(RequestError, match="torch"):
        kernel_peers.Torch(sys.executable)  # the tests' environment has none


# The command.


def test_without_a_gpu_the_command_says_so_and_succeeds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU here")
    monkeypatch.setattr(aot, "unavailable", lambda: ["no plugin (pip install it)"])
    assert cli.main(["bench", "kernels"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "no GPU here: nothing is timed; what compiling for absent GPUs tells:",
        "nothing either: no plugin (pip install it)",
    ]


def test_without_a_gpu_it_shows_what_compilers_tell(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU here")
    report = aot.Report("op", "c", "xla", "h200", "0", lower=1.0, compile=2.0, temp=2**20)
    monkeypatch.setattr(aot, "unavailable", lambda: [])
    monkeypatch.setattr(kernels, "compiled", lambda *_: iter([report]))
    assert cli.main(["bench", "kernels", "--out", str(tmp_path / "x.json")]) == 0
    assert "| op: c | xla | h200 |  |  |  | 1.0 MiB | 3.0 s |  |" in capsys.readouterr().out
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["rows"][0]["temp"] == 2**20 and written["versions"]["jax"] == jax.__version__


@pytest.mark.skipif(bool(aot.unavailable()), reason="; ".join(aot.unavailable()))
def test_the_compilers_are_really_asked(capsys: pytest.CaptureFixture[str]):
    """The whole command, for the smallest case there is."""
    assert cli.main(["bench", "kernels", "--filter", "mla_decode, nano, batch 4", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.split("\n", 1)[1])["rows"]
    triton = [row for row in rows if row["form"] == "triton"]
    assert [row["target"] for row in triton] == ["h200", "a100", "b200"]
    assert all(row["error"] is None and row["shared"] > 0 for row in triton)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--filter", "nothing like it"], "no case matches 'nothing like it'"),
        (["--write", "--filter", "router"], "--write is for `bench kernels` with all cases"),
        (["--minutes", "0"], "--minutes is 0; expected more than 0"),
    ],
)
def test_mistakes(args: list[str], told: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench", "kernels", *args]) == 2
    assert told in capsys.readouterr().err
