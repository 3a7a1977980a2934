"""Orbax checkpoints: exact round trips, and every kind of damage is an error that names it."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import child
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden import GOLDEN

from deepzoo import zoo
from deepzoo.zoo import trees
from deepzoo.zoo.errors import CheckpointError
from deepzoo.zoo.fingerprint import fingerprint, leaf_fingerprint
from deepzoo.zoo.trees import read_manifest, read_tree, write_tree

FIXTURE = Path(__file__).parents[1] / "data" / "checkpoint_1"


class Moments(NamedTuple):
    """Stands for an optimiser's state."""

    mu: dict[str, Any]
    parts: list[Any]
    count: Any


def tree() -> Moments:
    """Every dtype that checkpoints hold."""
    rng = np.random.default_rng(0)
    wide = jnp.asarray(rng.standard_normal((40, 30)), jnp.float32)
    mu = {"w": wide, "half": wide.astype(jnp.bfloat16), "byte": wide.astype(jnp.float8_e4m3fn)}
    return Moments(mu, [jnp.zeros((0, 3)), wide > 0], jnp.int32(7))


def abstract(of: Any) -> Any:
    """Shapes and dtypes of a tree."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), of)


def edit_manifest(directory: Path, change: Any) -> None:
    """Edits the manifest the way somebody does who also mends its hash."""
    path = directory / trees.MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    change(manifest)
    manifest["sha256"] = trees._digest(manifest)
    path.write_text(json.dumps(manifest))


def data_files(directory: Path) -> list[Path]:
    """The files with array data, largest first."""
    found = [p for p in directory.rglob("d/*") if p.is_file()]
    return sorted(found, key=lambda p: (-p.stat().st_size, p.name))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A small model's checkpoint."""
    return zoo.save(zoo.load(GOLDEN / "v3_fp8"), tmp_path / "saved")


# --- fingerprints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int32", "bool", "int8"])
def test_fingerprint_is_the_same_on_host_and_device(dtype: str, monkeypatch: pytest.MonkeyPatch):
    values = np.maximum(np.random.default_rng(1).standard_normal((7, 33, 5)) * 20, 0)
    array = jnp.asarray(values).astype(dtype)
    host = leaf_fingerprint(array)
    monkeypatch.setattr("deepzoo.zoo.fingerprint._SMALL", 0)
    assert leaf_fingerprint(array) == host
    assert leaf_fingerprint(array[::-1]) != host


def test_fingerprint_sees_every_single_bit():
    values = np.arange(60, dtype=np.float32).reshape(3, 20)
    seen = {leaf_fingerprint(values)}
    for position in range(60):
        for bit in range(32):
            changed = values.copy()
            changed.reshape(-1).view(np.uint32)[position] ^= np.uint32(1 << bit)
            seen.add(leaf_fingerprint(changed))
    assert len(seen) == 1 + 60 * 32


def test_fingerprint_sees_swaps():
    for a, b in ((1.0, 2.0), (3.5, -3.5), (0.0, -0.0)):  # x and -x differ in the highest bit only
        values = np.array([5.0, a, b, 7.0], np.float32)
        assert leaf_fingerprint(values) != leaf_fingerprint(values[[0, 2, 1, 3]])


def test_fingerprint_does_not_depend_on_sharding_and_gathers_nothing():
    child.run(
        """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        from deepzoo.zoo import fingerprint as f
        mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
        wide = jnp.asarray(np.random.default_rng(0).standard_normal((8, 12, 4)), jnp.float32)
        for dtype in ("float32", "bfloat16", "float8_e4m3fn", "int32"):
            x = wide.astype(dtype)
            want = f.leaf_fingerprint(x)
            for spec in (P(), P("a"), P("a", "b"), P(None, ("a", "b")), P("b", None, "a")):
                placed = jax.device_put(x, NamedSharding(mesh, spec))
                assert f.on_host(placed) is None
                assert f.leaf_fingerprint(placed) == want, (dtype, spec)
        text = f._sums.lower(placed).compile().as_text()
        assert "all-reduce" in text and "all-gather" not in text
        """,
        devices=4,
    )


# --- round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["v3_fp8", "v3_like", "qwen2_tied"])
@pytest.mark.parametrize("stacked", [True, False])
def test_save_and_load_give_the_same_bits(case: str, stacked: bool, tmp_path: Path):
    model = zoo.load(GOLDEN / case, stacked=stacked)
    zoo.save(model, tmp_path / "saved")
    again = zoo.load(tmp_path / "saved", stacked=stacked)
    assert again.config == model.config
    assert fingerprint(again.params) == fingerprint(model.params)
    other = zoo.load(tmp_path / "saved", stacked=not stacked)
    expected = (zoo.unstack if stacked else zoo.stack)(model.params)
    assert fingerprint(other.params) == fingerprint(expected)


