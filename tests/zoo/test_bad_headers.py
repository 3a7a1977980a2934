"""Headers of safetensors files that lie, overflow or are mutated: refused, or read as they were."""

import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import numpy as np
import pytest
from damaged import NORM, TWO, refused, rename, update
from golden import GOLDEN
from hypothesis import example, given
from hypothesis import strategies as st

from deepzoo.zoo import files
from deepzoo.zoo.errors import WeightError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of a good directory: three shards and an index."""
    directory = tmp_path / "model"
    shutil.copytree(GOLDEN / "v3_like", directory)
    (directory / "expected.npz").unlink()
    return directory


def test_the_header_claims_200_mb(model: Path):
    raw = (model / TWO).read_bytes()
    (model / TWO).write_bytes(struct.pack("<Q", 200 << 20) + raw[8:])
    assert refused(model).startswith(f"{model / TWO}: not a whole safetensors file")


def test_a_header_of_200_mb_is_not_read(model: Path):
    """A sparse file: it takes no disk, and must take neither memory nor time."""
    with (model / TWO).open("wb") as file:
        file.write(struct.pack("<Q", 200 << 20) + b"{" + b" " * 64)
        file.truncate((200 << 20) + 1000)
    start = time.monotonic()
    assert refused(model).startswith(f"{model / TWO}: ")
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 1 << 40, 0])
def test_impossible_header_lengths(model: Path, length: int):
    raw = (model / TWO).read_bytes()
    (model / TWO).write_bytes(struct.pack("<Q", length) + raw[8:])
    assert refused(model).startswith(f"{model / TWO}: not a whole safetensors file")


def test_a_header_that_is_a_nesting_bomb(model: Path):
    text = b"[" * 1_000_000
    (model / TWO).write_bytes(struct.pack("<Q", len(text)) + text)
    assert refused(model).startswith(f"{model / TWO}: not a whole safetensors file")


@pytest.mark.parametrize("dtype", ["F32", "I32"])
def test_duplicate_header_keys(model: Path, dtype: str):
    """The library takes the last of the two and says nothing, even where the two agree."""
    name = NORM
    path = faults.shard_of(model, name)
    header, data = faults.read_shard(path)
    faults.write_shard(path, [*header, (name, dict(header)[name] | {"dtype": dtype})], data)
    assert refused(model) == f"{path}: its header names {name} twice"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: update(h, NORM, dtype="I32"), f"several dtypes (F32, I32); I32: {NORM}"),
        (lambda h: update(h, NORM, dtype="BF16", shape=[96]), f"{NORM}"),
        (lambda h: update(h, NORM, shape=[6, 8]), f"{NORM} is F32 [6, 8], expected F32 [48]"),
        (lambda h: update(h, NORM, shape=[48, 1]), f"{NORM} is F32 [48, 1], expected F32 [48]"),
        (lambda h: update(h, NORM, dtype="F77"), "not a whole safetensors file"),
        (lambda h: update(h, NORM, shape=[47]), "not a whole safetensors file"),
        (lambda h: update(h, NORM, shape=[-48]), "not a whole safetensors file"),
        (lambda h: update(h, NORM, shape=[1 << 62, 1 << 62]), "not a whole safetensors file"),
        (lambda h: update(h, NORM, data_offsets=[0, 192]), "not a whole safetensors file"),
        (lambda h: update(h, NORM, data_offsets=[1 << 60, 1 << 61]), "not a whole safetensors"),
        (lambda h: rename(h, NORM, "../../etc/passwd"), f"that no shard has: {NORM}"),
        (lambda h: rename(h, NORM, ""), f"that no shard has: {NORM}"),
        (lambda h: h.append(("__metadata__", {"a": 1})), "not a whole safetensors file"),
    ],
)
def test_header_that_lies(model: Path, change: Callable[[faults.Header], Any], message: str):
    path = faults.shard_of(model, NORM)
    faults.edit_shard(path, change)
    assert message in refused(model)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, int]:
    """(directory of a one-file checkpoint, that file, length of its header)."""
    directory = tmp_path_factory.mktemp("tiny")
    header: faults.Header = []
    data = b""
    for name, dtype, shape in (("a", "F32", [3, 4]), ("b", "BF16", [5]), ("c", "F8_E4M3", [2, 2])):
        size = int(np.prod(shape)) * {"F32": 4, "BF16": 2, "F8_E4M3": 1}[dtype]
        offsets = [len(data), len(data) + size]
        header.append((name, {"dtype": dtype, "shape": shape, "data_offsets": offsets}))
        data += bytes(range(1, size + 1))
    faults.write_shard(directory / "model.safetensors", header, data)
    raw = (directory / "model.safetensors").read_bytes()
    return directory, raw, len(raw) - len(data)


def contents(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Everything that the reader says about a checkpoint."""
    found = {}
    with files.open_checkpoint(directory) as opened:
        for name, entry in opened.entries.items():
            data = bytearray(entry.stop - entry.start)
            entry.shard.read(memoryview(data), entry.start)
            found[name] = (entry.code, entry.shape, bytes(data))
        opened.verify_unchanged()
    return found


