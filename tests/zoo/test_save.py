"""`save_hf`: what was read comes out with the same names, dtypes and bytes, or nothing does."""

import dataclasses
import errno
import json
import os
import shutil
import signal
from itertools import pairwise
from pathlib import Path

import child
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import CASES, GOLDEN, MTP
from safetensors import deserialize

from deepzoo import zoo
from deepzoo.zoo import atomic, names
from deepzoo.zoo.config import Config
from deepzoo.zoo.errors import RequestError, WeightError
from deepzoo.zoo.load import load
from deepzoo.zoo.save import COPIED, _select, save_hf, take
from deepzoo.zoo.tokenizer import Tokenizer
from deepzoo.zoo.types import Model

TOKENIZER = Path(__file__).parents[1] / "data" / "text" / "tokenizer"


def published(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """name -> (dtype, shape, bytes) of every tensor, read by the safetensors library alone."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        for name, tensor in deserialize(file.read_bytes()):
            assert name not in found
            found[name] = (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
    return found


def assert_same_tensors(got: Path, expected: Path) -> None:
    a, b = published(got), published(expected)
    assert a.keys() == b.keys()
    assert [n for n in a if a[n] != b[n]] == []


def read_config(directory: Path) -> Config:
    return Config.from_hf(json.loads((directory / "config.json").read_text()))


def assert_nothing_left(folder: Path) -> None:
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bit_exact(case, stacked, tmp_path):
    out = save_hf(load(GOLDEN / case, stacked=stacked), tmp_path / "out")
    assert out == tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {"config.json", "model.safetensors"}
    assert_same_tensors(out, GOLDEN / case)
    assert read_config(out) == read_config(GOLDEN / case)
    if case != "v3_like":  # the others lie in one file, and even its header is the same
        name = "model.safetensors"
        assert (out / name).read_bytes() == (GOLDEN / case / name).read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_published_config_comes_back_key_by_key(case, tmp_path):
    source = tmp_path / "in"
    shutil.copytree(GOLDEN / case, source)
    (source / "config_published.json").replace(source / "config.json")
    out = save_hf(load(source), tmp_path / "out")
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("case", ["v3_like", "v3_fp8_ue8m0", "qwen2_tied"])
def test_reload_gives_identical_parameters(case, stacked, tmp_path):
    model = load(GOLDEN / case, stacked=stacked)
    again = load(save_hf(model, tmp_path / "out", max_shard_bytes=100_000), stacked=stacked)
    assert again.config == model.config
    assert jax.tree.structure(again.params) == jax.tree.structure(model.params)
    for (path, a), (_, b) in zip(
        names.flatten(model.params), names.flatten(again.params), strict=True
    ):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


@pytest.mark.parametrize("limit", [100_000, 250_000, 1])
def test_shards_and_index(limit, tmp_path):
    out = save_hf(load(GOLDEN / "v3_like"), tmp_path / "out", max_shard_bytes=limit)
    assert_same_tensors(out, GOLDEN / "v3_like")
    files = sorted(out.glob("*.safetensors"))
    n = len(files)
    assert [f.name for f in files] == [
        f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)
    ]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    held = {f.name: deserialize(f.read_bytes()) for f in files}
    assert index["weight_map"] == {t: f for f, tensors in held.items() for t, _ in tensors}
    sizes = {f: sum(len(t["data"]) for _, t in tensors) for f, tensors in held.items()}
    assert index["metadata"] == {"total_size": sum(sizes.values())}
    assert all(sizes[f] <= limit or len(held[f]) == 1 for f in held)
    order = list(names.tensors(read_config(out)))
    assert list(dict.fromkeys(index["weight_map"][t] for t in order)) == [f.name for f in files]
    size = {t: len(x["data"]) for tensors in held.values() for t, x in tensors}
    for before, after in pairwise(files):  # whatever starts a file did not fit into the one before
        start = next(t for t in order if index["weight_map"][t] == after.name)
        assert sizes[before.name] + size[start] > limit
    assert json.loads((GOLDEN / "v3_like/model.safetensors.index.json").read_text())["metadata"][
        "total_size"
    ] == sum(sizes.values())


@pytest.mark.parametrize("case", MTP)
def test_mtp_copies_are_written(case, tmp_path):
    out = published(save_hf(load(GOLDEN / case), tmp_path / "out"))
    at = f"model.layers.{read_config(GOLDEN / case).num_hidden_layers}"
    assert out[f"{at}.embed_tokens.weight"] == out["model.embed_tokens.weight"]
    assert out[f"{at}.shared_head.head.weight"] == out["lm_head.weight"]
    assert out[f"{at}.mlp.gate.e_score_correction_bias"][0] == "F32"


def test_without_mtp_the_layer_is_gone_and_the_config_says_so(tmp_path):
    out = save_hf(load(GOLDEN / "v3_fp8", mtp=False), tmp_path / "out")
    original = published(GOLDEN / "v3_fp8")
    layer = f"model.layers.{read_config(GOLDEN / 'v3_fp8').num_hidden_layers}."
    assert published(out) == {n: t for n, t in original.items() if not n.startswith(layer)}
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert load(out).config.num_nextn_predict_layers == 0


def test_tied_head_is_not_written(tmp_path):
    tied = published(save_hf(load(GOLDEN / "qwen2_tied"), tmp_path / "tied"))
    untied = published(save_hf(load(GOLDEN / "qwen2_untied"), tmp_path / "untied"))
    assert "lm_head.weight" not in tied and "lm_head.weight" in untied


@pytest.mark.parametrize("stacked", [False, True])
def test_norms_keep_their_own_dtype(stacked, tmp_path):
    """float32 norms between bfloat16 weights: no key of config.json tells."""
    model = load(GOLDEN / "v3_bf16", stacked=stacked)
    config = dataclasses.replace(model.config, norm_dtype="float32")
    kinds = {path: leaf.kind for path, leaf in names.leaves(config, stacked=stacked).items()}
    flat = {
        path: leaf.astype(jnp.float32) if kinds[path] == "norm" else leaf
        for path, leaf in names.flatten(model.params)
    }
    out = save_hf(Model(config, names.nest(flat)), tmp_path / "out")
    again = load(out)
    assert again.config.norm_dtype == "float32" and again.config.dtype == "bfloat16"
    codes = {name: code for name, (code, _, _) in published(out).items()}
    assert {c for n, c in codes.items() if "norm" in n} == {"F32"}
    assert codes["model.layers.0.self_attn.o_proj.weight"] == "BF16"
    assert_same_tensors(save_hf(again, tmp_path / "twice"), out)


def test_parameters_made_in_memory(tmp_path):
    config = read_config(GOLDEN / "v3_fp8")
    params = zoo.init(config, jax.random.key(0))
    out = save_hf(Model(config, params), tmp_path / "out")
    loaded = load(out, stacked=True).params
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: (a == b).all(), loaded, params)))
    on_host = jax.tree.map(np.asarray, params)
    assert_same_tensors(save_hf(Model(config, on_host), tmp_path / "host"), out)


def test_sharded_parameters(tmp_path):
    """8 devices: experts, rows and columns divided; every tensor is put together again."""
    child.run(
        """
        import sys
        from pathlib import Path
        import jax
        import numpy as np
        from jax.sharding import Mesh
        from deepzoo.zoo.load import load
        from deepzoo.zoo.save import save_hf

        golden, out = map(Path, sys.argv[1:])
        mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("fsdp", "expert", "tensor"))
        for case in ("v3_like", "v3_fp8", "qwen2_untied"):
            for stacked in (False, True):
                model = load(golden / case, mesh=mesh, stacked=stacked)
                specs = {str(x.sharding.spec) for x in jax.tree.leaves(model.params)}
                assert any("fsdp" in s and "tensor" in s for s in specs), specs
                assert case == "qwen2_untied" or any("expert" in s for s in specs), specs
                save_hf(model, out / f"{case}-{stacked}", max_shard_bytes=300_000)
        """,
        str(GOLDEN),
        str(tmp_path),
        devices=8,
    )
    made = sorted(tmp_path.iterdir())
    assert len(made) == 6
    for directory in made:
        assert_same_tensors(directory, GOLDEN / directory.name.rsplit("-", 1)[0])


def test_slices_on_the_cpu_are_views():
    """Nothing the size of a leaf is copied: 256 experts would be 256 copies."""
    for dtype in (jnp.bfloat16, jnp.float8_e4m3fn, jnp.float32):
        leaf = jnp.ones((3, 4, 8, 16), dtype)
        start, size = leaf.unsafe_buffer_pointer(), 8 * 16 * leaf.dtype.itemsize
        assert take(leaf, (2, 1)).ctypes.data == start + (2 * 4 + 1) * size
        assert take(leaf, ()).ctypes.data == start


def test_slices_of_other_devices_compile_once_a_shape():
    leaf = jnp.arange(3 * 4 * 5 * 6).reshape(3, 4, 5, 6)
    compiled = _select._cache_size  # pyright: ignore[reportAttributeAccessIssue]
    before = compiled()
    for i in range(3):
        for j in range(4):
            np.testing.assert_array_equal(_select(leaf, (i, j)), leaf[i, j])
    assert compiled() == before + 1


def test_companions_come_along_byte_for_byte(tmp_path):
    source = tmp_path / "in"
    shutil.copytree(GOLDEN / "v3_bf16", source)
    texts = {name: f'{{ "from": "{name}" }}  \n'.encode() for name in COPIED}
    for name, text in texts.items():
        (source / name).write_bytes(text)
    model = load(source)._replace(tokenizer=Tokenizer.load(TOKENIZER))
    out = save_hf(model, tmp_path / "out")
    kept = texts | {f.name: f.read_bytes() for f in TOKENIZER.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= kept.keys()
    assert {f.name for f in out.iterdir()} == {"config.json", "model.safetensors", *kept}
    assert {name: (out / name).read_bytes() for name in kept} == kept


def test_a_companion_that_is_a_link_is_refused(tmp_path):
    source, secret = tmp_path / "in", tmp_path / "secret"
    shutil.copytree(GOLDEN / "v3_bf16", source)
    secret.write_text("{}")
    (source / "generation_config.json").symlink_to(secret)
    with pytest.raises(WeightError, match="symbolic link"):
        save_hf(load(source), tmp_path / "out" / "deep")
    assert {p.name for p in tmp_path.iterdir()} == {"in", "secret"}


def test_progress_counts_every_byte_once(tmp_path):
    seen = []
    out = save_hf(
        load(GOLDEN / "v3_like"),
        tmp_path / "out",
        max_shard_bytes=250_000,
        progress=lambda done, total: seen.append((done, total)),
    )
    total = sum(len(data) for _, _, data in published(out).values())
    assert seen[-1] == (total, total) and {t for _, t in seen} == {total}
    assert [d for d, _ in seen] == sorted(d for d, _ in seen) and len(seen) > 100


# Refusals


@pytest.fixture(scope="module")
def model():
    return load(GOLDEN / "v3_bf16")


def test_a_destination_in_use_is_left_alone(model, tmp_path):
    (tmp_path / "mine").write_text("precious")
    for target in (tmp_path, tmp_path / "mine"):
        with pytest.raises(RequestError, match="name a new directory") as error:
            save_hf(model, target)
        assert str(target) in str(error.value) and "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine").read_text() == "precious"


def test_weights_can_be_read_by_whom_the_umask_allows(model, tmp_path):
    before = os.umask(0o022)
    try:
        out = save_hf(model, tmp_path / "out")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o644}


def test_an_empty_directory_and_missing_parents_are_fine(model, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_same_tensors(save_hf(model, tmp_path / "empty"), GOLDEN / "v3_bf16")
    assert_same_tensors(save_hf(model, tmp_path / "a" / "b" / "c"), GOLDEN / "v3_bf16")
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_parameters_that_do_not_fit_the_config(model, tmp_path):
    flat = dict(names.flatten(model.params))
    norm, head = flat.pop(("norm", "weight")), ("lm_head", "weight")
    flat[head], flat[("other", "weight")] = flat[head].astype(jnp.float32), norm
    with pytest.raises(WeightError, match="3 leaves") as error:
        save_hf(model._replace(params=names.nest(flat)), tmp_path / "out")
    for name in ("norm/weight", "other/weight", "lm_head/weight"):
        assert name in str(error.value)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(
    "path, value, said",
    [
        (("norm", "weight"), np.nan, "model.norm.weight"),
        (("moe", "0", "mlp", "experts", "up_proj", "weight"), np.inf, "experts.3.up_proj.weight"),
    ],
)
def test_values_that_no_load_would_accept(model, path, value, said, tmp_path):
    flat = dict(names.flatten(model.params))
    index = (3, 0, 0) if flat[path].ndim == 3 else (0,)
    flat[path] = flat[path].at[index].set(value)
    with pytest.raises(WeightError, match=said):
        save_hf(model._replace(params=names.nest(flat)), tmp_path / "out")
    assert_nothing_left(tmp_path)


def test_a_scale_of_zero(tmp_path):
    model = load(GOLDEN / "v3_fp8")
    path = ("dense", "0", "self_attn", "o_proj", "weight_scale_inv")
    flat = dict(names.flatten(model.params))
    flat[path] = flat[path].at[0, 0].set(0)
    with pytest.raises(WeightError, match=r"layers\.0\.self_attn\.o_proj\.weight_scale_inv"):
        save_hf(model._replace(params=names.nest(flat)), tmp_path / "out")
    assert_nothing_left(tmp_path)


def test_shards_of_no_bytes(model, tmp_path):
    with pytest.raises(RequestError, match="max_shard_bytes is 0"):
        save_hf(model, tmp_path / "out", max_shard_bytes=0)
    assert_nothing_left(tmp_path)


def test_too_little_space_is_seen_before_writing(model, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=123_456)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(WeightError, match=r"needs [\d,]+ bytes, but 123,456 are free"):
        save_hf(model, tmp_path / "new" / "out")
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_an_error_of_the_disk_leaves_nothing(model, code, call, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(WeightError, match=f"cannot be written .{os.strerror(code)}.; needs") as e:
        save_hf(model, tmp_path / "new" / "out")
    assert str(tmp_path / "new" / "out") in str(e.value) and "\n" not in str(e.value)
    assert_nothing_left(tmp_path)


def test_a_file_over_the_limit_of_the_system_leaves_nothing(tmp_path):
    """The safetensors library itself is refused in the middle of the second shard."""
    done = child.run(
        """
        import resource, sys
        from pathlib import Path
        from deepzoo.zoo.errors import WeightError
        from deepzoo.zoo.load import load
        from deepzoo.zoo.save import save_hf

        golden, out = map(Path, sys.argv[1:])
        model = load(golden / "v3_like")
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        seen = []

        def look(*_):
            seen.append(len(list(out.glob(".model.*.partial/*.safetensors"))))
            if seen[-1] == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))

        try:
            save_hf(model, out / "model", max_shard_bytes=150_000, progress=look)
        except WeightError as error:
            print(max(seen), list(out.iterdir()), error)
        """,
        str(GOLDEN),
        str(tmp_path),
    )
    assert done.stdout.startswith("1 [] ") and "File too large" in done.stdout
    assert "cannot be written" in done.stdout and done.stdout.count("\n") == 1
    assert_nothing_left(tmp_path)


def test_an_interrupt_leaves_nothing(model, tmp_path):
    def interrupt(done, total):
        assert any(tmp_path.glob(".out.*.partial"))
        if done > total // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_hf(model, tmp_path / "out", max_shard_bytes=10_000, progress=interrupt)
    assert_nothing_left(tmp_path)


def test_what_a_killed_process_left_is_removed_by_the_next_save(model, tmp_path):
    with pytest.raises(AssertionError, match=f"ended with {-signal.SIGKILL}"):
        child.run(
            """
            import os, signal, sys
            from pathlib import Path
            from deepzoo.zoo.load import load
            from deepzoo.zoo.save import save_hf

            def kill(done, total):
                if done > total // 2:
                    os.kill(os.getpid(), signal.SIGKILL)

            golden, out = map(Path, sys.argv[1:])
            save_hf(load(golden / "v3_bf16"), out / "out", max_shard_bytes=10_000, progress=kill)
            """,
            str(GOLDEN),
            str(tmp_path),
        )
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.") and any(left.glob("*.safetensors"))
    (tmp_path / ".out.notes.partial").mkdir()  # looks alike, but is not ours
    save_hf(model, tmp_path / "other")
    assert left.exists()
    save_hf(model, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"out", "other", ".out.notes.partial"}


def test_a_save_under_way_elsewhere_is_not_disturbed(model, tmp_path):
    with pytest.raises(WeightError, match="somebody else filled it"):
        with atomic.new_directory(tmp_path / "out", 1) as first:
            (first / "x").write_text("first")
            save_hf(model, tmp_path / "out")
            assert (first / "x").read_text() == "first"
    assert_same_tensors(tmp_path / "out", GOLDEN / "v3_bf16")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
