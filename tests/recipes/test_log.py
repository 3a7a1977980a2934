"""What a run writes down: rows, event files, the table; and what is cut off when it goes on."""

import json
import struct
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepzoo import zoo
from deepzoo.recipes.parts import events, log
from deepzoo.recipes.parts.flops import counted, flops_of_rows, flops_per_token, peak_flops
from deepzoo.recipes.parts.log import METRICS, TIMES, Log, figures, read_metrics
from deepzoo.recipes.parts.step import Mean, Peak, start
from deepzoo.zoo.count import count

GATE = {"weight": jnp.ones((2, 4, 3)), "e_score_correction_bias": jnp.array([[0, 0.5, 0, 0]] * 2)}


def state(step: int = 1):
    made = start({"moe": {"mlp": {"gate": GATE}}}, optax.sgd(0.1), 0)
    return made._replace(step=jnp.int32(step))


def metrics(loss: float = 2.0, finite: bool = True) -> dict:
    sums = {
        "nll": jnp.float32(30.0),
        "length": Mean(jnp.float32(40.0), jnp.float32(8.0)),
        "empty": Mean(jnp.float32(0.0), jnp.float32(0.0)),
        "mismatch_max": Peak(jnp.float32(0.25)),
        "reward": jnp.float32(5.0),
        "reward/format": jnp.float32(1.0),
        "load": {
            "moe": jnp.array([[4, 4, 4, 4], [0, 1, 5, 10]]),
            "mtp": jnp.array([[6, 10, 0, 0]]),
        },
    }
    return {
        "loss": jnp.float32(loss), "weight": jnp.float32(10.0), "norm": jnp.float32(np.inf),
        "finite": jnp.bool_(finite), "leaves": jnp.ones(1, bool), "sums": sums,
    }  # fmt: skip


def test_sums_become_means_peaks_stay_and_the_load_is_told():
    row = figures(state(), metrics())
    assert row == {
        "loss": 2.0, "norm": None, "skipped": 0, "nll": 3.0, "length": 5.0, "empty": 0.0,
        "mismatch_max": 0.25, "reward": 0.5, "reward/format": pytest.approx(0.1), "load": 2.5,
        "dead_experts": 3.0, "bias_min": 0.0, "bias_max": 0.5,
    }  # fmt: skip


def run(out: Path, begin: int, steps: int, last: int = 10, every: int = 2) -> None:
    out.mkdir(exist_ok=True)
    log = Log(out, every=every, quiet=True)
    log.go_on(begin)
    with log.watch(begin, last, lambda step: 100.0 * step, 1e6):
        for step in range(begin + 1, steps + 1):
            log(state(step), metrics(1 / step))
            if step % 4 == 0:
                log.note(step, sample="ätwa\n\x1b[2J", accuracy=0.5, missing=float("nan"))
    log.close()


def plain(path: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(path)]


def test_rows_behind_the_restored_step_are_cut_off_and_a_torn_line_too(tmp_path: Path):
    run(tmp_path / "a", 0, 10)
    rows = plain(tmp_path / "a" / METRICS)
    assert [r["step"] for r in rows] == [1, 2, 4, 4, 6, 8, 8, 10]
    assert rows[3] == {"step": 4, "sample": "ätwa\n\x1b[2J", "accuracy": 0.5, "missing": None}
    assert rows[4]["step_tokens"] == 40
    run(tmp_path / "b", 0, 7)
    with (tmp_path / "b" / METRICS).open("a") as file:
        file.write('{"step": 8, "lo')
    seconds = read_metrics(tmp_path / "b" / METRICS)[2]["seconds"]
    run(tmp_path / "b", 4, 10)
    assert plain(tmp_path / "b" / METRICS) == rows
    after = [r["seconds"] for r in read_metrics(tmp_path / "b" / METRICS) if "seconds" in r]
    assert after == sorted(after)  # time goes on, too
    assert after[2] == seconds


def test_a_bad_batch_has_a_row_whenever_it_comes(tmp_path: Path):
    log = Log(tmp_path, every=100, quiet=True, tensorboard=False)
    log.go_on(0)
    with log.watch(0, 1000, lambda step: 0.0, 0.0):
        log(state(7), metrics(float("nan"), finite=False))
    log.close()
    (row,) = read_metrics(tmp_path / METRICS)
    assert (row["step"], row["loss"]) == (7, None)
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize(
    ("sums", "tokens", "work"),  # of the two steps of a row, which take 4 seconds
    [
        ({}, 200.0, 200e6),  # the constants
        ({"length": Mean(jnp.float32(40.0), jnp.float32(8.0))}, 80.0, 80e6),
        ({"tokens": jnp.int32(30), "length": Mean(jnp.float32(40), jnp.float32(8))}, 60.0, 60e6),
        ({"tokens": jnp.int32(30), "flops": 5e7}, 60.0, 1e8),
    ],
)
def test_what_a_step_counted_itself_goes_before_constants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sums: dict, tokens: float, work: float
):
    now = 0.0
    clock = types.SimpleNamespace(perf_counter=lambda: now, time=lambda: now)
    monkeypatch.setattr(log, "time", clock)
    monkeypatch.setattr(log, "peak_flops", lambda: 1e9)
    made = Log(tmp_path, every=2, quiet=True, tensorboard=False)
    made.go_on(2)
    with made.watch(2, 6, lambda step: 100.0 * step, 1e6):
        for step in (3, 4, 5, 6):
            now += 2.0
            made(state(step), metrics() | {"sums": sums})
    made.close()
    rows = read_metrics(tmp_path / METRICS)
    assert [r["step"] for r in rows] == [4, 6]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(tokens / 4)
        assert row["flops_per_second"] == pytest.approx(work / 4)
        assert row["utilisation"] == pytest.approx(work / 4 / 1e9 / jax.device_count())
        counts = {k: row[k] for k in ("tokens", "step_tokens", "flops") if k in row}
        each = {"step_tokens": tokens / 2} if sums else {}
        assert counts == each | {"tokens": 100.0 * row["step"]}


