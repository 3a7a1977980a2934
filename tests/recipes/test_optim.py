"""Optimisers: which leaf gets what, the bytes of their state, and that 8 bits still learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepzoo import zoo
from deepzoo.recipes import pretrain
from deepzoo.recipes.parts.bias import split_bias
from deepzoo.recipes.parts.optim import Blocks, adamw, hidden_matrices, matrices, muon, stored
from deepzoo.recipes.parts.step import Output, start, train_step
from deepzoo.zoo.fingerprint import named

KEY = jax.random.key(0)


@functools.cache
def shapes() -> dict:
    return split_bias(zoo.abstract(pretrain.PRESETS["v3_nano"].config))[0]


def leaf(tree, path: str):
    return functools.reduce(lambda t, k: t[k], path.split("/"), tree)


def test_decay_is_for_matrices_and_muon_for_those_inside_layers():
    decayed, inner = (
        {name for name, yes in named(mask(shapes())).items() if yes}
        for mask in (matrices, hidden_matrices)
    )
    assert decayed - inner == {
        "embed_tokens/weight", "lm_head/weight", "moe/mlp/gate/weight", "mtp/block/mlp/gate/weight",
    }  # fmt: skip
    assert {"moe/mlp/experts/up_proj/weight", "mtp/eh_proj/weight"} < inner < decayed
    rest = named(shapes()).keys() - decayed
    assert {n for n in rest if "norm" in n} == rest  # stacked norms are [L, D], yet no matrices
    unstacked = zoo.abstract(pretrain.PRESETS["v3_nano"].config, stacked=False)
    flat = {n for n, yes in named(matrices(split_bias(unstacked)[0])).items() if yes}
    assert "moe/0/mlp/experts/up_proj/weight" in flat
    assert not any("norm" in n for n in flat)


def test_adamw_decays_what_it_should_and_has_the_papers_moments():
    params = {"w": jnp.full((4, 4), 2.0), "norm": {"weight": jnp.full(4, 2.0)}}
    tx = adamw(params, 0.01, decay=0.1)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.01 * 0.1 * 2.0, rtol=1e-6)
    assert not np.any(updates["norm"]["weight"])
    # two steps by the equations of arXiv 1711.05101, in float64
    rng, m, v, w = np.random.default_rng(0), 0.0, 0.0, np.full((4, 4), 2.0)
    state = tx.init(params)
    for t in (1, 2):
        g = rng.normal(size=(4, 4))
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w -= 0.01 * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) + 0.1 * w)
        updates, state = tx.update({**zero, "w": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], w, rtol=2e-6)


def test_muon_orthogonalises_every_matrix_by_itself():
    tx = muon(shapes(), 1.0, 0.0)
    params = jax.tree.map(lambda p: jax.random.normal(KEY, p.shape), shapes())
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    experts = np.asarray(leaf(updates, "moe/mlp/experts/up_proj/weight"))  # [L, E, 64, 128]
    values = np.linalg.svd(experts, compute_uv=False)
    assert values.shape == (3, 8, 64)
    assert 0.5 < values.min() < values.max() < 1.5
    for path in ("embed_tokens", "lm_head", "norm", "moe/mlp/gate"):  # AdamW's, rate 0 here
        assert float(jnp.abs(leaf(updates, path)["weight"]).max()) == 0.0


def size(tree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_bytes_of_the_state():
    """8 bytes a parameter in float32, 4 in bfloat16, 2 and a scale a block in int8."""
    params = jax.tree.map(lambda p: jnp.zeros(p.shape), shapes())
    count = sum(p.size for p in jax.tree.leaves(params))
    found = {}
    for dtype in ("float32", "bfloat16", "int8"):
        found[dtype] = size(adamw(params, 0.1, state=dtype).init(params)) / count
    assert found["float32"] == pytest.approx(8, rel=1e-3)
    assert found["bfloat16"] == pytest.approx(4, rel=0.01)  # norms stay in float32
    assert found["int8"] < 2.2
    momentum = size(muon(params, 0.1, 0.1, state="bfloat16").init(params)) / count
    assert momentum < 0.55 * size(muon(params, 0.1, 0.1).init(params)) / count


def test_eight_bits_keep_a_block_within_half_a_code_and_no_moment_becomes_zero():
    rng = np.random.default_rng(0)
    g = rng.normal(size=(8, 1024)).astype(np.float32) * np.logspace(-6, 0, 8)[:, None]
    g[0, :128] = 0
    tx = stored(optax.scale_by_adam(), "int8")
    state = tx.init({"w": jnp.zeros((8, 1024))})
    _, state = tx.update({"w": jnp.asarray(g)}, state)
    mu, nu = state.mu["w"], state.nu["w"]
    assert isinstance(mu, Blocks)
    assert (mu.codes.dtype, nu.codes.dtype, mu.scale.shape) == (jnp.int8, jnp.uint8, (8, 8))
    blocks = np.asarray(mu.codes, np.float64).reshape(8, 8, 128) * np.asarray(mu.scale)[..., None]
    error = np.abs(blocks - 0.1 * g.astype(np.float64).reshape(8, 8, 128))
    assert (error <= np.asarray(mu.scale)[..., None] * 0.501).all()
    assert ((np.asarray(nu.codes) == 0) == (g == 0)).all()
    root = np.asarray(nu.codes, np.float64).reshape(8, 8, 128) * np.asarray(nu.scale)[..., None]
    error = np.abs(root - np.sqrt(1e-3) * np.abs(g.astype(np.float64)).reshape(8, 8, 128))
    assert (error <= np.asarray(nu.scale)[..., None] * 1.001).all()


@pytest.mark.parametrize(("dtype", "slack"), [("bfloat16", 1.02), ("int8", 1.1)])
def test_a_small_state_learns_as_the_large_one_does(dtype: str, slack: float):
    """A teacher's function of 64 inputs: the loss after 150 steps, against float32's."""
    rng = np.random.default_rng(0)
    teacher = rng.normal(size=(64, 128)) / 8, rng.normal(size=(128, 64)) / 11

    def batch(step: int) -> dict:
        x = np.random.default_rng([1, step]).normal(size=(64, 64))
        return {"x": x.astype(np.float32), "y": (np.tanh(x @ teacher[0]) @ teacher[1])}

    def loss(params, batch, key) -> Output:
        error = jnp.tanh(batch["x"] @ params["a"]) @ params["b"] - batch["y"]
        return Output((error**2).sum(), jnp.float32(error.size), {})

    def final(state: str) -> tuple[float, float]:
        params = {"a": jax.random.normal(KEY, (64, 128)) / 8, "b": jnp.zeros((128, 64))}
        tx = adamw(params, 3e-3, state=state)  # pyright: ignore[reportArgumentType]
        step = jax.jit(train_step(loss, tx))
        at, seen = start(params, tx, 0), []
        for n in range(150):
            at, metrics = step(at, batch(n))
            seen.append(float(metrics["loss"]))
        return seen[0], float(np.mean(seen[-10:]))

    first, whole = final("float32")
    _, small = final(dtype)
    assert whole < first / 4
    assert small < slack * whole
