"""The models against the numbers that transformers computed (tests/golden/README.md)."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from golden import (
    BOUND,
    BOUND_DECODE,
    CAPACITY,
    CASES,
    GOLDEN,
    LATENT,
    MTP,
    choices,
    distance,
    extend,
    golden,
    whole,
)

from deepzoo import zoo
from deepzoo.zoo.config import Config


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case):
    config, _, expected = golden(case)
    out = whole(case)
    assert 0.6 < expected["logits"].std() < 1.6
    assert expected["tokens"].shape[1] > getattr(
        config.rope_scaling, "original_max_position_embeddings", 32
    )
    assert distance(out.logits, expected["logits"]) < BOUND


@pytest.mark.parametrize("case", ["v3_fp8", "v3_fp8_ue8m0"])
def test_fp8_multiplied_out_while_loading_gives_the_same(case):
    expected = golden(case)[2]
    model = zoo.load(GOLDEN / case, dtype="float32", quantized=False)
    assert model.config.quantization_config is None
    out = zoo.apply(model.config, model.params, jnp.asarray(expected["tokens"]))
    assert distance(out.logits, expected["logits"]) < BOUND


@pytest.mark.parametrize("case", LATENT)
def test_experts_chosen_equal_transformers(case):
    _, _, expected = golden(case)
    assert json.loads(str(expected["stats"]))["router_margin"] >= 1e-4
    np.testing.assert_array_equal(choices(whole(case)), expected["routing"])


@pytest.mark.parametrize("case", CASES)
def test_both_config_files_mean_the_same(case):
    """`rope_parameters` as transformers 5 writes it and `rope_scaling` as published."""
    configs = [
        Config.from_hf(json.loads((GOLDEN / case / name).read_text()))
        for name in ("config.json", "config_published.json")
    ]
    plain = []
    for config in configs:
        scaling = config.rope_scaling and dataclasses.replace(
            config.rope_scaling, type_key="rope_type"
        )
        size = None if config.is_mla else config.head_size
        plain.append(dataclasses.replace(config, inert=(), rope_scaling=scaling, head_dim=size))
    assert plain[0] == plain[1]


@pytest.mark.parametrize("case", ["v3_like", "qwen3_yarn"])
def test_published_config_gives_the_same_logits(case):
    _, params, expected = golden(case)
    published = Config.from_hf(json.loads((GOLDEN / case / "config_published.json").read_text()))
    out = zoo.apply(
        dataclasses.replace(published, dtype="float32"), params, jnp.asarray(expected["tokens"])
    )
    assert distance(out.logits, expected["logits"]) < BOUND


@pytest.mark.parametrize("case", ["v2_like", "v3_like", "v3_fp8", "qwen2_untied"])
def test_unstacked_layers_give_the_same(case):
    config, params, expected = golden(case)
    out = zoo.apply(config, zoo.unstack(params), jnp.asarray(expected["tokens"]))
    assert distance(out.logits, expected["logits"]) < BOUND
    if "routing" in expected:
        np.testing.assert_array_equal(choices(out), expected["routing"])


@pytest.mark.parametrize("case", CASES)
def test_greedy_continuation_of_right_padded_prompts(case):
    """Two prompts of unequal length in one batch through the cache; the oracle ran each alone."""
    config, params, expected = golden(case)
    lengths, count = expected["prompt_lengths"], expected["greedy"].shape[1]
    width = int(lengths.max())
    inside = np.arange(width) < lengths[:, None]
    prompts = np.where(inside, expected["tokens"][:, :width], 2)
    cache = zoo.cache(config, 2, CAPACITY, dtype=jnp.float32)
    logits, cache = extend(config, params, prompts, cache, lengths)
    assert distance(logits[inside], expected["logits"][:, :width][inside]) < BOUND
    np.testing.assert_array_equal(cache.lengths, lengths)
    tokens = [logits[np.arange(2), lengths - 1].argmax(-1)]
    while len(tokens) < count:
        logits, cache = extend(config, params, tokens[-1][:, None], cache)
        tokens.append(logits[:, -1].argmax(-1))
    np.testing.assert_array_equal(np.stack(tokens, -1), expected["greedy"])


def in_chunks(case, sizes):
    """Logits of the golden tokens, given in chunks of these sizes."""
    config, params, expected = golden(case)
    tokens, at = expected["tokens"], 0
    cache, pieces = zoo.cache(config, 2, CAPACITY, dtype=jnp.float32), []
    for size in sizes:
        logits, cache = extend(config, params, tokens[:, at : at + size], cache)
        at += size
        pieces.append(logits)
    assert at == tokens.shape[1]
    return np.concatenate(pieces, 1)


@pytest.mark.parametrize("case", CASES)
def test_token_by_token_equals_one_pass(case):
    got = in_chunks(case, [37] + [1] * 11)
    assert distance(got, whole(case).logits) < BOUND_DECODE


@pytest.mark.parametrize("case", ["v2_lite_like", "v3_fp8", "qwen3_yarn"])
def test_uneven_chunks_equal_one_pass(case):
    got = in_chunks(case, [11, 3, 11, 1, 1, 3, 11, 7])
    assert distance(got, whole(case).logits) < BOUND_DECODE


@pytest.mark.parametrize("case", ["v3_like", "v2_like", "llama31_like"])
def test_rows_may_advance_by_different_amounts(case):
    """Right padding inside every chunk, at last past the capacity: it must never be read."""
    config, params, expected = golden(case)
    tokens, exact = expected["tokens"], np.asarray(whole(case).logits)
    cache, at = zoo.cache(config, 2, 40, dtype=jnp.float32), np.zeros(2, np.int32)
    for sizes in ([11, 4], [2, 11], [11, 11], [1, 3], [11, 7], [2, 4]):
        chunk = np.full((2, 11), 2, np.int32)
        parts = [slice(begin, begin + size) for begin, size in zip(at, sizes, strict=True)]
        for row, part in enumerate(parts):
            chunk[row, : sizes[row]] = tokens[row, part]
        logits, cache = extend(config, params, chunk, cache, sizes)
        for row, part in enumerate(parts):
            assert distance(logits[row, : sizes[row]], exact[row, part]) < BOUND_DECODE
        at += np.asarray(sizes, np.int32)
    np.testing.assert_array_equal(cache.lengths, [38, 40])


@pytest.mark.parametrize("case", ["v2_lite_like", "v3_like", "qwen2_tied", "llama31_like"])
@pytest.mark.parametrize("given", [False, True], ids=["derived positions", "given positions"])
def test_left_padding(case, given):
    """The padding is a segment of its own in front."""
    config, params, expected = golden(case)
    tokens, segments = jnp.asarray(expected["left_tokens"]), jnp.asarray(expected["left_mask"])
    positions = jnp.asarray(expected["left_positions"]) if given else None
    out = zoo.apply(config, params, tokens, segment_ids=segments, positions=positions)
    tail = expected["left_tail_logits"]
    assert distance(out.logits[:, -tail.shape[1] :], tail) < BOUND


@pytest.mark.parametrize("case", MTP)
def test_mtp_equals_transformers(case):
    config, params, expected = golden(case)
    tokens, hidden = jnp.asarray(expected["tokens"]), whole(case).hidden
    assert distance(hidden, expected["hidden"]) < BOUND
    out = zoo.apply_mtp(config, params, hidden[:, :-1], tokens[:, 1:])
    assert distance(out.logits, expected["mtp_logits"]) < BOUND
    np.testing.assert_array_equal(choices(out), expected["mtp_routing"][0])


@pytest.mark.parametrize("case", ["v3_like", "v3_fp8"])
def test_mtp_through_the_cache_equals_one_pass(case):
    config, params, expected = golden(case)
    tokens, hidden = jnp.asarray(expected["tokens"]), jnp.asarray(expected["hidden"])
    cache = zoo.cache(config, 2, 48, dtype=jnp.float32)
    pieces, at = [], 0
    for size in (20, 1, 1, 3, 20, 2):
        part = slice(at, at + size)
        out = zoo.apply_mtp(config, params, hidden[:, part], tokens[:, 1:][:, part], cache=cache)
        at += size
        assert out.cache is not None
        cache = out.cache._replace(lengths=out.cache.lengths + size)
        pieces.append(out.logits)
    assert distance(jnp.concatenate(pieces, 1), expected["mtp_logits"]) < BOUND
