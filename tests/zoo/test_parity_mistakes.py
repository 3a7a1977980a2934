"""The well-known mistakes, made on purpose: each moves the logits far beyond the parity bound."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from golden import BOUND, WRONG, choices, distance, golden

from deepzoo import zoo
from deepzoo.zoo import mla, moe

numbers = itertools.count()


def logits_of(case, config=None):
    """(logits under a changed config or a patched module, expected logits)."""
    own, params, expected = golden(case)
    config = config or own
    # A key of its own: nothing built or traced before the patch, in any cache, can be used again.
    inert = (*config.inert, ("use_cache", str(next(numbers))))
    config = dataclasses.replace(config, inert=inert)
    out = zoo.apply(config, params, jnp.asarray(expected["tokens"]))
    return np.asarray(out.logits), expected["logits"]


def changed(params, path, value):
    """A copy of the nested dict with `value(leaf)` at `path`."""
    if not path:
        return value(params)
    return params | {path[0]: changed(params[path[0]], path[1:], value)}


def test_the_mutation_harness_itself_changes_nothing():
    got, expected = logits_of("v3_like")
    assert distance(got, expected) < BOUND


CONFIG_MISTAKES = {
    "groups ignored (V2)": ("v2_like", {"topk_method": "greedy"}),
    "groups ignored (V3)": ("v3_like", {"n_group": 1, "topk_group": 1}),
    "groups ignored (FP8)": ("v3_fp8", {"n_group": 1, "topk_group": 1}),
    "weights not normalised": ("v3_like", {"norm_topk_prob": False}),
    "weights not scaled (V2)": ("v2_like", {"routed_scaling_factor": 1.0}),
    "weights not scaled (V3)": ("v3_like", {"routed_scaling_factor": 1.0}),
    "rope scaling ignored (V2)": ("v2_like", {"rope_scaling": None}),
    "rope scaling ignored (Llama)": ("llama31_like", {"rope_scaling": None}),
    "eps 1e-6 for 1e-5 (Moonlight)": ("v3_noq", {"rms_norm_eps": 1e-6}),
    "eps 1e-6 for 1e-5 (Qwen2)": ("qwen2_untied", {"rms_norm_eps": 1e-6}),
}
NO_MSCALE = {"mscale": None, "mscale_all_dim": None, "attention_factor": 1.0}
SCALING_MISTAKES = {
    "mscale missing (V2-Lite)": ("v2_lite_like", NO_MSCALE),
    "mscale missing (V2)": ("v2_like", NO_MSCALE),
    "mscale missing (V3)": ("v3_like", NO_MSCALE),
    "mscale of the other 236B models": ("v2_lite_like", {"mscale": 1.0, "mscale_all_dim": 1.0}),
    "attn_factor ignored (Qwen3)": ("qwen3_yarn", {"attn_factor": None}),
    "betas of another model": ("v3_fp8", {"beta_fast": 32.0}),
}


@pytest.mark.parametrize("mistake", CONFIG_MISTAKES)
def test_a_wrong_config_value_is_seen(mistake):
    case, change = CONFIG_MISTAKES[mistake]
    got, expected = logits_of(case, dataclasses.replace(golden(case)[0], **change))
    assert distance(got, expected) > WRONG


@pytest.mark.parametrize("mistake", SCALING_MISTAKES)
def test_a_wrong_rope_scaling_is_seen(mistake):
    case, change = SCALING_MISTAKES[mistake]
    config = golden(case)[0]
    assert config.rope_scaling is not None
    wrong = dataclasses.replace(config.rope_scaling, **change)
    got, expected = logits_of(case, dataclasses.replace(config, rope_scaling=wrong))
    assert distance(got, expected) > WRONG


@pytest.mark.parametrize("case", ["v3_like", "v3_noq", "v3_fp8", "v3_fp8_ue8m0"])
def test_an_ignored_router_bias_is_seen(case):
    config, params, expected = golden(case)
    wrong = changed(params, ("moe", "mlp", "gate", "e_score_correction_bias"), jnp.zeros_like)
    out = zoo.apply(config, wrong, jnp.asarray(expected["tokens"]))
    assert distance(out.logits, expected["logits"]) > WRONG
    assert (choices(out) != expected["routing"]).any()


def test_ignored_qkv_biases_are_seen():
    for name in ("q_proj", "k_proj", "v_proj"):
        config, params, expected = golden("qwen2_tied")
        wrong = changed(params, ("dense", "self_attn", name, "bias"), jnp.zeros_like)
        out = zoo.apply(config, wrong, jnp.asarray(expected["tokens"]))
        # A key bias alone would cancel in the softmax; rope turns it differently at every position.
        assert distance(out.logits, expected["logits"]) > WRONG, name


ROUTER_MISTAKES = ["max for top-2 sum", "top-2 sum for max", "weights from biased scores"]


@pytest.mark.parametrize("mistake", ROUTER_MISTAKES)
def test_a_wrong_router_is_seen(mistake, monkeypatch):
    right = moe.router

    def wrong(logits, bias, **options):
        if mistake != "weights from biased scores":
            options["group_score"] = "max" if mistake.startswith("max") else "top2"
            return right(logits, bias, **options)
        found = right(logits, bias, **options)
        biased = jnp.take_along_axis(found.scores + bias, found.indices, axis=-1)
        return found._replace(weights=biased / biased.sum(-1, keepdims=True) * options["scale"])

    monkeypatch.setattr(moe, "router", wrong)
    case = "v2_like" if mistake == "top-2 sum for max" else "v3_like"
    got, expected = logits_of(case)
    assert distance(got, expected) > WRONG


@pytest.mark.parametrize("case", ["v2_lite_like", "v2_like", "v3_like", "v3_noq"])
def test_half_split_rope_on_interleaved_weights_is_seen(case, monkeypatch):
    right = mla.rotate

    def wrong(x, cos, sin, *, interleaved):
        return right(x, cos, sin, interleaved=not interleaved)

    monkeypatch.setattr(mla, "rotate", wrong)
    got, expected = logits_of(case)
    assert distance(got, expected) > WRONG


def test_rms_norm_eps_in_the_latent_norms_is_seen(monkeypatch):
    monkeypatch.setattr(mla, "LATENT_EPS", golden("v3_noq")[0].rms_norm_eps)
    got, expected = logits_of("v3_noq")
    assert distance(got, expected) > WRONG


def swap_halves(weight):
    first, second = jnp.split(weight, 2, axis=-1)
    return jnp.concatenate([second, first], axis=-1)


def test_a_wrong_mtp_input_is_seen():
    """Norms or halves of eh_proj exchanged, token i for i + 1, the final norm of h left out."""
    config, params, expected = golden("v3_like")
    tokens, hidden = jnp.asarray(expected["tokens"]), jnp.asarray(expected["hidden"])
    mtp = params["mtp"]
    norms = params | {"mtp": mtp | {"enorm": mtp["hnorm"], "hnorm": mtp["enorm"]}}
    halves = changed(params, ("mtp", "eh_proj", "weight"), swap_halves)
    unweighted = hidden / params["norm"]["weight"]  # but for its length, h before the final norm
    for wrong, given, following in (
        (norms, hidden, tokens[:, 1:]),
        (halves, hidden, tokens[:, 1:]),
        (params, hidden, tokens[:, :-1]),
        (params, unweighted, tokens[:, 1:]),
    ):
        out = zoo.apply_mtp(config, wrong, given[:, :-1], following)
        assert distance(out.logits, expected["mtp_logits"]) > WRONG
