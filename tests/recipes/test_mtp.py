"""MTP layers are trained with the model, or set aside and saved as they were."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from golden import GOLDEN

from deepzoo import zoo
from deepzoo.recipes import dpo
from deepzoo.recipes.parts.mtp import loaded, with_mtp
from deepzoo.recipes.parts.run import Options
from deepzoo.zoo.errors import RequestError

V3 = str(GOLDEN / "v3_like")


def same(one, other) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


def test_what_is_set_aside_is_put_back(tmp_path: Path):
    """A load without the layers, as training has it; the product has them again."""
    before = zoo.load(V3, dtype="float32", stacked=True)
    dropped = zoo.load(V3, dtype="float32", mtp=False, stacked=True)
    model, aside = loaded(V3, dtype="float32")
    assert model.config == dropped.config
    assert same(model.params, dropped.params)
    trained = model._replace(params=jax.tree.map(lambda a: a + 1, model.params))
    zoo.save_hf(with_mtp(trained, aside), tmp_path / "model")
    after = zoo.load(tmp_path / "model", dtype="float32", stacked=True)
    assert after.config.num_nextn_predict_layers == 1
    assert same(after.params["mtp"], before.params["mtp"])
    assert same({k: v for k, v in after.params.items() if k != "mtp"}, trained.params)


def test_a_loss_on_them_keeps_them_in_the_model():
    model, aside = loaded(V3, 0.1, dtype="float32")
    assert "mtp" in model.params
    assert with_mtp(model, aside) is model


def test_models_without_such_layers():
    model, aside = loaded("v2-nano", dtype="float32")
    assert with_mtp(model, aside) is model
    with pytest.raises(RequestError, match=r"--mtp 0\.1: v2-nano has no MTP layer to train"):
        loaded("v2-nano", 0.1)


def test_dpo_keeps_them(tmp_path: Path):
    """A whole run from a model that drafts: what answers is trained, what drafts is not."""
    config = dataclasses.replace(
        zoo.load("v2-nano").config, model_type="deepseek_v3", hidden_size=16, intermediate_size=16,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, q_lora_rank=8,
        moe_intermediate_size=8, n_shared_experts=1, topk_method="noaux_tc", scoring_func="sigmoid",
        norm_topk_prob=True, num_nextn_predict_layers=1, dtype="float32",
    )  # fmt: skip
    base = zoo.load("v2-nano")._replace(
        config=config, params=zoo.init(config, jax.random.key(0)), source=None
    )
    zoo.save_hf(base, tmp_path / "base")
    pairs = [{"prompt": f"{n} + 3 =", "chosen": str(n + 3), "rejected": "0"} for n in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    recipe = dataclasses.replace(
        dpo.PRESETS["nano"], model=str(tmp_path / "base"), data=str(tmp_path / "pairs.jsonl"),
        task="", pairs=4, length=16, held_out=0,
    )  # fmt: skip
    after = dpo.train(recipe, tmp_path / "run", Options(quiet=True))
    before = zoo.load(tmp_path / "base", dtype="float32")
    assert after.config.num_nextn_predict_layers == 1
    assert same(before.params["mtp"], after.params["mtp"])
    assert not same(before.params["lm_head"], after.params["lm_head"])
