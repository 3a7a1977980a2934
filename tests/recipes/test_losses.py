"""Next-token, MTP and balance losses against float64 references written from the equations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepzoo import zoo
from deepzoo.kernels.router import Routing
from deepzoo.recipes import pretrain
from deepzoo.recipes.parts.losses import Balance, balance_losses, next_token, shifted

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 16, "initializer_range": 0.1,
    "vocab_size": 50,
}  # fmt: skip
V2 = dataclasses.replace(pretrain.PRESETS["nano"].config, **SMALL)
V3 = dataclasses.replace(pretrain.PRESETS["v3_nano"].config, **SMALL, num_nextn_predict_layers=2)
KEY = jax.random.key(0)


def batch(seed=0, rows=3, length=14):
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(0, 3, (rows, length + 1)), axis=1).astype(np.int32)
    return {
        "tokens": rng.integers(3, 50, (rows, length + 1)).astype(np.int32),
        "segments": segments,
        "weights": rng.integers(0, 2, (rows, length + 1)).astype(np.float32),
    }


def routing(seed=0, layers=2, rows=3, length=14, experts=8, k=2):
    rng = np.random.default_rng(seed)
    scores = rng.exponential(1, (layers, rows, length, experts))
    indices = np.argsort(-scores * rng.random(scores.shape), axis=-1)[..., :k].astype(np.int32)
    return Routing(indices, np.ones(indices.shape), scores.astype(np.float32))


def test_balance_losses_equal_the_papers_sums():
    config = dataclasses.replace(V2, n_group=4, topk_group=2)
    made = routing()
    got = balance_losses(config, jax.tree.map(jnp.asarray, made))
    experts, groups, reach, k = 8, 4, 2, 2
    layers, rows, length, _ = made.scores.shape
    want = {name: np.zeros(rows) for name in got}
    for layer in range(layers):
        for row in range(rows):
            f, p, sent = np.zeros(experts), np.zeros(experts), np.zeros(groups)
            for t in range(length):
                s = made.scores[layer, row, t].astype(np.float64)
                p += s / s.sum() / length
                for i in made.indices[layer, row, t]:
                    f[i] += experts / (k * length)
                for d in {int(i) // 2 for i in made.indices[layer, row, t]}:
                    sent[d] += groups / (reach * length)
            want["expert"][row] += f @ p
            for d in range(groups):
                mine = slice(2 * d, 2 * d + 2)
                want["device"][row] += f[mine].mean() * p[mine].sum()
                want["communication"][row] += sent[d] * p[mine].sum()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5)


def test_even_routing_costs_one_a_layer():
    tokens = np.arange(64)
    even = np.stack([tokens % 8, (tokens + 1) % 8], axis=-1)[None, None]
    scores = jnp.full((1, 1, 64, 8), 0.125)
    found = balance_losses(V2, Routing(jnp.asarray(even), jnp.ones((1, 1, 64, 2)), scores))
    assert float(found["expert"][0]) == pytest.approx(1.0, rel=1e-5)
    assert float(found["device"][0]) == pytest.approx(1.0, rel=1e-5)


def token_logprobs(config, params, made, depths):
    """log p of every token by depth, from whole logits, documents in separate passes."""
    out = []
    seen = made["tokens"][:, :-1]
    inside = made["segments"][:, :-1]
    first = zoo.apply(config, params, seen, segment_ids=inside)
    logits, hidden = [first.logits], first.hidden
    for depth in range(depths):
        later = np.pad(made["tokens"][:, 1 + depth :], ((0, 0), (0, depth)))
        deep = zoo.apply_mtp(config, params, hidden, later, segment_ids=inside, depth=depth)
        logits.append(deep.logits)
        hidden = deep.hidden
    for one in logits:
        wide = np.asarray(one, np.float64)
        top = wide.max(-1, keepdims=True)
        out.append(wide - top - np.log(np.exp(wide - top).sum(-1, keepdims=True)))
    return out


@pytest.mark.parametrize("scheduled", [False, True])
def test_next_token_and_mtp_are_the_sums_of_the_equations(scheduled):
    params, made = zoo.init(V3, KEY), batch()
    logprobs = token_logprobs(V3, params, made, 2)
    sums, weights = np.zeros(3), np.zeros(3)
    scaled = np.zeros(3)
    rate = np.array([1.0, 0.5, 0.25]) if scheduled else np.ones(3)
    for b in range(3):
        for t in range(14):
            for depth in range(3):
                at = t + 1 + depth
                if at > 14 or made["segments"][b, at] != made["segments"][b, t]:
                    continue
                w = made["weights"][b, at]
                nll = -logprobs[depth][b, t, made["tokens"][b, at]] * w
                sums[depth] += nll
                scaled[depth] += nll * rate[b]
                weights[depth] += w
    given = made | ({"mtp": rate.astype(np.float32)} if scheduled else {})
    out = next_token(V3, mtp=0.3)(params, given, KEY)
    assert float(out.weight) == weights[0]
    assert float(out.metrics["nll"]) == pytest.approx(sums[0], rel=1e-4)
    for depth in (1, 2):
        mean = out.metrics[f"mtp{depth - 1}"]
        assert float(mean.total) == pytest.approx(sums[depth], rel=1e-4)
        assert float(mean.weight) == weights[depth]
    whole = sums[0] + 0.3 / 2 * scaled[1:].sum()
    assert float(out.loss) == pytest.approx(whole, rel=1e-4)


def test_each_balance_loss_enters_with_its_weight_and_the_rows_tokens():
    params, made = zoo.init(V2, KEY), batch()
    plain = next_token(V2)(params, made, KEY)
    found = zoo.apply(V2, params, made["tokens"][:, :-1], segment_ids=made["segments"][:, :-1])
    assert found.routing is not None
    share = np.asarray(shifted(jax.tree.map(jnp.asarray, made), 1)[1].sum(axis=-1))
    for name, value in balance_losses(V2, found.routing).items():
        out = next_token(V2, balance=Balance(**{name: 0.5}))(params, made, KEY)
        extra = 0.5 * float(np.asarray(value) @ share)
        assert extra > 0.1
        assert float(out.loss - plain.loss) == pytest.approx(extra, rel=1e-3)


def test_the_z_loss_is_the_squared_logsumexp():
    params, made = zoo.init(V2, KEY), batch()
    logits = zoo.apply(
        V2, params, made["tokens"][:, :-1], segment_ids=made["segments"][:, :-1]
    ).logits
    lse = np.asarray(jax.nn.logsumexp(logits, axis=-1), np.float64)
    weight = np.asarray(shifted(jax.tree.map(jnp.asarray, made), 1)[1])
    with_z = next_token(V2, z_loss=0.1)(params, made, KEY)
    plain = next_token(V2)(params, made, KEY)
    assert float(with_z.loss - plain.loss) == pytest.approx(0.1 * (lse**2 * weight).sum(), rel=1e-3)


def test_targets_lie_to_the_right_and_end_with_the_document():
    made = {
        "tokens": jnp.array([[10, 11, 12, 20, 21, 22, 23]]),
        "segments": jnp.array([[0, 0, 0, 1, 1, 1, 1]]),
        "weights": jnp.array([[0.0, 1, 1, 0, 0, 1, 1]]),  # 21 is given
    }
    target, weight = shifted(made, 1)
    np.testing.assert_array_equal(target, [[11, 12, 20, 21, 22, 23]])
    np.testing.assert_array_equal(weight, [[1, 1, 0, 0, 1, 1]])
    target, weight = shifted(made, 2)  # the first MTP depth
    np.testing.assert_array_equal(target * weight, [[12, 0, 0, 22, 23, 0]])
    np.testing.assert_array_equal(weight, [[1, 0, 0, 1, 1, 0]])
    target, weight = shifted(made, 3)  # the second
    np.testing.assert_array_equal(target * weight, [[0, 0, 0, 23, 0, 0]])
