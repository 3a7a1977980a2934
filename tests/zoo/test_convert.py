"""`convert`: between the layouts without losing a bit, and into block FP8 and back out."""

import functools
import json
import re
import shutil
from pathlib import Path

import child
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden import BOUND, CASES, GOLDEN, LATENT, distance
from safetensors import deserialize, serialize_file

from deepzoo import zoo
from deepzoo.kernels.block_fp8 import reference
from deepzoo.zoo.convert import convert, quantize
from deepzoo.zoo.errors import ConfigError, RequestError, WeightError
from deepzoo.zoo.load import load
from deepzoo.zoo.save import save_hf

TOKENIZER = Path(__file__).parents[1] / "data" / "text" / "tokenizer"
NUMPY = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}


def published(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of a directory by name, read by the safetensors library alone."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        for name, x in deserialize(file.read_bytes()):
            found[name] = np.frombuffer(x["data"], NUMPY[x["dtype"]]).reshape(x["shape"])
    return found


def differing(got: Path, expected: Path) -> list[str]:
    """Names of the tensors that one of two directories lacks, or that are not the same bits."""
    a, b = published(got), published(expected)
    both = a.keys() & b.keys()
    wrong = [n for n in both if a[n].dtype != b[n].dtype or a[n].shape != b[n].shape]
    wrong += [n for n in both if a[n].tobytes() != b[n].tobytes()]
    return sorted({*wrong, *(a.keys() ^ b.keys())})


def logits(directory: Path, tokens: np.ndarray, **options) -> np.ndarray:
    model = load(directory, dtype="float32", **options)
    return np.asarray(zoo.apply(model.config, model.params, jnp.asarray(tokens)).logits)


@functools.cache
def expected(case: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / case / "expected.npz") as file:
        return dict(file)


def edited(case: str, folder: Path, change) -> Path:
    """A copy of a golden directory of one file after `change(tensors)`."""
    shutil.copytree(GOLDEN / case, folder)
    tensors = published(folder)
    change(tensors)
    arrays = {n: np.ascontiguousarray(x) for n, x in tensors.items()}
    for file in folder.glob("model*"):
        file.unlink()
    save_arrays(arrays, folder / "model.safetensors")
    return folder


def save_arrays(arrays: dict[str, np.ndarray], path: Path) -> None:
    from safetensors import TensorSpec

    specs = {
        n: TensorSpec(dtype=str(x.dtype), shape=x.shape, data_ptr=x.ctypes.data, data_len=x.nbytes)
        for n, x in arrays.items()
    }
    serialize_file(specs, path)


# Layouts


@pytest.mark.parametrize("case", CASES)
def test_published_to_published_keeps_every_bit(case, tmp_path):
    out = convert(GOLDEN / case, tmp_path / "out")
    assert out == tmp_path / "out" and differing(out, GOLDEN / case) == []
    assert load(out).config == load(GOLDEN / case).config


@pytest.mark.parametrize("case", CASES)
def test_to_orbax_and_back_keeps_every_bit(case, tmp_path):
    orbax = convert(GOLDEN / case, tmp_path / "orbax", to="orbax")
    assert (orbax / "manifest.json").is_file() and not list(orbax.glob("*.safetensors"))
    out = convert(orbax, tmp_path / "out", to="hf", max_shard_bytes=250_000)
    assert differing(out, GOLDEN / case) == []
    assert load(out).config == load(GOLDEN / case).config


def test_companions_go_all_the_way(tmp_path):
    source = tmp_path / "in"
    shutil.copytree(GOLDEN / "v3_bf16", source)
    config = json.loads((source / "config.json").read_text())
    for file in TOKENIZER.iterdir():
        shutil.copy(file, source)
    size = max(json.loads((source / "tokenizer.json").read_text())["model"]["vocab"].values()) + 500
    arrays = published(source)
    for name in [n for n in arrays if re.search(r"embed_tokens|lm_head|shared_head\.head", n)]:
        arrays[name] = np.resize(arrays[name], (size, arrays[name].shape[1]))
    save_arrays(arrays, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": size}))
    (source / "generation_config.json").write_text('{"temperature":   0.6}')
    orbax = convert(source, tmp_path / "orbax", to="orbax")
    for out in (convert(source, tmp_path / "a"), convert(orbax, tmp_path / "b")):
        assert differing(out, source) == []
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (out / name).read_bytes() == (source / name).read_bytes()
        assert load(out).tokenizer is not None


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_without_mtp(to, tmp_path):
    out = convert(GOLDEN / "v3_fp8", tmp_path / "out", to=to, mtp=False)
    model = load(out)
    assert model.config.num_nextn_predict_layers == 0 and "mtp" not in model.params
    again = convert(out, tmp_path / "again")
    held = published(GOLDEN / "v3_fp8")
    layer = f"model.layers.{model.config.num_hidden_layers}."
    assert any(n.startswith(layer) for n in held)
    kept = {n for n in held if not n.startswith(layer)}
    assert published(again).keys() == kept
    assert set(differing(again, GOLDEN / "v3_fp8")) == held.keys() - kept


# Casts


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", ["v3_fp8", "v3_fp8_ue8m0"])
def test_fp8_multiplied_out(case, dtype, tmp_path):
    out = convert(GOLDEN / case, tmp_path / "out", dtype=dtype)
    held, got = published(GOLDEN / case), published(out)
    assert got.keys() == {n for n in held if not n.endswith("_scale_inv")}
    wanted = np.dtype(getattr(ml_dtypes, dtype, np.float32))
    count = 0
    for name, value in got.items():
        source = held[name]
        if scaled := f"{name}_scale_inv" in held:
            # float64 holds the product of 4 and 24 bits exactly: the one rounding is to float32.
            source = reference.dequantize(source, held[f"{name}_scale_inv"]).astype(np.float32)
        count += scaled
        router_bias = name.endswith("e_score_correction_bias")
        assert value.dtype == (np.float32 if router_bias else wanted), name
        np.testing.assert_array_equal(value, source.astype(value.dtype), name)
    assert count == len(held) - len(got) > 20
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and config["torch_dtype"] == dtype
    if dtype == "float32":
        tokens = expected(case)["tokens"]
        assert distance(logits(out, tokens), expected(case)["logits"]) < BOUND


@pytest.mark.parametrize("case", ["qwen2_tied", "v2_like"])
def test_float32_to_bfloat16(case, tmp_path):
    out = convert(GOLDEN / case, tmp_path / "out", dtype="bfloat16")
    held, got = published(GOLDEN / case), published(out)
    assert got.keys() == held.keys()
    for name, value in got.items():
        np.testing.assert_array_equal(value, held[name].astype(ml_dtypes.bfloat16), name)
    orbax = convert(GOLDEN / case, tmp_path / "orbax", to="orbax", dtype="bfloat16")
    assert differing(convert(orbax, tmp_path / "back"), out) == []


# Into FP8


@pytest.mark.parametrize("case", LATENT)
def test_float8_is_the_reference_rounding_of_the_published_set(case, tmp_path):
    plain = GOLDEN / case
    if "fp8" in case:
        plain = convert(GOLDEN / case, tmp_path / "plain", dtype="bfloat16")
    out = convert(plain, tmp_path / "out", dtype="float8", max_shard_bytes=200_000)
    held, got = published(plain), published(out)
    if "fp8" in case:  # the published set, read off files that another program made
        chosen = {n for n, x in published(GOLDEN / case).items() if x.dtype.itemsize == 1}
    else:
        pattern = r"(self_attn\.\w+_proj(_with_mqa)?|mlp\.(.*\.)?(gate|up|down)_proj)\.weight"
        chosen = {n for n in held if re.fullmatch(rf"model\.layers\.\d+\.{pattern}", n)}
    assert got.keys() == held.keys() | {f"{n}_scale_inv" for n in chosen}
    for name, value in held.items():
        if name in chosen:
            weight, scale = reference.quantize(np.asarray(value, np.float32))
            assert got[name].dtype == ml_dtypes.float8_e4m3fn, name
            assert got[name].tobytes() == weight.tobytes(), name
            assert got[f"{name}_scale_inv"].dtype == np.float32
            assert got[f"{name}_scale_inv"].tobytes() == scale.tobytes(), name
        else:
            assert (got[name].dtype, got[name].tobytes()) == (value.dtype, value.tobytes()), name
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }


def test_float8_returns_the_published_bytes(tmp_path):
    """What one program rounded to FP8, multiplied out in float32 and rounded again, is the same."""
    wide = convert(GOLDEN / "v3_fp8", tmp_path / "wide", dtype="float32")
    again = published(convert(wide, tmp_path / "again", dtype="float8"))
    held = published(GOLDEN / "v3_fp8")
    assert again.keys() == held.keys()
    for name, value in held.items():
        if value.dtype.itemsize == 1:
            assert again[name].tobytes() == value.tobytes(), name
        elif name.endswith("_scale_inv"):  # amax is 448 x scale, rounded
            np.testing.assert_allclose(again[name], value, rtol=1.2e-7, err_msg=name)
        else:
            np.testing.assert_array_equal(again[name], value.astype(np.float32), name)


# Root mean square of what FP8 moves the logits by, measured 2026-11-24: 0.10, 0.14, 0.37 (a
# deviation of the logits is 1; untrained routers choose other experts after the slightest change).
@pytest.mark.parametrize(
    "case, bound", [("v2_lite_like", 0.13), ("v2_like", 0.18), ("v3_like", 0.45)]
)
def test_logits_of_float8_are_those_of_the_rounded_weights(case, bound, tmp_path):
    tokens = expected(case)["tokens"]
    out = convert(GOLDEN / case, tmp_path / "fp8", dtype="float8")
    assert load(out).config.quantization_config is not None
    got = logits(out, tokens)

    def rounded(tensors):
        fp8 = published(out)
        for name in tensors:
            if f"{name}_scale_inv" in fp8:
                weight, scale = reference.quantize(tensors[name])
                tensors[name] = reference.dequantize(weight, scale).astype(np.float32)

    by_hand = edited(case, tmp_path / "hand", rounded)
    assert distance(got, logits(by_hand, tokens)) < BOUND
    moved = np.sqrt(np.mean((got - expected(case)["logits"]) ** 2))
    assert 0.02 < moved < bound


@pytest.mark.parametrize("stacked", [False, True])
def test_quantize_in_memory_gives_the_same_files(stacked, tmp_path):
    direct = convert(GOLDEN / "v3_like", tmp_path / "direct", dtype="float8")
    model = load(GOLDEN / "v3_like", stacked=stacked)
    quantized = quantize(model)
    assert differing(save_hf(quantized, tmp_path / "out"), direct) == []
    assert quantized.params["embed_tokens"]["weight"] is model.params["embed_tokens"]["weight"]
    assert quantize(quantized) is quantized


def test_float8_through_orbax(tmp_path):
    direct = convert(GOLDEN / "v2_like", tmp_path / "direct", dtype="float8")
    orbax = convert(GOLDEN / "v2_like", tmp_path / "orbax", to="orbax", dtype="float8")
    assert differing(convert(orbax, tmp_path / "a"), direct) == []
    plain = convert(GOLDEN / "v2_like", tmp_path / "plain", to="orbax")
    assert differing(convert(plain, tmp_path / "b", dtype="float8"), direct) == []


@pytest.mark.parametrize("case", ["v3_fp8", "v3_fp8_ue8m0"])
def test_float8_of_float8_changes_nothing(case, tmp_path):
    assert differing(convert(GOLDEN / case, tmp_path / "a", dtype="float8"), GOLDEN / case) == []
    orbax = convert(GOLDEN / case, tmp_path / "orbax", to="orbax", dtype="float8")
    out = convert(orbax, tmp_path / "b", dtype="float8")
    assert differing(out, GOLDEN / case) == []
    assert load(out).config == load(GOLDEN / case).config


# Memory


def test_memory_is_bounded_by_the_shard(tmp_path):
    """A model of 400 MB passes in shards of 32 MB: the host holds a fifth at most."""
    done = child.run(
        """
        import dataclasses, json, sys
        from pathlib import Path
        import jax
        import numpy as np
        from deepzoo import zoo
        from deepzoo.zoo.config import Config
        from deepzoo.zoo.convert import convert
        from deepzoo.zoo.save import save_hf
        from deepzoo.zoo.types import Model

        def resident(key):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith(key):
                    return int(line.split()[1]) << 10

        golden, out = map(Path, sys.argv[1:])
        config = dataclasses.replace(
            Config.from_hf(json.loads((golden / "v3_bf16" / "config.json").read_text())),
            hidden_size=1024, moe_intermediate_size=512, intermediate_size=2048,
            num_hidden_layers=8, num_nextn_predict_layers=0,
        )
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), zoo.abstract(config))
        save_hf(Model(config, zeros), out / "in", max_shard_bytes=32 << 20)
        convert(golden / "v3_bf16", out / "warm", dtype="float8")
        size = sum(f.stat().st_size for f in (out / "in").iterdir())
        for dtype in (None, "float8"):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
            before = resident("VmRSS")
            convert(out / "in", out / f"{dtype}", dtype=dtype, max_shard_bytes=32 << 20)
            print(size, resident("VmHWM") - before)
        """,
        str(GOLDEN),
        str(tmp_path),
    )
    for line in done.stdout.splitlines():
        size, grown = map(int, line.split())
        assert size > 380e6
        assert grown < 80e6
    assert done.stdout.count("\n") == 2


# Refusals


@pytest.mark.parametrize(
    "case, options, said",
    [
        ("qwen2_tied", {"dtype": "float8"}, "qwen2 models have no FP8 form"),
        ("llama31_like", {"dtype": "float8", "to": "orbax"}, "llama models have no FP8 form"),
        ("v3_bf16", {"dtype": "int8"}, "dtype 'int8'.* bfloat16, float32, float8"),
        ("v3_bf16", {"to": "gguf"}, "to='gguf'.* hf or orbax"),
        ("v3_bf16", {"max_shard_bytes": 0}, "max_shard_bytes is 0"),
    ],
)
def test_requests_that_cannot_be_served(case, options, said, tmp_path):
    with pytest.raises(RequestError, match=said) as error:
        convert(GOLDEN / case, tmp_path / "new" / "out", **options)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_student_in_orbax_to_float8(tmp_path):
    orbax = convert(GOLDEN / "qwen3_yarn", tmp_path / "orbax", to="orbax")
    with pytest.raises(RequestError, match="qwen3 models have no FP8 form"):
        convert(orbax, tmp_path / "out", dtype="float8")
    assert [p.name for p in tmp_path.iterdir()] == ["orbax"]


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_a_destination_in_use(to, tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(RequestError, match="is not empty; name a new directory"):
        convert(GOLDEN / "v3_bf16", tmp_path, to=to)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_source_into_itself(tmp_path):
    source = tmp_path / "in"
    shutil.copytree(GOLDEN / "v3_bf16", source)
    with pytest.raises(RequestError, match="is not empty"):
        convert(source, source, dtype="float8")
    assert differing(source, GOLDEN / "v3_bf16") == []


def damage_truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def damage_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_bias": True}))


def damage_weights(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("to", ["hf", "orbax"])
@pytest.mark.parametrize(
    "damage, error, said",
    [
        (damage_truncated, WeightError, "not a whole safetensors file"),
        (damage_config, ConfigError, "attention_bias"),
        (damage_weights, WeightError, "no weights"),
    ],
)
def test_a_damaged_source_leaves_nothing(damage, error, said, to, tmp_path):
    source = tmp_path / "in"
    shutil.copytree(GOLDEN / "v3_bf16", source)
    damage(source)
    with pytest.raises(error, match=said):
        convert(source, tmp_path / "out", to=to)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def edit_nan(tensors):
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)


def edit_alias(tensors):
    name = next(n for n in tensors if n.endswith("shared_head.head.weight"))
    tensors[name] = -tensors[name]


def edit_norms(tensors):
    name = "model.norm.weight"
    tensors[name] = tensors[name].astype(np.float32)


@pytest.mark.parametrize("dtype", [None, "float8"])
@pytest.mark.parametrize(
    "edit, said",
    [
        (edit_nan, "model.norm.weight holds NaN"),
        (edit_alias, "shared_head.head.weight differs from lm_head.weight"),
        (edit_norms, "norm weights have several dtypes"),
    ],
)
def test_tensors_that_load_refuses_are_not_converted(edit, said, dtype, tmp_path):
    source = edited("v3_bf16", tmp_path / "in", edit)
    with pytest.raises(WeightError, match=re.escape(said)):
        convert(source, tmp_path / "out", dtype=dtype)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_value_that_the_new_dtype_cannot_hold(tmp_path):
    def grow(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"].copy()
        tensors["lm_head.weight"][3, 3] = np.finfo(np.float32).max  # infinity in bfloat16

    source = edited("qwen2_untied", tmp_path / "in", grow)
    with pytest.raises(WeightError, match=r"lm_head\.weight.*infinity"):
        convert(source, tmp_path / "out", dtype="bfloat16")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_source_that_changes_meanwhile(tmp_path):
    source = tmp_path / "in"
    shutil.copytree(GOLDEN / "v3_bf16", source)
    file = source / "model.safetensors"

    def touch(done, total):
        with file.open("r+b") as opened:
            opened.write(file.read_bytes()[:8])

    with pytest.raises(WeightError, match="changed while it was read"):
        convert(source, tmp_path / "out", progress=touch)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
