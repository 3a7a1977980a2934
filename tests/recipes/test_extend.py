"""Context extension: the configs it makes, what it learns from, and that long contexts gain."""

import dataclasses
import functools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import child
import jax
import numpy as np
import pytest

from deepzoo import zoo
from deepzoo.recipes import extend, pretrain
from deepzoo.recipes.parts import positions, tasks
from deepzoo.recipes.parts.log import METRICS, read_metrics
from deepzoo.recipes.parts.records import DataError
from deepzoo.recipes.parts.schedules import warmup_constant_decay
from deepzoo.zoo.cli import recipes
from deepzoo.zoo.errors import RequestError
from deepzoo.zoo.rope_scaling import RopeScaling
from deepzoo.zoo.tokenizer import Tokenizer
from deepzoo.zoo.types import Model

NANO = extend.PRESETS["nano"]
DENSE = zoo.Config(
    model_type="qwen2", vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
)  # fmt: skip


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer(tasks.tokenizer_files(), pretrain.PRESETS["nano"].config)


@pytest.mark.parametrize(
    ("preset", "base", "released", "mscale"),
    [
        ("v2_32k", "v2", "deepseek-v2", 0.707),
        ("v3_32k_128k", "v3", "deepseek-v3-base", 1.0),
    ],
)
def test_the_papers_settings_make_the_published_config(preset, base, released, mscale):
    before, recipe = pretrain.PRESETS[base].config, extend.PRESETS[preset]
    assert before.rope_scaling is None
    assert before.max_position_embeddings == 4096
    after = extend.extended(before, recipe)
    published = {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": mscale, "mscale_all_dim": mscale,
        "original_max_position_embeddings": 4096, "type": "yarn",
    }  # fmt: skip
    written = after.to_hf()
    assert json.dumps(written["rope_scaling"], sort_keys=True) == json.dumps(published)
    assert written["max_position_embeddings"] == 163840
    target = zoo.config(released)
    same = {"dtype": "float32", "initializer_range": 0.006, "quantization_config": None}
    assert after == dataclasses.replace(target, **same)
    temperature = {0.707: 0.0707, 1.0: 0.1}[mscale] * math.log(40) + 1  # the papers' sqrt(t)
    assert after.softmax_scale == pytest.approx(192**-0.5 * temperature**2, rel=1e-12)
    assert before.softmax_scale == pytest.approx(192**-0.5, rel=1e-12)
    assert after.rope_scaling is not None
    assert after.rope_scaling.cos_sin_factor() == 1.0


def test_the_presets_are_the_papers():
    v2, v3 = extend.PRESETS["v2_32k"], extend.PRESETS["v3_32k_128k"]
    assert (v2.lengths, v2.rows, v2.batches) == ((32768,), (576,), (1000,))
    assert (v3.lengths, v3.rows, v3.batches) == ((32768, 131072), (1920, 480), (1000, 1000))
    assert v3.rate == 7.3e-6
    assert v2.rate == pytest.approx(2.4e-4 * 0.316**2)
    assert extend.tokens_before(v2, 1000) == 576e3 * 32768
    assert [extend.tokens_before(v3, s) for s in (0, 1000, 1001, 2000)] == [
        0, 1920e3 * 32768, 1920e3 * 32768 + 480 * 131072, 1920e3 * 32768 + 480e3 * 131072,
    ]  # fmt: skip
    assert v3.mtp == 0.1
    assert v3.bias_rate == 0.0
    factor = warmup_constant_decay(2000, v3.warmup, v3.decay)
    assert [float(factor(s)) for s in (0, 1, 1000, 1999)] == [1.0] * 4
    for recipe in extend.PRESETS.values():
        extend.check(recipe)


def test_a_student_has_the_temperature_on_cosines_and_sines():
    after = extend.extended(DENSE, dataclasses.replace(NANO, factor=8.0, mscale=1.0))
    again = zoo.Config.from_hf(json.loads(json.dumps(after.to_hf())))
    assert again.rope_scaling == after.rope_scaling
    assert after.rope_scaling is not None
    assert after.rope_scaling.cos_sin_factor() == pytest.approx(0.1 * math.log(8) + 1)
    assert after.softmax_scale == DENSE.softmax_scale
    assert after.to_hf()["rope_scaling"]["rope_type"] == "yarn"


