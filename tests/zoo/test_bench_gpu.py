"""`deepzoo bench gpu`: the program for a GPU, run at its smallest size, and its arithmetic."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from deepzoo import zoo
from deepzoo.zoo import cli
from deepzoo.zoo.bench import gpu
from deepzoo.zoo.config import Quantization
from deepzoo.zoo.count import cache_bytes, count
from deepzoo.zoo.functional import abstract


def test_without_a_gpu_the_full_size_says_so_and_succeeds(capsys: pytest.CaptureFixture[str]):
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU here")
    assert cli.main(["bench", "gpu"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("no GPU here") and "--size nano" in line


def test_the_nano_size_measures_everything(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    args = ["bench", "gpu", "--size", "nano", "--rounds", "1", "--json"]
    assert cli.main([*args, "--out", str(tmp_path / "x.json")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "x.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert [name.split(",")[0] for name in rows] == [
        "prefill", "decode", "training step", *["one 64-wide V3 layer"] * 2
    ]  # fmt: skip
    for row in rows.values():
        # The time itself is noise at this size, and a slope of noise may fall below zero.
        assert row["note"] == "" or re.search(r"^noise|as fast as bf16", row["note"]), row
        assert row["rate"] is not None and row["seconds"] is not None, row


def test_sizes_of_the_full_run():
    size = gpu.size("full")
    assert count(size.serve).main == pytest.approx(15.7e9, rel=0.01)
    assert 2.5e9 < count(size.train).main < 3.5e9 and 18 * count(size.train).main < 60e9
    assert size.layer.n_routed_experts == 256 and size.layer.hidden_size == 7168


def test_bytes_of_a_decode_step():
    config = zoo.config("deepseek-v2-lite")
    counted = count(config)
    embedding = config.vocab_size * config.hidden_size
    one = gpu.step_bytes(config, 1, 0)
    assert one == pytest.approx(2 * (counted.active - embedding), rel=1e-6)
    # Thousands of tokens meet every expert; a longer context costs its cache and nothing else.
    assert gpu.step_bytes(config, 10_000, 0) == pytest.approx(2 * (counted.main - embedding))
    longer = gpu.step_bytes(config, 32, 4096) - gpu.step_bytes(config, 32, 0)
    assert longer == 32 * 4096 * cache_bytes(config).stored == 32 * 4096 * 27 * 576 * 2


def test_flops_of_a_token():
    config = zoo.config("deepseek-v2-lite")
    active = count(config).active_without_embedding
    assert gpu.token_flops(config, 0) == 2 * active
    per_key = gpu.token_flops(config, 1) - gpu.token_flops(config, 0)
    assert per_key == 2 * 27 * 16 * (192 + 128)


def test_random_parameters_have_the_models_tree():
    config = dataclasses.replace(gpu.size("nano").layer, quantization_config=Quantization())
    params = gpu.random_params(config)
    want = abstract(config, stacked=False)
    assert jax.tree.structure(params) == jax.tree.structure(want)
    for made, leaf in zip(jax.tree.leaves(params), jax.tree.leaves(want), strict=True):
        assert (made.shape, made.dtype) == (leaf.shape, leaf.dtype)
    weight = params["moe"]["0"]["mlp"]["experts"]["gate_proj"]
    dense = weight["weight"].astype(jnp.float32) * weight["weight_scale_inv"].mean()
    assert float(dense.std()) == pytest.approx(config.initializer_range, rel=0.1)


def test_mistakes_about_peers(capsys: pytest.CaptureFixture[str]):
    nano = ["bench", "gpu", "--size", "nano"]
    assert cli.main([*nano, "--against", "vllm"]) == 2
    assert "unknown peer 'vllm'; choose from transformers" in capsys.readouterr().err
    assert cli.main([*nano, "--against", "transformers"]) == 2
    assert "needs --peer-python" in capsys.readouterr().err
    args = ["--against", "transformers", "--peer-python", sys.executable]
    assert cli.main([*nano, *args]) == 2
    assert "the peer transformers ended; the last it said" in capsys.readouterr().err