def crc32c(data: bytes) -> int:
    """Bit by bit, from the polynomial."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def fields(data: bytes) -> list[tuple[int, object]]:
    """A protocol buffer message as (field, value): numbers, or bytes."""
    found, at = [], 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            value: object = varint()
        elif key & 7 == 2:
            length = varint()
            value, at = data[at : at + length], at + length
        else:
            size, form = {1: (8, "<d"), 5: (4, "<f")}[key & 7]
            (value,), at = struct.unpack(form, data[at : at + size]), at + size
        found.append((key >> 3, value))
    return found


def test_event_files_hold_the_rows(tmp_path: Path):
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C
    run(tmp_path, 0, 10)
    run(tmp_path, 4, 10)  # written anew
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, told = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        body = data[12 : 12 + length]
        for part, at in ((data[:8], 8), (body, 12 + length)):
            crc = crc32c(part)
            expected = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
            assert struct.unpack("<I", data[at : at + 4])[0] == expected
        told.append(dict(fields(body)))
        data = data[16 + length :]
    assert told[0][3] == b"brain.Event:2"
    rows = read_metrics(tmp_path / METRICS)
    assert len(told) == 1 + len(rows)
    for event, row in zip(told[1:], rows, strict=True):
        assert (event[2], event[1]) == (row["step"], row["time"])
        values = [dict(fields(v)) for _, v in fields(event[5])]  # pyright: ignore
        numbers = {v[1].decode(): v[2] for v in values if 2 in v}  # pyright: ignore
        wanted = {
            k: v for k, v in row.items() if isinstance(v, int | float) and k not in ("step", "time")
        }
        assert numbers == {k: pytest.approx(v, rel=1e-6) for k, v in wanted.items()}
        texts = {v[1]: dict(fields(v[8]))[8].decode() for v in values if 8 in v}  # pyright: ignore
        assert texts == ({b"sample": row["sample"]} if "sample" in row else {})
        assert all(b"text" in v[9] for v in values if 8 in v)  # pyright: ignore
    assert events.masked(b"") == 0xA282EAD8


def test_the_table_has_a_head_columns_of_what_there_is_and_harmless_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    log = Log(tmp_path, every=1)
    log.go_on(0)
    with log.watch(0, 40, lambda step: 100.0 * step, 1e6):
        for step in range(1, 41):
            log(state(step), metrics())
        log.note(40, sample="bell \x07 [bold]x[/bold]")
    log.close()
    lines = capsys.readouterr().err.splitlines()
    head = "step loss nll reward format length max norm load dead bias from to tokens/s skipped"
    assert lines[0].split() == head.split()
    assert lines[1].split()[:5] == ["1", "2.0000", "3.0000", "0.500", "0.100"]
    assert lines[1].split()[7] == "-"  # the norm was not finite
    assert sum(line.split()[:1] == ["step"] for line in lines if "sample" not in line) == 2
    assert 20 <= len(lines) <= 26  # twenty rows, heads, the sample
    assert lines[-1] == "step 40: sample bell ␇ [bold]x[/bold]"


def test_a_notebook_gets_plain_lines_where_cells_print(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    log = Log(tmp_path, tensorboard=False)
    log.print("step 1: [not markup] " + 100 * "x")
    assert capsys.readouterr() == ("step 1: [not markup] " + 100 * "x" + "\n", "")
    monkeypatch.setattr("rich.console._is_jupyter", lambda: False)
    Log(tmp_path, tensorboard=False).print("line")
    assert capsys.readouterr() == ("", "line\n")


def test_every_line_is_json_without_nan(tmp_path: Path):
    run(tmp_path, 0, 4)
    for line in (tmp_path / METRICS).read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(word))


def test_flops_of_a_token():
    """V3: 37B active parameters; of them the embedding is looked up. 6 N D as the report counts."""
    released = zoo.config("deepseek-v3")
    flops = flops_per_token(released, 4096)
    linear = 6 * count(released).active_without_embedding
    assert 6 * 36e9 < linear < 6 * 37.6e9
    assert flops - linear == pytest.approx(6 * 61 * 128 * (192 + 128) * 2048)
    assert flops_per_token(released, 4096, mtp=True) > flops
    lengths = np.array([4096, 100, 4096])
    rows = 2 * 4096 * flops + 100 * flops_per_token(released, 100)
    assert flops_of_rows(released, lengths) == pytest.approx(rows)
    assert jax.default_backend() != "cpu" or peak_flops() is None


@pytest.mark.parametrize("mtp", [False, True])
def test_padding_and_other_documents_do_not_count(mtp: bool):
    """A row of two documents and padding, one of a single token, one that is full."""
    released = zoo.config("deepseek-v3")
    segments = np.array([[0, 0, 0, 1, 1, -1, -1, -1], [0, *[-1] * 7], [0] * 8], np.int32)
    found = counted(released, jnp.asarray(segments), mtp=mtp)
    flops = sum(n * flops_per_token(released, n, mtp=mtp) for n in (3, 2, 1, 8))
    assert (int(found["tokens"]), float(found["flops"])) == (14, pytest.approx(flops))
