"""Names, shapes and dtypes are a bijection, values are exact, and a mismatch is named."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import digests
import faults
import ml_dtypes
import numpy as np
import pytest
import shards
from golden import CASES, GOLDEN, LATENT, MTP

from deepzoo import zoo
from deepzoo.kernels import block_fp8
from deepzoo.zoo import files, names
from deepzoo.zoo.errors import WeightError
from deepzoo.zoo.fingerprint import fingerprint
from deepzoo.zoo.weights import float8_to_float32, non_finite

SINGLE = "model.safetensors"
TENSORS = json.loads((digests.DATA / "tensors.json").read_text())
RELEASED = [(name, arch) for arch, entry in TENSORS.items() for name in entry["models"]]


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    """A small FP8 checkpoint with an MTP layer, in one file, to be damaged."""
    return shards.copy_case(GOLDEN / "v3_fp8", tmp_path / "fp8")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same in three shards with an index, float32."""
    return shards.copy_case(GOLDEN / "v3_like", tmp_path / "sharded")


def refused(directory: Path, match: str, **options: Any) -> str:
    """Loading raises one line that matches, and writes nothing."""
    with shards.unchanged(directory.parent), pytest.raises(WeightError, match=match) as error:
        zoo.load(directory, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- the table of names ---------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "architecture"), RELEASED)
def test_names_shapes_and_dtypes_are_the_published_ones(model: str, architecture: str):
    entry, table = TENSORS[architecture], names.tensors(zoo.config(model))
    lines = [digests.line(t.name, t.shape, t.dtype) for t in table.values()]
    assert len(lines) == entry["tensors"]
    assert digests.digest_tensors(lines) == entry["sha256"]


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize(
    "model",
    [
        "deepseek-v2-lite",
        "deepseek-v2",
        "deepseek-r1",
        "moonlight-16b-a3b",
        "deepseek-r1-distill-qwen-1.5b",
        "deepseek-r1-distill-llama-8b",
        "deepseek-r1-0528-qwen3-8b",
    ],
)
def test_leaves_are_the_models_own(model: str, stacked: bool):
    config = zoo.config(model)
    ours = {path: (x.shape, str(x.dtype)) for path, x in names.flatten(
        zoo.abstract(config, stacked=stacked))}  # fmt: skip
    table = names.leaves(config, stacked=stacked)
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in table.items()} == ours


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_every_element_of_every_leaf_is_filled_by_one_tensor(case: str, stacked: bool):
    config = zoo.load(GOLDEN / case).config
    for path, leaf in names.leaves(config, stacked=stacked).items():
        count = np.zeros(leaf.shape, int)
        for tensor in leaf.tensors:
            assert tensor.path == path
            count[tensor.index] += 1
        assert (count == 1).all(), path


def test_flatten_and_nest_are_inverse():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert names.nest(dict(names.flatten(tree))) == tree


# --- values ---------------------------------------------------------------------------------------


