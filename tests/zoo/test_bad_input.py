"""Directories that are damaged, wrong or hostile: one line that names the thing, nothing
written."""

import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import child
import faults
import numpy as np
import pytest
from damaged import BIAS, EXPERT, NORM, ONE, THREE, TOKENIZER, TWO, refused
from golden import GOLDEN

from deepzoo import zoo
from deepzoo.zoo.errors import ConfigError, DeepzooError, RequestError, TokenizerError, WeightError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of a good directory: three shards and an index."""
    directory = tmp_path / "model"
    shutil.copytree(GOLDEN / "v3_like", directory)
    (directory / "expected.npz").unlink()
    return directory


def test_the_copy_itself_loads_and_is_left_as_it_was(model: Path):
    before = faults.snapshot(model)
    assert zoo.load(model).config.num_hidden_layers == 3
    assert faults.snapshot(model) == before


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [-1, -100_000, 5000, 100, 8, 7, 0])
def test_truncated_shard(model: Path, size: int):
    faults.truncate(model / TWO, size)
    assert refused(model).startswith(f"{model / TWO}: not a whole safetensors file")


def test_bytes_after_the_end_of_a_shard(model: Path):
    with (model / TWO).open("ab") as file:
        file.write(b"\0")
    assert refused(model).startswith(f"{model / TWO}: not a whole safetensors file")


def test_missing_shard(model: Path):
    (model / TWO).unlink()
    assert f"missing shards: {TWO}" in refused(model)


def test_shard_that_the_index_does_not_name(model: Path):
    shutil.copy(model / TWO, model / "model-00004-of-00004.safetensors")
    assert f"model-00004-of-00004.safetensors not named by {faults.INDEX}" in refused(model)


def test_empty_directory(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    message = refused(tmp_path / "empty", ConfigError)
    assert message.startswith(f"{tmp_path / 'empty'}: no config.json; expected a directory")


def test_no_weights(model: Path):
    for name in (ONE, TWO, THREE, faults.INDEX):
        (model / name).unlink()
    assert f"{model}: no weights; expected model.safetensors or" in refused(model)


def test_a_file_where_a_directory_is_expected(model: Path):
    message = refused(model / ONE)
    assert f"{model / ONE}: is not a directory; pass the directory" in message


def test_no_such_directory(tmp_path: Path):
    with pytest.raises(WeightError, match="no such directory, and no model of that name ships"):
        zoo.load(tmp_path / "nothing")


@pytest.mark.parametrize("name", [TWO, faults.INDEX, "config.json"])
def test_symlink_out_of_the_directory(model: Path, tmp_path: Path, name: str):
    faults.symlink(model / name, tmp_path / "elsewhere")
    message = refused(model, ConfigError if name == "config.json" else WeightError)
    assert f"{model / name}: a symbolic link to {tmp_path / 'elsewhere'}" in message


def test_links_of_the_hub_cache_are_followed_and_no_others(model: Path, tmp_path: Path):
    snapshot, blobs = tmp_path / "hub" / "snapshots" / ("a" * 40), tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(model.iterdir())):
        file.rename(blobs / f"{i:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i:040x}")
    assert zoo.load(snapshot).config.num_hidden_layers == 3
    (snapshot / TWO).unlink()
    (snapshot / TWO).symlink_to("../../blobs/../../secret")
    assert "a symbolic link to" in refused(snapshot)
    # A blob that is a link itself leads out by a second step.
    other = blobs / f"{9:040x}"
    other.symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_text("x")
    (snapshot / TWO).unlink()
    (snapshot / TWO).symlink_to(f"../../blobs/{9:040x}")
    assert "symbolic link" in refused(snapshot)


@pytest.mark.parametrize("name", [TWO, faults.INDEX, "config.json"])
def test_a_fifo_does_not_block(model: Path, name: str):
    faults.fifo(model / name)
    start = time.monotonic()
    message = refused(model, ConfigError if name == "config.json" else WeightError)
    assert f"{model / name}: not a regular file" in message
    assert time.monotonic() - start < 5


def test_a_directory_in_the_place_of_a_shard(model: Path):
    (model / TWO).unlink()
    (model / TWO).mkdir()
    assert f"{model / TWO}: not a regular file" in refused(model)


def test_a_shard_that_cannot_be_read(model: Path, monkeypatch: pytest.MonkeyPatch):
    right = os.preadv

    def broken(fd: int, buffers: Any, offset: int) -> int:
        if offset > 10_000:
            raise OSError(5, "Input/output error")
        return right(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", broken)
    message = refused(model)
    assert "safetensors: cannot be read (Input/output error)" in message


@pytest.mark.parametrize("what", ["written to", "replaced", "cut"])
def test_a_file_that_changes_while_it_is_read(model: Path, what: str):
    """The change comes after the headers were judged, when the first bytes have been read."""
    done = threading.Event()

    def change(*_: int) -> None:
        if done.is_set():
            return
        done.set()
        if what == "written to":
            faults_at = (model / ONE).stat().st_size - 1
            with (model / ONE).open("r+b") as file:
                file.seek(faults_at)
                file.write(b"\0")
        elif what == "cut":
            faults.truncate(model / THREE, 20_000)

    if what == "replaced":  # the open file stays whole, so the load is right and must not fail
        shutil.copy(model / ONE, model / "other")

        def replace(*_: int) -> None:
            if not done.is_set():
                done.set()
                (model / "other").rename(model / ONE)

        zoo.load(model, progress=replace)
        return
    with pytest.raises(WeightError) as found:
        zoo.load(model, progress=change)
    assert done.is_set()
    expected = {"written to": "changed while it was read", "cut": "safetensors: "}[what]
    assert expected in str(found.value)


# --- index ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../model/" + ONE,
        "/etc/passwd",
        "sub/x.safetensors",
        "http://127.0.0.1/x.safetensors",
        "",
        None,
        "x\0.safetensors",
        "model.bin",
        ".safetensors",
        "..",
        7,
        ["a"],
        "a" * 500 + ".safetensors",
    ],
)
def test_index_that_names_anything_but_a_file_beside_it(model: Path, name: Any):
    faults.edit_json(model / faults.INDEX, lambda v: v["weight_map"].update({NORM: name}))
    message = refused(model)
    assert message.startswith(f"{model / faults.INDEX}: {NORM} is mapped to ")
    assert "expected the bare name of a .safetensors file" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["weight_map"].pop(NORM), f"does not map tensors that the shards have: {NORM}"),
        (lambda v: v["weight_map"].update(extra=ONE), "maps tensors that no shard has: extra"),
        (
            lambda v: v["weight_map"].update({NORM: ONE if v["weight_map"][NORM] != ONE else TWO}),
            f"maps tensors to shards that lack them: {NORM}",
        ),
        (lambda v: v["weight_map"].update({NORM: "absent.safetensors"}), "absent.safetensors"),
        (lambda v: v.update(weight_map={}), "weight_map is missing, empty or no object"),
        (lambda v: v.update(weight_map=[]), "weight_map is missing, empty or no object"),
        (lambda v: v.pop("weight_map"), "weight_map is missing, empty or no object"),
        (lambda v: v["metadata"].update(total_size=1), "metadata.total_size is 1, but the shards"),
        (lambda v: v["metadata"].update(total_size="1"), "metadata.total_size is '1'; expected"),
    ],
)
def test_index_that_does_not_fit_the_shards(model: Path, change: Any, message: str):
    faults.edit_json(model / faults.INDEX, change)
    assert message in refused(model)


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a":' * 10**6, '{"weight_map":' + "[" * 100_000])
@pytest.mark.parametrize("name", [faults.INDEX, "config.json"])
def test_json_nesting_bomb(model: Path, name: str, text: str):
    (model / name).write_text(text)
    message = refused(model, ConfigError if name == "config.json" else WeightError)
    assert message.startswith(f"{model / name}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"weight_map": {"a": "x.safetensors"}', "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"null", "expected an object"),
        (b'{"metadata": {"total_size": NaN}, "weight_map": {}}', "NaN is not JSON"),
        (b'{"weight_map": {}, "weight_map": {}}', "'weight_map' appears twice"),
        (b'{"a": %s}' % (b"9" * 10_000), "not valid JSON"),
    ],
)
def test_index_that_is_no_json(model: Path, text: bytes, message: str):
    (model / faults.INDEX).write_bytes(text)
    assert message in refused(model)


def test_an_index_of_a_million_entries(model: Path):
    def many(index: dict[str, Any]) -> None:
        index["weight_map"] |= {f"x{i}": ONE for i in range(10**6)}

    faults.edit_json(model / faults.INDEX, many)
    start = time.monotonic()
    message = refused(model)
    assert "maps tensors that no shard has: x0, x1, x10, " in message
    assert message.endswith("and 999990 more")
    assert time.monotonic() - start < 20


def test_an_index_of_200_mb_is_not_read(model: Path):
    os.truncate(model / faults.INDEX, 200 << 20)
    assert f"{model / faults.INDEX}: {200 << 20} bytes, over the limit of 64 MB" in refused(model)


# --- tensors --------------------------------------------------------------------------------------


def test_names_from_a_file_are_printable_in_a_message(model: Path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "v2_lite_like" / name, model)
    for name in (ONE, TWO, THREE, faults.INDEX):
        (model / name).unlink()
    path = model / "model.safetensors"
    faults.add_tensor(path, "two\nlines\x1b[31m" + "x" * 10**6, "F32", [1], bytes(4))
    assert "two\\nlines\\x1b[31mxxx" in refused(model)


def forget_index(model: Path, name: str) -> None:
    faults.edit_json(model / faults.INDEX, lambda v: v["weight_map"].pop(name))
    faults.edit_json(model / faults.INDEX, lambda v: v.pop("metadata"))


def test_missing_tensor(model: Path):
    faults.drop_tensor(faults.shard_of(model, EXPERT), EXPERT)
    forget_index(model, EXPERT)
    assert refused(model) == f"{model}: 1 tensors of this config are missing: {EXPERT}"


def test_extra_tensor(model: Path):
    name = "model.layers.0.mlp.surprise.weight"
    faults.add_tensor(model / ONE, name, "F32", [1], bytes(4))
    faults.edit_json(model / faults.INDEX, lambda v: v["weight_map"].update({name: ONE}))
    faults.edit_json(model / faults.INDEX, lambda v: v.pop("metadata"))
    assert refused(model) == f"{model}: 1 tensors do not belong to this config: {name}"


def test_a_tensor_in_two_shards(model: Path):
    other = ONE if faults.shard_of(model, NORM).name != ONE else TWO
    faults.add_tensor(model / other, NORM, "F32", [48], bytes(192))
    assert f"tensors that another shard has, too: {NORM}" in refused(model)


@pytest.mark.parametrize(
    ("name", "value"), [(NORM, np.nan), (EXPERT, np.inf), (BIAS, -np.inf), (EXPERT, np.nan)]
)
def test_nan_and_infinity(model: Path, name: str, value: float):
    path = faults.shard_of(model, name)
    faults.set_values(path, name, 8, np.float32(value).tobytes())
    assert refused(model) == f"{path}: {name} holds NaN or infinity; the file is damaged"


# --- config, tokenizer, request -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not one of the families here"),
        ({"n_group": 3}, "n_group 3 does not divide n_routed_experts 16"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"hidden_size": "48"}, "hidden_size is '48'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method is 'gptq'"),
    ],
)
def test_config_names_the_key_and_the_file(model: Path, change: dict[str, Any], message: str):
    faults.edit_json(model / "config.json", lambda v: v.update(change))
    found = refused(model, ConfigError)
    assert found.startswith(f"{model / 'config.json'}: ") and message in found


def test_auto_map_is_never_followed(model: Path):
    (model / "configuration_deepseek.py").write_text("raise SystemExit('ran')")
    (model / "modeling_deepseek.py").write_text("raise SystemExit('ran')")
    assert zoo.load(model).config.model_type == "deepseek_v3"


def test_a_config_of_a_giant_does_not_take_its_time(model: Path):
    """65 million tensors are promised: counted, not listed."""
    giant = {"num_hidden_layers": 1000, "n_routed_experts": 65536, "n_group": 1, "topk_group": 1}
    faults.edit_json(model / "config.json", lambda v: v.update(giant))
    start = time.monotonic()
    message = refused(model)
    assert "config.json promises 196,6" in message and "tensors" in message
    assert time.monotonic() - start < 5


def test_a_tokenizer_with_ids_past_the_vocabulary(model: Path):
    for file in TOKENIZER.iterdir():
        shutil.copy(file, model)
    message = refused(model, TokenizerError)
    assert "the tokenizer belongs to another model" in message


def test_a_tokenizer_that_is_a_link(model: Path, tmp_path: Path):
    shutil.copy(TOKENIZER / "tokenizer.json", tmp_path / "elsewhere")
    (model / "tokenizer.json").symlink_to(tmp_path / "elsewhere")
    assert "tokenizer.json: a symbolic link" in refused(model, DeepzooError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"dtype": "nonsense"}, "dtype 'nonsense'"),
        ({"rules": {}}, "mesh="),
        ({"revision": "main"}, "download=True"),
    ],
)
def test_options_that_cannot_be_served(model: Path, options: dict[str, Any], message: str):
    assert message in refused(model, RequestError, **options)


def test_the_command_line_says_one_line_and_exits_2(model: Path):
    faults.truncate(model / TWO, -1)
    done = child.run(
        """
        import subprocess, sys
        command = "import sys; from deepzoo.zoo.cli import main; sys.exit(main())"
        done = subprocess.run(
            [sys.executable, "-c", command, "generate", sys.argv[1], "1 + 1"],
            capture_output=True, text=True,
        )
        print(done.returncode, done.stdout, done.stderr, sep="|", end="")
        """,
        str(model),
    )
    code, out, err = done.stdout.split("|")
    assert (code, out) == ("2", "")
    assert err.startswith(f"deepzoo: {model / TWO}: not a whole safetensors file")
    assert err.count("\n") == 1


def test_a_cache_of_the_other_layout_is_an_error_that_says_which():
    model = zoo.load(GOLDEN / "v2_like")
    tokens = np.zeros((1, 4), np.int32)
    with pytest.raises(ValueError, match=r"zoo.cache\(..., stacked=False\)"):
        zoo.apply(model.config, model.params, tokens, cache=zoo.cache(model.config, 1, 8))
    stacked = zoo.cache(model.config, 1, 8, stacked=False)
    with pytest.raises(ValueError, match=r"zoo.cache\(..., stacked=True\)"):
        zoo.apply(model.config, zoo.stack(model.params), tokens, cache=stacked)