@pytest.mark.parametrize(
    "options",
    [
        {"quantized": False},
        {"dtype": "float32"},
        {"mtp": False},
        {"quantized": False, "dtype": "float32", "mtp": False, "stacked": True},
    ],
    ids=str,
)
def test_options_mean_the_same_as_for_published_directories(saved: Path, options: dict[str, Any]):
    published, ours = zoo.load(GOLDEN / "v3_fp8", **options), zoo.load(saved, **options)
    assert ours.config == published.config
    assert fingerprint(ours.params) == fingerprint(published.params)


def test_what_is_not_a_dict_comes_back_as_what_it_was(tmp_path: Path):
    state = tree()
    write_tree(tmp_path / "step", {"opt": state, "one": jnp.arange(3)}, {"step": 5, "cursor": [1]})
    manifest = read_manifest(tmp_path / "step")
    assert (manifest.extra["step"], manifest.extra["cursor"]) == (5, [1])
    again = read_tree(manifest, "opt", abstract(state))
    assert isinstance(again, Moments)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))
    one = read_tree(manifest, "one", jax.ShapeDtypeStruct((3,), jnp.int32))
    assert one.tolist() == [0, 1, 2]


def test_leaves_go_where_the_target_says_and_any_mesh_reads_any_other(tmp_path: Path):
    child.run(
        """
        import sys, jax, numpy as np
        from pathlib import Path
        from deepzoo import zoo
        from deepzoo.zoo.fingerprint import fingerprint
        golden, out = map(Path, sys.argv[1:])
        devices = np.array(jax.devices())
        one = jax.sharding.Mesh(devices[:4].reshape(2, 2), ("expert", "fsdp"))
        two = jax.sharding.Mesh(devices.reshape(2, 4), ("tensor", "fsdp"))
        first = zoo.load(golden / "v3_like", mesh=one, stacked=True)
        zoo.save(first, out / "a")
        second = zoo.load(out / "a", mesh=two)
        want = zoo.shardings(second.config, two, stacked=False)
        def same(x, s):
            return x.sharding.is_equivalent_to(s, x.ndim)
        assert all(jax.tree.leaves(jax.tree.map(same, second.params, want)))
        plain = zoo.load(golden / "v3_like")
        assert fingerprint(second.params) == fingerprint(plain.params)
        zoo.save(second, out / "b")
        assert fingerprint(zoo.load(out / "b").params) == fingerprint(plain.params)
        """,
        str(GOLDEN),
        str(tmp_path),
        devices=8,
    )


def test_companions_of_the_weights_are_kept(tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "qwen2_tied", source)
    (source / "generation_config.json").write_text('{"temperature": 0.6}')
    zoo.save(zoo.load(source), tmp_path / "saved")
    assert (tmp_path / "saved" / "generation_config.json").read_text() == '{"temperature": 0.6}'


def test_checkpoints_of_format_1_load_forever():
    """Written when the format was 1; this directory is never written again."""
    manifest = read_manifest(FIXTURE)
    assert manifest.extra["step"] == 3
    again = read_tree(manifest, "params", abstract(tree()))
    assert fingerprint(again) == fingerprint(tree())


# --- damage ---------------------------------------------------------------------------------------


def test_a_flipped_bit_in_the_data_is_found_by_the_fingerprints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """C1, with hashes of files switched off: they exist for small files only."""
    monkeypatch.setattr(trees, "_HASHED", -1)
    values = np.random.default_rng(0).standard_normal((60, 50)).astype(np.float32)
    write_tree(tmp_path / "good", {"params": {"gate": jnp.asarray(values)}})
    target = {"gate": jax.ShapeDtypeStruct(values.shape, jnp.float32)}
    assert np.array_equal(
        read_tree(read_manifest(tmp_path / "good"), "params", target)["gate"], values
    )
    silent = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        shutil.copytree(tmp_path / "good", tmp_path / str(seed))
        file = data_files(tmp_path / str(seed))[0]
        assert file.stat().st_size > 5000
        data = bytearray(file.read_bytes())
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        file.write_bytes(data)
        with pytest.raises(CheckpointError) as found:
            read_tree(read_manifest(tmp_path / str(seed)), "params", target)
        silent += "params/gate is not what was written" in str(found.value)
        assert "\n" not in str(found.value)
    assert silent > 30  # of these Orbax itself sees nothing