def independent(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor, by the helpers that know nothing of the zoo."""
    found = {}
    for file in directory.glob("*.safetensors"):
        for name, (code, shape, data) in shards.tensors(file).items():
            found[name] = np.frombuffer(data, files.DTYPES[code]).reshape(shape)
    return found


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_every_tensor_arrives_bit_for_bit(case: str, stacked: bool):
    model, disk = zoo.load(GOLDEN / case, stacked=stacked), independent(GOLDEN / case)
    leaves = dict(names.flatten(model.params))
    table = names.tensors(model.config, stacked=stacked)
    assert table.keys() == disk.keys()
    for tensor in table.values():
        value = np.asarray(leaves[tensor.path])[tensor.index]
        assert value.dtype == disk[tensor.name].dtype
        assert value.tobytes() == disk[tensor.name].tobytes(), tensor.name


@pytest.mark.parametrize("case", ["v3_fp8", "v3_fp8_ue8m0"])
def test_dequantised_weights_are_the_kernels(case: str):
    quantised, plain = zoo.load(GOLDEN / case), zoo.load(GOLDEN / case, quantized=False)
    assert plain.config == dataclasses.replace(quantised.config, quantization_config=None)
    before, after = (dict(names.flatten(m.params)) for m in (quantised, plain))
    scaled = [p for p in before if p[-1] == "weight_scale_inv"]
    assert scaled and after.keys() == before.keys() - set(scaled)
    for path in scaled:
        weight = (*path[:-1], "weight")
        want = block_fp8.dequantize(before[weight], before[path], "bfloat16")
        assert after[weight].dtype == "bfloat16"
        np.testing.assert_array_equal(np.asarray(after[weight]), np.asarray(want))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["v3_fp8", "v3_like", "v3_bf16", "qwen2_tied"])
def test_casting(case: str, dtype: str):
    plain, cast = zoo.load(GOLDEN / case), zoo.load(GOLDEN / case, dtype=dtype)
    assert cast.config == dataclasses.replace(plain.config, dtype=dtype)
    before, after = (dict(names.flatten(m.params)) for m in (plain, cast))
    kept = {"linear"} if plain.config.quantization_config else set()
    kept |= {"scale", "router_bias"}
    for path, leaf in names.leaves(plain.config, stacked=False).items():
        want = before[path] if leaf.kind in kept else before[path].astype(dtype)
        assert after[path].dtype == want.dtype, path
        np.testing.assert_array_equal(np.asarray(after[path]), np.asarray(want))


def test_every_finite_float8_becomes_the_right_float32():
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    finite = every[~np.isnan(every.astype(np.float32))]
    assert finite.size == 254
    want = finite.astype(np.float32)
    assert float8_to_float32(finite).tobytes() == want.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
def test_non_finite_is_found_anywhere(dtype: str):
    values = np.random.default_rng(0).standard_normal(3 << 20).astype(np.float32).astype(dtype)
    values[7] = 0 if dtype == "float8_e4m3fn" else np.finfo(np.float16).max / 2
    assert not non_finite(values)
    for bad in (np.nan, -np.nan) if dtype == "float8_e4m3fn" else (np.nan, np.inf, -np.inf):
        for at in (0, 1_234_567, values.size - 1):
            kept, values[at] = values[at], bad
            assert non_finite(values)
            values[at] = kept


# --- MTP ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MTP)
def test_without_mtp_the_rest_is_the_same(case: str, tmp_path: Path):
    whole, without = zoo.load(GOLDEN / case), zoo.load(GOLDEN / case, mtp=False)
    assert without.config.num_nextn_predict_layers == 0 and "mtp" not in without.params
    rest = {k: v for k, v in whole.params.items() if k != "mtp"}
    assert fingerprint(without.params) == fingerprint(rest)


def drop_mtp(directory: Path, keep: int = 0) -> None:
    """Removes the tensors of the MTP layer but `keep` of them, as transformers does on saving."""
    config = json.loads((directory / "config.json").read_text())
    at = f"model.layers.{config['num_hidden_layers']}."

    def change(held: dict[str, Any]) -> None:
        for name in [n for n in held if n.startswith(at)][keep:]:
            del held[name]

    shards.edit(directory / SINGLE, change)


def test_a_promised_mtp_layer_that_is_not_there(fp8: Path):
    whole = zoo.load(fp8, mtp=False)
    drop_mtp(fp8)
    told = refused(fp8, "promises 1 MTP layer")
    assert "transformers leaves them out" in told and "mtp=False (--no-mtp)" in told
    again = zoo.load(fp8, mtp=False)
    assert again.config == whole.config
    assert fingerprint(again.params) == fingerprint(whole.params)


def test_half_an_mtp_layer_is_refused_even_without_it(fp8: Path):
    drop_mtp(fp8, keep=5)
    refused(fp8, r"\d+ tensors of this config are missing: model.layers.2")
    refused(fp8, r"\d+ tensors of this config are missing: model.layers.2", mtp=False)


@pytest.mark.parametrize("copy", ["embed_tokens", "shared_head.head"])
def test_a_copy_that_differs_is_refused(fp8: Path, copy: str):
    name = f"model.layers.2.{copy}.weight"
    shards.poke(fp8 / SINGLE, name, 77, ml_dtypes.bfloat16(3))
    refused(fp8, f"{name} differs from")
    zoo.load(fp8, mtp=False)


# --- the bijection --------------------------------------------------------------------------------


def test_a_missing_tensor(fp8: Path):
    shards.edit(fp8 / SINGLE, lambda t: t.pop("model.norm.weight"))
    refused(fp8, "1 tensors of this config are missing: model.norm.weight")


def test_an_extra_tensor(fp8: Path):
    shards.edit(fp8 / SINGLE, lambda t: t.update(surprise=t["model.norm.weight"]))
    refused(fp8, "1 tensors do not belong to this config: surprise")


def test_many_are_counted_and_ten_are_named(fp8: Path):
    def change(held: dict[str, Any]) -> None:
        for name in [n for n in held if ".experts." in n]:
            held["other." + name] = held.pop(name)

    shards.edit(fp8 / SINGLE, change)
    told = refused(fp8, "96 tensors of this config are missing: .*; 96 tensors do not belong")
    assert told.count(", and 86 more") == 2
    assert told.count("model.layers.") == 20


def test_names_from_the_file_are_shown_harmlessly(fp8: Path):
    def change(held: dict[str, Any]) -> None:
        for name in ("../../etc/passwd", "", "a\nb\x1b[31m", "x" * 5000):
            held[name] = held["model.norm.weight"]

    shards.edit(fp8 / SINGLE, change)
    told = refused(fp8, "4 tensors do not belong to this config")
    assert "\x1b" not in told and len(told) < 600 and "../../etc/passwd" in told


def test_a_tied_model_has_no_head_and_an_untied_one_has(tmp_path: Path):
    tied = shards.copy_case(GOLDEN / "qwen2_tied", tmp_path / "tied")
    faults.edit_json(tied / "config.json", lambda c: c.update(tie_word_embeddings=False))
    refused(tied, "1 tensors of this config are missing: lm_head.weight")
    untied = shards.copy_case(GOLDEN / "qwen2_untied", tmp_path / "untied")
    faults.edit_json(untied / "config.json", lambda c: c.update(tie_word_embeddings=True))
    refused(untied, "1 tensors do not belong to this config: lm_head.weight")


@pytest.mark.parametrize("case", LATENT)
def test_a_wrong_shape(case: str, tmp_path: Path):
    directory = shards.copy_case(GOLDEN / case, tmp_path / case)
    file = sorted(directory.glob("*.safetensors"))[0]
    name, (code, shape, data) = next(
        (n, t) for n, t in shards.tensors(file).items() if len(t[1]) == 2 and t[1][0] != t[1][1]
    )
    shards.edit(file, lambda t: t.update({name: (code, shape[::-1], data)}))
    refused(directory, rf"1 tensors .*{name} is {code} \[{shape[1]}, {shape[0]}\], expected")


def test_a_dtype_of_the_same_size_is_refused(fp8: Path):
    """The library accepts this, and would hand out other numbers."""
    for name, code in (("model.embed_tokens.weight", "F16"),
                       ("model.layers.0.self_attn.o_proj.weight_scale_inv", "I32"),
                       ("model.layers.0.self_attn.o_proj.weight", "F8_E5M2")):  # fmt: skip
        kept = (fp8 / SINGLE).read_bytes()
        shards.edit(fp8 / SINGLE, lambda t, n=name, c=code: t.update({n: (c, *t[n][1:])}))
        refused(fp8, f"{name} is {code} ")
        (fp8 / SINGLE).write_bytes(kept)


def test_a_router_bias_is_always_float32(tmp_path: Path):
    directory = shards.copy_case(GOLDEN / "v3_bf16", tmp_path / "x")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"

    def change(held: dict[str, Any]) -> None:
        _, shape, data = held[name]
        half = np.frombuffer(data, np.float32).astype(ml_dtypes.bfloat16)
        held[name] = ("BF16", shape, half.tobytes())

    shards.edit(directory / SINGLE, change)
    refused(directory, f"{name} is BF16 .*expected F32")


def to_float32(held: dict[str, Any], chosen: list[str]) -> None:
    for name in chosen:
        _, shape, data = held[name]
        wide = np.frombuffer(data, ml_dtypes.bfloat16).astype(np.float32)
        held[name] = ("F32", shape, wide.tobytes())


def test_norms_may_be_float32_but_all_of_them(fp8: Path):
    norms = [n for n in shards.tensors(fp8 / SINGLE) if "norm" in n]
    assert len(norms) > 10
    shards.edit(fp8 / SINGLE, lambda t: to_float32(t, norms[:1]))
    told = refused(fp8, r"norm weights have several dtypes \(BF16, F32\)")
    assert norms[0] in told
    shards.edit(fp8 / SINGLE, lambda t: to_float32(t, norms[1:]))
    model = zoo.load(fp8)
    assert model.config.norm_dtype == "float32" and model.config.dtype == "bfloat16"
    assert model.params["norm"]["weight"].dtype == "float32"
    want = {p: (x.shape, str(x.dtype)) for p, x in names.flatten(
        zoo.abstract(model.config, stacked=False))}  # fmt: skip
    found = {p: (x.shape, str(x.dtype)) for p, x in names.flatten(model.params)}
    assert found == want


# --- FP8 ------------------------------------------------------------------------------------------

SCALE = "model.layers.0.self_attn.kv_b_proj.weight_scale_inv"


def test_a_missing_scale(fp8: Path):
    shards.edit(fp8 / SINGLE, lambda t: t.pop(SCALE))
    refused(fp8, f"1 tensors of this config are missing: {SCALE}")


def test_a_scale_of_another_block_shape(fp8: Path):
    def change(held: dict[str, Any]) -> None:
        code, shape, data = held[SCALE]
        held[SCALE] = (code, [shape[0] + 1, shape[1]], data + data[: 4 * shape[1]])

    shards.edit(fp8 / SINGLE, change)
    refused(fp8, f"{SCALE} is F32")


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize(
    ("value", "message"),
    [(0.0, "zero or negative"), (-1.0, "zero or negative")]
    + [(x, "NaN or infinity") for x in (np.nan, np.inf)],
)
def test_a_scale_that_is_no_scale(fp8: Path, value: float, message: str, quantized: bool):
    shards.poke(fp8 / SINGLE, SCALE, 1, np.float32(value))
    refused(fp8, f"{SCALE} holds .*{message}", quantized=quantized)


def test_scales_without_a_quantization_config_are_left_over(fp8: Path):
    faults.edit_json(fp8 / "config.json", lambda c: c.pop("quantization_config") and None)
    refused(fp8, "tensors do not belong to this config: .*weight_scale_inv")


@pytest.mark.parametrize("options", [{}, {"quantized": False}, {"dtype": "float32"}], ids=str)
@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("model.layers.1.mlp.experts.5.up_proj.weight", np.uint8(0xFF)),
        ("model.layers.1.mlp.gate.weight", ml_dtypes.bfloat16(np.inf)),
        ("model.layers.1.mlp.gate.e_score_correction_bias", np.float32(np.nan)),
        ("model.norm.weight", ml_dtypes.bfloat16(np.nan)),
    ],
)
def test_a_value_that_is_not_finite(fp8: Path, name: str, bad: Any, options: dict[str, Any]):
    shards.poke(fp8 / SINGLE, name, 3, bad)
    refused(fp8, f"{name} holds NaN or infinity", **options)