def test_what_is_no_extension_is_refused():
    config = pretrain.PRESETS["nano"].config
    assert extend.extended(config, NANO).max_position_embeddings == 1024
    with pytest.raises(RequestError, match="rows of 1024 tokens do not fit into 4 times 128"):
        extend.extended(config, dataclasses.replace(NANO, factor=4))
    longer = extend.extended(config, NANO)
    twice = extend.extended(longer, dataclasses.replace(NANO, factor=16, original=0))
    assert (twice.max_position_embeddings, twice.rope_scaling) == (
        2048, dataclasses.replace(longer.rope_scaling, factor=16),
    )  # fmt: skip
    for changes in ({"factor": 4, "lengths": (512,)}, {"original": 1024}):
        with pytest.raises(RequestError, match=r"has 8 times 128 positions; .* is no extension"):
            extend.extended(longer, dataclasses.replace(NANO, **changes))
    llama = zoo.config("deepseek-r1-distill-llama-8b")
    with pytest.raises(RequestError, match="the rule 'llama3'"):
        extend.extended(llama, NANO)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rows": (8,)}, r"a number above 0 for each phase; they are \[512, 1024\], \[8\]"),
        ({"batches": (0, 1)}, r"above 0 for each phase; .* \[0, 1\]"),
        ({"lengths": (), "rows": (), "batches": ()}, "above 0 for each phase"),
        ({"accumulate": 8}, "4 rows cannot be cut into 8 equal micro-batches"),
        ({"held_out": "x.jsonl"}, "--held-out goes with --data"),
        ({"mtp": 0.1}, "v2-nano has no MTP layer to train"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, changes, told):
    with pytest.raises(RequestError, match=told):
        extend.train(dataclasses.replace(NANO, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def problems_of(batch) -> list[str]:
    """The problems of a batch whose solutions are there as a whole."""
    found = []
    for row in batch["tokens"]:
        for ids in np.split(row, np.flatnonzero(row == 1))[1:]:
            if ids[-1] == 2:
                problem, *steps = tokenizer().decode(ids[1:-1].tolist()).split(" = ")
                assert steps == tasks.steps(problem)
                found.append(problem)
    return found


def test_the_rows_of_a_task_are_its_solutions_and_those_measured_on_are_held_out():
    model = Model(pretrain.PRESETS["nano"].config, {}, tokenizer())
    config = extend.extended(model.config, NANO)
    phases, held, facts = extend.data(NANO, model, config)
    shapes = [(8, 513), (4, 1025)]
    for phase, shape in zip(phases, shapes, strict=True):
        one, again, other = phase(3), phase(3), phase(4)
        assert {a.shape for a in one.values()} == {shape}
        for name in one:
            np.testing.assert_array_equal(one[name], again[name])
        assert (one["tokens"] != other["tokens"]).mean() > 0.3
        assert not one["segments"].any()  # they see each other
        made = problems_of(one)
        assert len(made) > 50
        assert not any(map(tasks.held_out, made))
    assert (phases[0](0)["tokens"][:4, :500] != phases[1](0)["tokens"][:, :500]).mean() > 0.3
    assert held is not None
    assert held.edges == [0, 128, 256, 512, 1024]
    made = problems_of(held.batch)
    assert len(made) > 500
    assert all(map(tasks.held_out, made))
    assert facts == {}
    masked, _, _ = extend.data(dataclasses.replace(NANO, masked=True), model, config)
    assert masked[0](0)["segments"].max() > 3


def test_one_text_in_20_is_held_out_by_its_hash(tmp_path: Path):
    path = tmp_path / "texts.jsonl"
    written = [f"{n} + {n + 1} = {2 * n + 1}" for n in range(450)]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in [*written, written[0]]))
    model = Model(pretrain.PRESETS["nano"].config, {}, tokenizer())
    recipe = dataclasses.replace(NANO, data=str(path), lengths=(64, 128), held_rows=2, factor=8)

    def split(recipe) -> list[list[str]]:
        found = []
        for made in extend.texts(recipe, model):
            assert made is not None
            cuts = np.split(made.tokens, made.starts[1:-1])
            found.append([tokenizer().decode(c[1:-1].tolist()) for c in cuts])
        return found

    learned, held = split(recipe)
    assert 20 <= len(held) <= 34
    assert sorted([*learned, *held]) == sorted([*written, written[0]])
    assert not set(learned) & set(held)
    config = extend.extended(model.config, recipe)
    phases, rows, facts = extend.data(recipe, model, config)
    assert [p(0)["tokens"].shape for p in phases] == [(8, 65), (4, 129)]
    assert rows is not None
    assert (rows.batch["tokens"].shape, rows.edges) == ((1, 129), [0, 128])  # no more are there
    assert set(facts) == {"data", "held_out"}
    long = dataclasses.replace(recipe, lengths=(64, 512))
    with pytest.raises(DataError, match=r"held-out texts have .* fewer than one row of 512"):
        extend.data(long, model, config)
    path.write_text(json.dumps({"text": "1 + 1 = 2"}) + "\n")
    with pytest.raises(DataError, match="0 of its 1 texts are held out"):
        extend.texts(recipe, model)
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "2 + 2 = 4"}) + "\n")
    assert split(dataclasses.replace(recipe, held_out=str(other))) == [["1 + 1 = 2"], ["2 + 2 = 4"]]
    assert extend.texts(dataclasses.replace(recipe, held_rows=0), model)[1] is None


