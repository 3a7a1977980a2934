"""Adapters: added or merged they give the same, only they are trained, PEFT reads what is written.

tests/golden/peft: made by make.py there, with PEFT itself.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden import GOLDEN, golden

from deepzoo import zoo
from deepzoo.kernels import block_fp8
from deepzoo.recipes import sft
from deepzoo.recipes.parts import lora
from deepzoo.recipes.parts.losses import next_token
from deepzoo.recipes.parts.run import Options
from deepzoo.recipes.parts.step import start, train_step
from deepzoo.zoo.errors import CheckpointError, RequestError

PEFT = GOLDEN / "peft"
KEY = jax.random.key(0)
ALL = ("attention", "dense_mlp", "shared_experts", "routed_experts")
RANK, ALPHA = 3, 6.0


def filled(config, targets):
    """Adapters that change something: B is not zero."""
    made = lora.init(config, RANK, targets, KEY)
    keys = iter(jax.random.split(KEY, len(made)))
    return {
        k: p | {"b": 0.1 * jax.random.normal(next(keys), p["b"].shape)} for k, p in made.items()
    }


def logits(config, params, tokens):
    return np.asarray(zoo.apply(config, params, jnp.asarray(tokens)).logits)


@pytest.mark.parametrize("target", ALL)
def test_the_merged_model_is_the_adapted_one(target):
    config, params, expected = golden("v3_noq" if target == "attention" else "v2_lite_like")
    tokens = expected["tokens"][:, :12]
    made = filled(config, (target,))
    added = logits(config, lora.combine(ALPHA, RANK)(made, params), tokens)
    merged = logits(config, lora.merge(config, params, made, ALPHA), tokens)
    assert np.abs(added - logits(config, params, tokens)).max() > 1e-2
    np.testing.assert_allclose(added, merged, atol=2e-4)


def test_fp8_weights_stay_as_they_are_and_only_the_small_tree_has_a_gradient():
    config, params, expected = golden("v3_fp8")
    params = {k: v for k, v in params.items() if k != "mtp"}
    config = zoo.load(GOLDEN / "v3_fp8", mtp=False).config
    made = lora.init(config, RANK, ALL, KEY)
    tokens = np.asarray(expected["tokens"][:1, :13], np.int32)
    batch = {
        "tokens": tokens, "segments": np.zeros_like(tokens),
        "weights": np.ones(tokens.shape, np.float32),
    }  # fmt: skip
    tx = optax.sgd(0.5)
    step = train_step(next_token(config, remat=True), tx, combine=lora.combine(ALPHA, RANK))
    state = start(made, tx, 0)
    losses = []
    program = jax.jit(functools.partial(step, frozen=params))
    for _ in range(4):
        state, metrics = program(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.05
    assert state.params.keys() == made.keys()
    for name, pair in state.params.items():
        assert np.asarray(pair["b"]).any(), name
    whole = lora.combine(ALPHA, RANK)(state.params, params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        node = whole
        for key in path:
            node = node[key.key]
        assert node is leaf


def test_merging_into_fp8_rounds_the_sum_once():
    """Not compared by logits: a rounded weight can move a token to another expert."""
    config, params, _ = golden("v3_fp8")
    made = filled(config, ("attention",))
    merged = lora.merge(config, params, made, ALPHA)
    for name, pair in made.items():
        old, new = params, merged
        for key in name.split("."):
            old, new = old[key], new[key]
        assert new["weight"].dtype == old["weight"].dtype == jnp.float8_e4m3fn
        whole = [
            np.asarray(block_fp8.dequantize(w["weight"], w["weight_scale_inv"], jnp.float32))
            for w in (old, new)
        ]
        b, a = (np.asarray(pair[k], np.float64) for k in "ba")
        delta = ALPHA / RANK * (b @ a)
        assert np.abs(delta).max() > 1e-2
        # e4m3: half a step is 2^-4 of a value, 2^-10 of a scale where it is subnormal
        scale = float(np.asarray(new["weight_scale_inv"]).max())
        bound = np.abs(whole[0] + delta) * 2**-4 * 1.01 + scale * 2**-10 * 1.01
        assert (np.abs(whole[1] - whole[0] - delta) <= bound).all(), name


def test_fine_tuning_with_adapters_writes_them_and_the_merged_model(tmp_path):
    recipe = dataclasses.replace(
        sft.PRESETS["nano"], lora_rank=2, lora_alpha=4.0, lora_targets=("attention", "dense_mlp"),
        samples=6, epochs=1, rows=2, length=192, held_out=0, rate=1e-2,
    )  # fmt: skip
    options = Options(quiet=True, tensorboard=False, log_every=1)
    made = sft.train(recipe, tmp_path / "run", options)
    base = zoo.load("v2-nano", dtype="float32", stacked=True)
    adapters, alpha = lora.load(base.config, tmp_path / "run" / "adapter")
    assert alpha == 4.0
    assert all(np.asarray(p["b"]).any() for p in adapters.values())
    assert {name.split(".")[1] for name in adapters} == {"self_attn", "mlp"}
    wanted = lora.merge(base.config, base.params, adapters, alpha)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        zoo.stack(made.params), wanted,
    )  # fmt: skip
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "v2-nano"


def test_in_bfloat16_the_frozen_fp8_weights_keep_their_scales():
    model = zoo.load(GOLDEN / "v3_fp8", dtype="bfloat16", mtp=False, stacked=True)
    recipe = dataclasses.replace(sft.PRESETS["nano"], lora_rank=2, compute="bfloat16")
    made = lora.init(model.config, 2, ("attention", "routed_experts"), KEY)
    tx = optax.sgd(0.1)
    state = start(made, tx, 0)
    step = sft.learner(recipe, model, tx, state)
    frozen = step.frozen
    assert frozen["moe"]["mlp"]["experts"]["up_proj"]["weight_scale_inv"].dtype == jnp.float32
    assert frozen["embed_tokens"]["weight"].dtype == jnp.bfloat16
    tokens = np.arange(3, 16, dtype=np.int32)[None]
    weights = np.ones(tokens.shape, np.float32)
    after, metrics = step(state, {"tokens": tokens, "segments": 0 * tokens, "weights": weights})
    assert bool(metrics["finite"])
    assert all(
        np.asarray(p["b"]).any() and p["b"].dtype == jnp.float32 for p in after.params.values()
    )


@pytest.mark.parametrize("case", ["qwen2_untied", "v2_lite_like"])
def test_what_is_written_is_read_again(case, tmp_path):
    config, _, _ = golden(case)
    made = filled(config, ALL if config.is_mla else ("attention", "dense_mlp"))
    lora.export(config, made, ALPHA, tmp_path / "adapter")
    again, alpha = lora.load(config, tmp_path / "adapter")
    assert alpha == ALPHA
    assert again.keys() == made.keys()
    jax.tree.map(np.testing.assert_array_equal, again, made)


@pytest.mark.parametrize("case", ["qwen2_untied", "v3_noq"])
def test_peft_computes_the_same_with_the_adapter(case):
    """PEFT opened our export (it is in the folder), and said these logits."""
    config, params, _ = golden(case)
    made, alpha = lora.load(config, PEFT / case)
    expected = np.load(PEFT / f"{case}.npz")
    found = logits(config, lora.combine(alpha, RANK)(made, params), expected["tokens"])
    np.testing.assert_allclose(found, expected["logits"], atol=1e-4)
    without = logits(config, params, expected["tokens"])
    assert np.abs(without - expected["logits"]).max() > 1e-2


def test_adapters_that_do_not_fit_are_named(tmp_path):
    config, _, _ = golden("qwen2_untied")
    with pytest.raises(RequestError, match="no layers of the kind routed_experts"):
        lora.init(config, 2, ("routed_experts",), KEY)
    with pytest.raises(RequestError, match="rank of the adapters is 0"):
        lora.init(config, 0, ("attention",), KEY)
    made = filled(config, ("attention",))
    path = tmp_path / "adapter"
    lora.export(config, made, ALPHA, path)
    other, _, _ = golden("v2_lite_like")
    with pytest.raises(CheckpointError, match=r"lora_[AB].weight is"):
        lora.load(other, path)
    told = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(told | {"use_dora": True}))
    with pytest.raises(CheckpointError, match="use_dora is True"):
        lora.load(config, path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        lora.load(config, Path(tmp_path / "nothing"))
