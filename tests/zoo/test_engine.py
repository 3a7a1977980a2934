"""The engine against plain forward passes: greedy, sampled, speculative, refilled."""

import dataclasses
import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepzoo import zoo
from deepzoo.zoo import decode as programs
from deepzoo.zoo.engine import Engine, Request
from deepzoo.zoo.errors import RequestError

CONFIG = zoo.Config(
    model_type="deepseek_v3", vocab_size=24, hidden_size=32, intermediate_size=48,
    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256,
    dtype="float32", q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4,
    v_head_dim=8, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
    moe_intermediate_size=16, first_k_dense_replace=1, n_group=2, topk_group=1,
    topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True,
    num_nextn_predict_layers=1, initializer_range=0.3,
)  # fmt: skip
PROMPTS = [np.random.default_rng(n).integers(0, 24, n).tolist() for n in (5, 17, 30, 3, 9)]
PARAMS = zoo.init(CONFIG, jax.random.key(0), stacked=False)


def forward(tokens):
    """Log-probabilities [V] of the token after `tokens`, by one pass without a cache."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = zoo.apply(CONFIG, PARAMS, padded).logits[0, len(tokens) - 1]
    return np.asarray(jax.nn.log_softmax(logits))


def collect(requests, *, slots, chunk=8, **options):
    engine = Engine(CONFIG, PARAMS, slots=slots, capacity=64, **options)
    tokens, logprobs, finish = {}, {}, {}
    for event in engine.run(requests, chunk=chunk):
        tokens.setdefault(event.request, []).extend(event.tokens)
        logprobs.setdefault(event.request, []).extend(event.logprobs)
        if event.finish:
            finish[event.request] = event.finish
    return [[d[i] for i in range(len(requests))] for d in (tokens, logprobs, finish)]


@pytest.mark.parametrize("speculative", [False, True])
def test_the_longest_answers_go_on_alone(speculative):
    """Whose rows are left, and what they say, is as if nobody else had been there."""
    requests = [
        Request(PROMPTS[n % 5], 30 if n % 17 == 3 else 3, temperature=1.0, seed=n)
        for n in range(64)
    ]
    engine = Engine(CONFIG, PARAMS, slots=64, capacity=64, speculative=speculative)
    for _ in range(2):  # the second run begins with all rows again
        tokens = {n: [] for n in range(64)}
        for event in engine.run(requests, chunk=8):
            tokens[event.request] += event.tokens
        assert [len(lane.owner) for lane in engine.lanes] == [8, 8]
        alone = collect(requests, slots=4, speculative=speculative)[0]
        assert [tokens[n] for n in range(64)] == alone
    assert len(tokens[3]) == 30


@pytest.fixture(scope="module")
def expected():
    """Greedy continuations, an argmax at a time."""
    out = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(12):
            tokens.append(int(forward(tokens).argmax()))
        out.append(tokens[len(prompt) :])
    return out


@pytest.mark.parametrize(("slots", "speculative"), [(1, False), (2, False), (5, False), (2, True)])
def test_greedy_equals_an_argmax_loop(expected, slots, speculative):
    requests = [Request(p, 12, temperature=0.0) for p in PROMPTS]
    tokens, logprobs, finish = collect(requests, slots=slots, speculative=speculative)
    assert tokens == expected
    assert finish == ["length"] * 5
    for prompt, found, given in zip(PROMPTS, tokens, logprobs, strict=True):
        for n in (0, 5, 11):
            exact = forward(prompt + found[:n])[found[n]]
            assert abs(given[n] - exact) < 1e-4


def test_sampled_tokens_do_not_depend_on_neighbours_or_rows():
    requests = [Request(p, 10, temperature=1.0, seed=7 + i) for i, p in enumerate(PROMPTS)]
    together, _, _ = collect(requests, slots=5)
    one_by_one, _, _ = collect(requests, slots=1)
    assert together == one_by_one
    backwards, _, _ = collect(requests[::-1], slots=2)
    assert backwards[::-1] == together
    others, _, _ = collect([r._replace(seed=99) for r in requests], slots=5)
    assert others != together


def test_an_end_token_ends_the_row_and_the_next_request_takes_it(expected):
    end = expected[0][4]
    requests = [Request(p, 12, temperature=0.0) for p in PROMPTS]
    tokens, _, finish = collect(requests, slots=2, eos_ids=[end])
    for found, whole, why in zip(tokens, expected, finish, strict=True):
        cut = whole[: whole.index(end) + 1] if end in whole else whole
        assert found == cut
        assert why == ("eos" if end in whole else "length")


def test_release_frees_the_row():
    engine = Engine(CONFIG, PARAMS, slots=1, capacity=64)
    seen = []
    for event in engine.run([Request(p, 12, temperature=0.0) for p in PROMPTS[:2]], chunk=2):
        seen.append(event.request)
        if event.request == 0 and seen.count(0) == 2:
            engine.release(0)
    assert seen.count(0) == 2
    assert seen.count(1) >= 6


def test_a_row_of_either_half_is_released():
    """Enough rows for two halves, each of which has its own thread on a CPU."""
    requests = [Request(PROMPTS[n % 5], 12, temperature=0.0) for n in range(48)]
    engine = Engine(CONFIG, PARAMS, slots=32, capacity=64)
    assert len(engine.lanes) == 2
    seen = dict.fromkeys(range(48), 0)
    for event in engine.run(requests, chunk=2):
        seen[event.request] += len(event.tokens)
        if event.request < 2 and event.finish is None:
            engine.release(event.request)
    assert [seen[n] for n in (0, 1)] == [1, 1]
    assert all(seen[n] == 12 for n in range(2, 48))


def test_an_answer_that_nobody_waits_for_ends_the_halves():
    requests = [Request(PROMPTS[n % 5], 30, temperature=0.0) for n in range(48)]
    engine = Engine(CONFIG, PARAMS, slots=32, capacity=64)
    events = engine.run(requests, chunk=2)
    next(events)
    events.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPool")]


def test_a_failure_in_a_half_reaches_the_caller(monkeypatch):
    def broken(*_):
        raise FloatingPointError("as it may happen")

    engine = Engine(CONFIG, PARAMS, slots=32, capacity=64)
    monkeypatch.setattr(programs, "decode", broken)
    with pytest.raises(FloatingPointError, match="as it may happen"):
        list(engine.run([Request([1], 4) for _ in range(40)]))


def test_long_prompts_go_through_in_pieces(monkeypatch, expected):
    monkeypatch.setattr(programs, "PREFILL_CHUNK", 16)
    # Another config object, so that the program is not the one compiled with the usual chunk.
    config = dataclasses.replace(CONFIG, max_position_embeddings=255)
    engine = Engine(config, PARAMS, slots=1, capacity=64)
    requests = [Request(PROMPTS[2], 12, temperature=0.0)]
    tokens = [t for event in engine.run(requests) for t in event.tokens]
    assert tokens == expected[2]


def test_nothing_is_recompiled_as_lengths_grow():
    config = dataclasses.replace(CONFIG, max_position_embeddings=254)
    engine = Engine(config, PARAMS, slots=1, capacity=64)
    before = programs.decode._cache_size()
    for length in range(17, 33):  # one prefill bucket
        list(engine.run([Request([1] * length, 3 + length % 5, temperature=0.0)], chunk=8))
    assert programs.decode._cache_size() == before + 1
    started = programs.prefill._cache_size()
    list(engine.run([Request([1] * 20, 30, temperature=0.0)], chunk=8))
    assert programs.prefill._cache_size() == started
    assert programs.decode._cache_size() == before + 1


def test_speculative_sampling_keeps_the_distribution():
    """Joint frequencies of the first three tokens against exact probabilities, chi-square."""
    prompt, count = PROMPTS[0], 3000
    options = {"temperature": 0.5, "top_k": 3}

    def exact(tokens):
        logp = forward(tokens) / options["temperature"]
        best = np.argsort(-logp)[: options["top_k"]]
        p = np.exp(logp[best] - logp[best].max())
        return dict(zip(best.tolist(), p / p.sum(), strict=True))

    probability = {}
    for a, pa in exact(prompt).items():
        for b, pb in exact([*prompt, a]).items():
            for c, pc in exact([*prompt, a, b]).items():
                probability[a, b, c] = pa * pb * pc
    requests = [Request(prompt, 3, seed=s, **options) for s in range(count)]
    for speculative in (False, True):
        tokens, _, _ = collect(requests, slots=100, chunk=4, speculative=speculative)
        found = dict.fromkeys(probability, 0)
        for sequence in tokens:
            found[tuple(sequence)] += 1  # a KeyError is a token that cannot be drawn
        common = {k: p for k, p in probability.items() if p * count >= 5}
        rest = 1 - sum(common.values())
        chi = sum((found[k] - p * count) ** 2 / (p * count) for k, p in common.items())
        missed = count - sum(found[k] for k in common)
        if rest * count >= 1:
            chi += (missed - rest * count) ** 2 / (rest * count)
        freedom = len(common)
        assert chi < freedom + 5 * np.sqrt(2 * freedom)


def test_acceptance_is_counted():
    engine = Engine(CONFIG, PARAMS, slots=2, capacity=64, speculative=True)
    events = engine.run([Request(p, 20, temperature=0.0) for p in PROMPTS])
    tokens = sum(len(event.tokens) for event in events)
    assert tokens == 100
    # Each prompt's first token comes from its prefill, every further one from a checked step.
    assert engine.drafted + engine.accepted == tokens - len(PROMPTS)
    assert 0 <= engine.accepted < engine.drafted


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], 4), "no tokens"),
        (Request([24], 4), "token id 24 is outside the vocabulary of 24"),
        (Request([-1], 4), "token id -1"),
        (Request([1] * 60, 5), "do not fit in 64"),
        (Request([1], 0), "max_tokens 0"),
    ],
)
def test_requests_that_cannot_be_served_are_named(request_, message):
    engine = Engine(CONFIG, PARAMS, slots=1, capacity=64)
    with pytest.raises(RequestError, match=message):
        next(engine.run([request_]))


def test_speculation_needs_the_layer():
    config = dataclasses.replace(CONFIG, num_nextn_predict_layers=0)
    with pytest.raises(RequestError, match="MTP"):
        Engine(config, PARAMS, slots=1, capacity=64, speculative=True)


def test_prefill_in_uneven_pieces_equals_one_pass():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 24, (2, 30)))
    whole = zoo.apply(CONFIG, PARAMS, tokens)
    cache, parts = zoo.cache(CONFIG, 2, 40, stacked=False), []
    for a, b in itertools.pairwise((0, 11, 12, 15, 26, 30)):
        out = zoo.apply(CONFIG, PARAMS, tokens[:, a:b], cache=cache)
        cache = out.cache
        parts.append(out.logits)
    assert float(jnp.abs(jnp.concatenate(parts, axis=1) - whole.logits).max()) < 2e-5 * 3
    assert cache is not None
    assert cache.lengths.tolist() == [30, 30]


def test_stacked_and_unstacked_parameters_give_the_same():
    stacked = zoo.stack(PARAMS)
    tokens = jnp.asarray([PROMPTS[2]])
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool((a == b).all()), zoo.unstack(stacked), PARAMS)
    )
    a, b = (zoo.apply(CONFIG, p, tokens).logits for p in (stacked, PARAMS))
    assert float(jnp.abs(a - b).max()) < 1e-5


@pytest.mark.parametrize("speculative", [False, True])
def test_rows_that_fill_the_capacity_to_the_last_token(speculative):
    """One is done long before the other, and stands still beside it."""
    requests = [Request(PROMPTS[0], 59, temperature=0.0), Request(PROMPTS[2], 34, temperature=0.0)]
    full, logprobs, _ = collect(requests, slots=2, speculative=speculative)
    for request, tokens, logprob in zip(requests, full, logprobs, strict=True):
        assert len(tokens) == request.max_tokens
        last = forward(request.tokens + tokens[:-1])
        assert tokens[-1] == last.argmax()
        assert logprob[-1] == pytest.approx(last[tokens[-1]], abs=1e-4)