def test_losses_are_sorted_by_what_is_before_a_token():
    config = dataclasses.replace(DENSE, dtype="float32", initializer_range=0.3)
    rng, length = np.random.default_rng(0), 12
    segments = np.zeros((4, length + 1), np.int32)
    segments[0, 7:] = 1
    batch = {
        "tokens": rng.integers(3, 30, segments.shape).astype(np.int32), "segments": segments,
        "weights": rng.integers(0, 2, segments.shape).astype(np.float32),
    }  # fmt: skip
    rows = positions.held(batch, 3)
    assert rows.edges == [0, 3, 6, 12]
    params = zoo.init(config, jax.random.key(0))
    found = positions.measure(config, params, rows, 2)
    seen = batch["tokens"][:, :-1]
    logits = zoo.apply(config, params, seen, segment_ids=segments[:, :-1]).logits
    logp = np.asarray(jax.nn.log_softmax(logits), np.float64)
    total, weight = np.zeros((2, 4, 3))
    for n, t in np.ndindex(4, length):
        inside, place = segments[n, t] == segments[n, t + 1], t - 7 * int(segments[n, t])
        r = 0 if place < 3 else 1 if place < 6 else 2
        w = float(batch["weights"][n, t + 1]) * inside
        total[n, r] -= w * logp[n, t, batch["tokens"][n, t + 1]]
        weight[n, r] += w
    np.testing.assert_array_equal(rows.weight, weight)
    np.testing.assert_allclose(found, total, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(positions.means(rows, found), found.sum(0) / weight.sum(0))
    mean, half = positions.change(rows, found, found + weight)  # one nat more everywhere
    np.testing.assert_allclose(mean, 1.0)
    np.testing.assert_allclose(half, 0.0, atol=1e-9)
    noise = rng.normal(size=(4, 3))
    mean, half = positions.change(rows, found, found + noise)
    left = noise - weight * mean
    np.testing.assert_allclose(mean, noise.sum(0) / weight.sum(0))
    np.testing.assert_allclose(
        half, 1.959964 * 2 * left.std(0, ddof=0) * (4 / 3) ** 0.5 / weight.sum(0)
    )


def test_a_copied_file_runs_alone_and_long_contexts_gain(tmp_path: Path):
    """v2-nano, from documents of a hundred tokens that are alone to rows of 256."""
    shutil.copy(recipes.path("extend"), tmp_path / "mine.py")
    flags = "--lengths 256 --rows 4 --batches 16 --factor 4 --original 64 --held-rows 16"
    done = subprocess.run(
        [sys.executable, "mine.py", "--out", "run", *flags.split(), "--no-tensorboard"],
        cwd=tmp_path, text=True, capture_output=True, check=False,
        env={**os.environ, **child.on_cpu(1)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    ranges = report["ranges"]
    assert [(r["from"], r["to"]) for r in ranges] == [(0, 64), (64, 128), (128, 256)]
    assert all(r["targets"] > 300 for r in ranges)
    assert ranges[1]["change"] + ranges[1]["interval"] < -0.5, ranges
    assert ranges[2]["change"] + ranges[2]["interval"] < -5.0, ranges
    for r in ranges:
        assert r["change"] == pytest.approx(r["trained"] - r["as it was"])
    assert "| 128 to 256 |" in (tmp_path / "run" / "report.md").read_text()
    logged = [r for r in read_metrics(tmp_path / "run" / METRICS) if "held_out_128_256" in r]
    assert [r["step"] for r in logged] == [16]
    assert logged[0]["held_out_128_256"] == pytest.approx(ranges[2]["trained"], abs=1e-5)
    written = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert written["max_position_embeddings"] == 256
    assert written["rope_scaling"] == {
        "type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "beta_fast": 32,
        "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
    }  # fmt: skip
    assert zoo.load(tmp_path / "run" / "model").config.rope_scaling == RopeScaling(
        rope_type="yarn", type_key="type", factor=4, original_max_position_embeddings=64,
        beta_fast=32, beta_slow=1, mscale=0.707, mscale_all_dim=0.707,
    )  # fmt: skip