def test_a_flipped_bit_in_any_small_file_is_found(saved: Path, tmp_path: Path):
    for i, file in enumerate(sorted(p for p in saved.rglob("*") if p.is_file())):
        copy = tmp_path / f"copy{i}"
        shutil.copytree(saved, copy)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        (copy / file.relative_to(saved)).write_bytes(data)
        with pytest.raises(CheckpointError, match=r"damaged|JSON|not what was written"):
            zoo.load(copy)


def test_a_missing_or_cut_file_is_named(saved: Path, tmp_path: Path):
    """C2, C3, C4: Orbax restores without several of these."""
    names = sorted(p.relative_to(saved) for p in saved.rglob("*") if p.is_file())
    must = {"_METADATA", "_CHECKPOINT_METADATA", "commit_success.txt", "manifest.ocdbt"}
    assert must <= {n.name for n in names}
    for name in names:
        if name.name == trees.MANIFEST:
            continue
        kept = (saved / name).read_bytes()
        (saved / name).unlink()
        with pytest.raises(CheckpointError, match=f"incomplete.*{name.name}"):
            zoo.load(saved)
        (saved / name).write_bytes(kept[:-1])
        with pytest.raises(CheckpointError, match=f"{name.name}: {len(kept) - 1} bytes"):
            zoo.load(saved)
        (saved / name).write_bytes(kept)
    zoo.load(saved)
    (saved / trees.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="never finished"):
        read_manifest(saved)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((40, 31), "float32"), ((30, 40), "float32"), ((40, 30), "int32"), ((40, 30), "bfloat16")],
)
def test_another_shape_or_dtype_is_refused_and_nothing_is_cast(
    shape: tuple[int, int], dtype: str, tmp_path: Path
):
    """C5 and C6: Orbax alone casts silently."""
    write_tree(tmp_path / "step", {"params": {"a": {"w": jnp.ones((40, 30))}}})
    target = {"a": {"w": jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))}}
    told = re.escape(f"a/w is float32[40, 30], expected {dtype}{list(shape)}")
    with pytest.raises(CheckpointError, match=told):
        read_tree(read_manifest(tmp_path / "step"), "params", target)


def test_other_keys_are_refused(tmp_path: Path):
    """C7."""
    write_tree(tmp_path / "step", {"params": {"a": jnp.ones(1), "b": jnp.ones(1)}})
    manifest = read_manifest(tmp_path / "step")
    one = jax.ShapeDtypeStruct((1,), jnp.float32)
    with pytest.raises(CheckpointError, match="1 leaves are missing: c"):
        read_tree(manifest, "params", {"a": one, "b": one, "c": one})
    with pytest.raises(CheckpointError, match="1 leaves are not expected: b"):
        read_tree(manifest, "params", {"a": one})
    with pytest.raises(CheckpointError, match="opt is not in this checkpoint"):
        read_tree(manifest, "opt", {"a": one})


def test_many_differences_are_counted(tmp_path: Path):
    write_tree(tmp_path / "step", {"params": {f"w{i:02}": jnp.zeros(1) for i in range(30)}})
    with pytest.raises(CheckpointError, match=r"30 leaves .*: w00, .*w09, and 20 more"):
        read_tree(read_manifest(tmp_path / "step"), "params", {})


@pytest.mark.parametrize("kind", ["file", "folder", "fifo"])
def test_links_and_pipes_are_refused(saved: Path, tmp_path: Path, kind: str):
    """C10: Orbax follows links out of the directory."""
    file = data_files(saved)[0]
    moved = tmp_path / "elsewhere"
    if kind == "folder":
        file = file.parent
    shutil.move(file, moved)
    os.mkfifo(file) if kind == "fifo" else file.symlink_to(moved)
    with pytest.raises(CheckpointError, match="not a regular file" if kind == "fifo" else "link"):
        zoo.load(saved)


def test_names_in_the_manifest_are_never_paths(saved: Path, tmp_path: Path):
    """C11."""
    (tmp_path / "secret").write_text("x")
    edit_manifest(saved, lambda m: m["files"].update({"../secret": {"size": 1}}))
    with pytest.raises(CheckpointError, match=r"missing \.\./secret"):
        zoo.load(saved)