@given(
    at=st.integers(0, 250),
    cut=st.integers(0, 12),
    put=st.one_of(
        st.binary(max_size=12),
        st.text('0123456789[]{}:,"abcF32B16 -.eE', max_size=12).map(str.encode),
    ),
    mend=st.booleans(),
)
@example(at=10, cut=1, put=b"a", mend=True)
def test_any_mutation_of_a_header_is_refused_or_read_consistently(
    tiny: tuple[Path, bytes, int], at: int, cut: int, put: bytes, mend: bool
):
    """With `mend` the length before the header is right again, so the mutation goes deeper.

    What is accepted has the same data under each name that was there before, with the dtype and
    shape that the header now says: `judge` compares those with the config afterwards.
    """
    directory, raw, end = tiny
    at = min(at, end)
    cut = min(cut, end - at)
    mutated = raw[:at] + put + raw[at + cut :]
    if mend and at >= 8:
        mutated = struct.pack("<Q", end - 8 - cut + len(put)) + mutated[8:]
    (directory / "model.safetensors").write_bytes(raw)
    good = contents(directory)
    (directory / "model.safetensors").write_bytes(mutated)
    try:
        found = contents(directory)
    except WeightError as error:
        assert "\n" not in str(error)
        return
    whole = b"".join(data for _, _, data in good.values())
    assert b"".join(data for _, _, data in found.values()) == whole
    for name, (code, shape, data) in found.items():
        if name in good and (code, shape) == good[name][:2]:
            assert data == good[name][2]


@given(
    at=st.integers(0, 10**6),
    cut=st.integers(0, 8),
    put=st.text('0123456789[]{}:,"F32B16 modelyrs._', max_size=8).map(str.encode),
)
def test_any_mutation_of_a_real_header_is_refused_or_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, at: int, cut: int, put: bytes
):
    """Through `load`: names, dtypes and shapes are known, so nothing can be read differently."""
    directory = tmp_path_factory.mktemp("mutated")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "v2_lite_like" / name, directory)
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    at = 8 + at % length
    cut = min(cut, 8 + length - at)
    text = raw[8:at] + put + raw[at + cut : 8 + length]
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    try:
        with files.open_checkpoint(directory) as opened:
            from deepzoo.zoo.load import read_hf_config
            from deepzoo.zoo.weights import judge

            judge(opened, read_hf_config(directory))
            mutated = {
                n: (e.code, e.shape, e.start - 8 - len(text)) for n, e in opened.entries.items()
            }
    except WeightError as error:
        assert "\n" not in str(error)
        return
    finally:
        shutil.rmtree(directory)
    with files.open_checkpoint(GOLDEN / "v2_lite_like") as opened:
        good = {n: (e.code, e.shape, e.start - 8 - length) for n, e in opened.entries.items()}
    assert mutated == good