def test_other_files_are_ignored(saved: Path):
    """C12: nothing opens them."""
    (saved / "weights.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert zoo.load(saved).config.model_type == "deepseek_v3"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=99, written_by="9.9"), "format 99, written by deepzoo 9.9"),
        (lambda m: m.pop("format"), "names no format"),
        (lambda m: m.update(trees=[]), "missing or damaged"),
        (lambda m: m["model"]["config"].update(surprise=1), "surprise"),
        (lambda m: m["model"]["config"].update(hidden_size=161), "does not fit"),
        (lambda m: m.pop("model"), "holds no model config"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(saved: Path, change: Any, message: str):
    """C13 and hostile manifests."""
    edit_manifest(saved, change)
    with pytest.raises(CheckpointError, match=message):
        zoo.load(saved)


def test_a_changed_manifest_is_refused(saved: Path):
    text = (saved / trees.MANIFEST).read_text()
    assert '"rms_norm_eps": 1e-06' in text
    (saved / trees.MANIFEST).write_text(
        text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')
    )
    with pytest.raises(CheckpointError, match="not what was written"):
        zoo.load(saved)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_neither_written_nor_loaded(
    tmp_path: Path, bad: float, monkeypatch: pytest.MonkeyPatch
):
    model = zoo.load(GOLDEN / "v3_like")
    weight = model.params["norm"]["weight"].at[3].set(bad)
    broken = model._replace(params=model.params | {"norm": {"weight": weight}})
    with pytest.raises(CheckpointError, match="norm/weight holds NaN or infinity"):
        zoo.save(broken, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr("deepzoo.zoo.checkpoint.all_finite", lambda leaf: True)
        zoo.save(broken, tmp_path / "saved")
    with pytest.raises(CheckpointError, match="norm/weight holds NaN or infinity"):
        zoo.load(tmp_path / "saved")


# --- writing --------------------------------------------------------------------------------------


def test_nothing_is_overwritten(saved: Path):
    before = fingerprint(zoo.load(saved).params)
    with pytest.raises(CheckpointError, match="not empty"):
        zoo.save(zoo.load(GOLDEN / "qwen2_tied"), saved)
    assert fingerprint(zoo.load(saved).params) == before


def test_what_is_not_an_array_is_refused(tmp_path: Path):
    for leaf, message in (("text", "str"), (jax.random.key(0), "random key")):
        with pytest.raises(CheckpointError, match=message):
            write_tree(tmp_path / "step", {"params": {"x": leaf}})
    for name in ("a/b", ""):
        with pytest.raises(CheckpointError, match="slash"):
            write_tree(tmp_path / "step", {"params": {name: jnp.zeros(1)}})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path):
    done = child.run(
        """
        import resource, signal, sys
        from pathlib import Path
        import jax.numpy as jnp, numpy as np
        from deepzoo.zoo.errors import CheckpointError
        from deepzoo.zoo.trees import write_tree
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        values = np.random.default_rng(0).standard_normal((600, 500)).astype(np.float32)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        try:
            write_tree(Path(sys.argv[1]) / "step", {"params": {"w": jnp.asarray(values)}})
        except CheckpointError as error:
            print(error)
        """,
        str(tmp_path),
    )
    assert "cannot be written" in done.stdout and "1,200,000 bytes" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_killed_save_is_invisible_and_the_next_one_works(tmp_path: Path):
    source = """
        import os, signal, sys
        from pathlib import Path
        from deepzoo import zoo
        from deepzoo.zoo import trees
        golden, out, point = sys.argv[1:]
        def die(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        if point != "never":
            setattr(trees, point, die)
        zoo.save(zoo.load(Path(golden) / "v3_fp8"), Path(out) / "saved")
    """
    for point in ("_write_orbax", "_describe", "_listed", "_digest"):
        with pytest.raises(AssertionError, match="-9"):
            child.run(source, str(GOLDEN), str(tmp_path), point)
        assert not (tmp_path / "saved").exists()
    child.run(source, str(GOLDEN), str(tmp_path), "never")
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    assert fingerprint(zoo.load(tmp_path / "saved").params) == fingerprint(
        zoo.load(GOLDEN / "v3_fp8").params
    )


def test_loading_writes_nothing(saved: Path):
    def listing() -> list[tuple[str, int]]:
        return sorted((str(p), p.stat().st_mtime_ns) for p in saved.parent.rglob("*"))

    before = listing()
    zoo.load(saved)
    assert listing() == before


def test_float8_survives_to_the_bit(tmp_path: Path):
    every = np.array([b for b in range(256) if b & 0x7F != 0x7F], np.uint8)
    values = jnp.asarray(every.view(ml_dtypes.float8_e4m3fn))
    write_tree(tmp_path / "step", {"params": {"w": values}})
    target = {"w": jax.ShapeDtypeStruct(values.shape, values.dtype)}
    again = read_tree(read_manifest(tmp_path / "step"), "params", target)["w"]
    assert np.array_equal(np.asarray(again).view(np.uint8), every)
