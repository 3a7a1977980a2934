"""The same recipe on one device and on eight: placement, refusals, equal losses and gradients."""

import json
from pathlib import Path

import child
import numpy as np
import pytest

from deepzoo.recipes.parts import mesh
from deepzoo.zoo.errors import RequestError

MESHES = ("data=8", "data=2,fsdp=2,expert=2", "fsdp=2,expert=2,tensor=2")
DENSE = ("data=8", "data=4,fsdp=2", "data=2,fsdp=2,tensor=2")

# One step of each recipe's loss, its gradient kept as the optimiser's state.
STEP = """
import dataclasses, json, sys
import jax, jax.numpy as jnp, numpy as np, optax
from deepzoo import zoo
from deepzoo.recipes import grpo, pretrain
from deepzoo.recipes.parts import losses
from deepzoo.recipes.parts.mesh import parsed, placed, spread
from deepzoo.recipes.parts.step import jitted, start, train_step
from deepzoo.zoo.config import Config

family, recipe, meshes = sys.argv[1], sys.argv[2], sys.argv[3:]
small = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, vocab_size=50, initializer_range=0.1,
)
latent = dict(
    q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    moe_intermediate_size=16,
)
if family == "student":
    config = Config(
        model_type="qwen2", **small | {"num_key_value_heads": 2}, max_position_embeddings=64,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, dtype="float32",
    )
else:
    preset = pretrain.PRESETS["nano" if family == "v2" else "v3_nano"].config
    config = dataclasses.replace(preset, **small, **latent)
rng = np.random.default_rng(0)
rows, length = 8, 12
tokens = rng.integers(3, 50, (rows, length + 1)).astype(np.int32)
batch = {
    "tokens": tokens,
    "segments": np.sort(rng.integers(0, 3, tokens.shape), axis=1).astype(np.int32),
    "weights": rng.integers(0, 2, tokens.shape).astype(np.float32),
}
loss = losses.next_token(config, remat=True)
if recipe == "pretrain":
    mtp = 0.3 if config.num_nextn_predict_layers else 0.0
    balance = losses.Balance(expert=0.01) if family != "student" else None
    loss = losses.next_token(config, balance=balance, mtp=mtp)
if recipe == "grpo":
    loss = grpo.learning(dataclasses.replace(grpo.PRESETS["nano"], max_tokens=length), config)
    batch = {
        "tokens": tokens, "mask": batch["weights"][:, 1:],
        "old": rng.normal(-4, 0.3, (rows, length)).astype(np.float32),
        "advantages": rng.normal(size=rows).astype(np.float32),
    }
keep = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradient, state, params: (jax.tree.map(jnp.zeros_like, gradient), gradient),
)
rate = (lambda step: 0.01) if recipe == "pretrain" else None
step = train_step(loss, keep, accumulate=1, clip=1e9, bias_rate=rate)

def one(on):
    state = start(zoo.init(config, jax.random.key(1)), keep, 0)
    here = batch
    if on is not None:
        state, here = placed(state, config, on), spread(batch, on)
    before = jax.tree.map(lambda a: a.sharding, state)
    state, metrics = jitted(step, state)(state, here)
    assert jax.tree.map(lambda a: a.sharding, state) == before
    return state, metrics

want, told = one(None)
for text in meshes:
    got, found = one(parsed(text))
    divided = sum(
        a.addressable_shards[0].data.size < a.size for a in jax.tree.leaves(got.opt_state)
    )
    norm = float(told["norm"])
    far = max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max()) / norm
        for a, b in zip(
            jax.tree.leaves(got.opt_state), jax.tree.leaves(want.opt_state), strict=True
        )
    )
    bias = all(np.array_equal(got.bias[k], want.bias[k]) for k in want.bias)
    print(json.dumps({
        "mesh": text, "loss": [float(found["loss"]), float(told["loss"])],
        "norm": [float(found["norm"]), norm], "far": far, "divided": divided, "bias": bias,
        "moved": bool(want.bias) and bool(np.abs(want.bias["moe"]).max() > 0),
    }))
"""


@pytest.mark.parametrize(
    ("family", "recipe", "meshes"),
    [
        ("v3", "pretrain", MESHES[1:2]),
        *(
            pytest.param(f, r, DENSE if f == "student" else MESHES, marks=pytest.mark.slow)
            for f in ("v2", "v3", "student")
            for r in ("pretrain", "sft", "grpo")
        ),
    ],
)
def test_losses_and_gradients_are_those_of_one_device(family, recipe, meshes):
    done = child.run(STEP, family, recipe, *meshes, devices=8, timeout=900)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["mesh"] for row in rows] == list(meshes)
    for row in rows:
        assert row["loss"][1] != 0 and row["norm"][1] > 0.01
        for got, want in (row["loss"], row["norm"]):
            assert got == pytest.approx(want, rel=1e-5)
        assert row["far"] < 1e-5  # of the gradient's norm, in any element
        assert row["bias"]
        assert row["moved"] == (family == "v3" and recipe == "pretrain")
        assert (row["divided"] > 5) == (row["mesh"] != "data=8")


# Pretraining, gone on with under another mesh: steps are a setting that may change.
PRETRAIN = """
import dataclasses, json, sys
from pathlib import Path
import jax
from deepzoo.recipes import pretrain
from deepzoo.recipes.parts.run import Options
recipe = pretrain.PRESETS["nano"]
recipe = dataclasses.replace(
    recipe, rows=4, length=24, problems=0, sample_every=0, rate=0.0,
    config=dataclasses.replace(
        recipe.config, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
        moe_intermediate_size=16,
    ),
)
for steps, mesh in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
    pretrain.train(
        dataclasses.replace(recipe, steps=int(steps)), Path(sys.argv[1]),
        Options(mesh=mesh, log_every=1, tensorboard=False, quiet=True),
    )
"""


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_recipe_goes_on_under_another_mesh(tmp_path):
    several, one = tmp_path / "several", tmp_path / "one"
    for steps, devices, on in (("2", 4, "fsdp=2,expert=2"), ("3", 2, "data=2"), ("4", 1, "")):
        child.run(PRETRAIN, str(several), steps, on, devices=devices)
    child.run(PRETRAIN, str(one), "2", "", "3", "", "4", "")
    assert len(losses(one)) == 4
    np.testing.assert_allclose(losses(several), losses(one), rtol=2e-5)
    assert losses(one)[-1] < losses(one)[0]


# Recipes from a loaded model: begun on one mesh, stopped, gone on with on another, and on no mesh.
LOADED = """
import dataclasses, json, os, signal, sys
from pathlib import Path
import jax
from deepzoo import zoo
from deepzoo.recipes import distill, dpo, sft
from deepzoo.recipes.parts.log import Log
from deepzoo.recipes.parts.run import Options, Run
folder, names = Path(sys.argv[1]), sys.argv[2:]
pairs = [
    {"prompt": f"{n} + 3 =", "chosen": f"{n + 3}", "rejected": f"{n + 2}", "completion": f"{n + 3}"}
    for n in range(12)
]
(folder / "data.jsonl").write_text("".join(json.dumps(pair) + "\\n" for pair in pairs))
small = dict(data=str(folder / "data.jsonl"), task="", length=16, held_out=0, epochs=2, rate=1e-4)
tuned = dataclasses.replace(sft.PRESETS["nano"], rows=4, split=True, **small)
targets = ("attention", "routed_experts")
student = dict(mode="logits", hidden=32, layers=2, rows=4, **small)
cases = {
    "full": (sft, tuned),
    "lora": (sft, dataclasses.replace(tuned, lora_rank=2, lora_targets=targets)),
    "logits": (distill, dataclasses.replace(distill.PRESETS["nano"], **student)),
    "dpo": (dpo, dataclasses.replace(dpo.PRESETS["nano"], pairs=4, **small)),
}
told = {}

def whole(run):
    "Shapes of arrays that lie whole on a device although the mesh divides such a parameter."
    divided, left = set(), set()
    for config in filter(None, (run._model, run._frozen)):
        shapes, places = zoo.abstract(config), zoo.shardings(config, run.mesh)
        for leaf, place in zip(jax.tree.leaves(shapes), jax.tree.leaves(places), strict=True):
            both = left if place.shard_shape(leaf.shape) == leaf.shape else divided
            both.add(leaf.shape)
    divided -= left
    assert len(divided) > 3
    return [
        a.shape for a in jax.live_arrays()
        if a.shape in divided and any(s.data.shape == a.shape for s in a.addressable_shards)
    ]

fit, log = Run.fit, Log.__call__

def looked(run, *args, **how):
    if run.mesh is not None:
        told["whole"] = told.get("whole", []) + whole(run)
        told["starts"] = told.get("starts", 0) + 1
    return fit(run, *args, **how)

def logged(self, state, metrics):
    log(self, state, metrics)
    if int(state.step) == stop:
        os.kill(os.getpid(), signal.SIGTERM)

def said(run, line):
    told["estimate"] = told.get("estimate", []) + [line] * line.startswith("memory per device: ")

Run.fit, Run.say, Log.__call__ = looked, said, logged
for name in names:
    recipe, settings = cases[name]
    for out, plan in (
        ("several", ((2, "fsdp=2,expert=2"), (3, "data=2,tensor=2"))), ("one", ((3, ""),))
    ):
        for stop, on in plan:
            try:
                options = Options(mesh=on, log_every=1, tensorboard=False)
                recipe.train(settings, folder / name / out, options)
            except SystemExit:
                pass
    rows = {
        out: [json.loads(line) for line in (folder / name / out / "metrics.jsonl").open()]
        for out in ("several", "one")
    }
    losses = {out: [r["loss"] for r in found if "loss" in r] for out, found in rows.items()}
    print(json.dumps(told | losses))
    told.clear()
"""


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["full", "lora", "logits", "dpo"])
def test_a_recipe_from_a_loaded_model_goes_on_under_another_mesh(tmp_path, recipe):
    # XLA's threads wait for each other's in collectives: more than there are devices, or they may
    # wait forever where a collective is in a branch.
    done = child.run(LOADED, str(tmp_path), recipe, devices=4, timeout=900, env={"NPROC": "16"})
    told = json.loads(done.stdout)
    assert len(told["several"]) == len(told["one"]) == 3
    np.testing.assert_allclose(told["several"], told["one"], rtol=2e-5)
    assert len(set(told["one"])) == 3
    assert told["whole"] == [] and told["starts"] == 2
    assert len(told["estimate"]) == 3
    frozen = recipe in ("lora", "logits")
    assert all(("frozen parameters" in line) == frozen for line in told["estimate"])


# A fresh state, made in parts, and the memory of this host while it is made.
FRESH = """
import dataclasses, json, sys
import jax
from deepzoo import zoo
from deepzoo.recipes import pretrain
from deepzoo.recipes.parts.mesh import begun, parsed
from deepzoo.recipes.parts.step import start
import optax

def high_water():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10

def made(width, rows):
    config = dataclasses.replace(
        pretrain.PRESETS["nano"].config, hidden_size=width, vocab_size=rows, num_hidden_layers=2
    )
    tx = optax.adam(0.1)
    make = lambda: start(zoo.init(config, jax.random.key(0)), tx, 0)
    return jax.block_until_ready(begun(make, config, parsed("fsdp=4,tensor=2")))

made(32, 64)
before = high_water()
state = made(512, 32768)
peak = high_water() - before
leaves = jax.tree.leaves(state)
held = sum(s.data.nbytes for a in leaves for s in a.addressable_shards)
print(json.dumps({"peak": peak, "held": held, "whole": sum(a.nbytes for a in leaves)}))
"""


def test_a_fresh_state_is_made_in_parts():
    """Made on one device and then divided, it takes two and a half times its bytes at the peak."""
    told = json.loads(child.run(FRESH, devices=8).stdout)
    assert told["whole"] > 4e8
    print(f"{told['held'] / 1e6:.0f} MB of parts, {told['peak'] / 1e6:.0f} MB at the peak")
    assert told["held"] < 1.1 * told["whole"]
    assert told["peak"] < 2 * told["held"]


def test_a_mesh_is_all_devices_once():
    assert dict(mesh.parsed("data=1").shape) == {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}
    assert mesh.parsed("") is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data=2", "is for 2 devices, and there are 1"),
        ("fsdp=0", "is for 0 devices"),
        ("model=1", "'model=1' cannot be read"),
        ("data", "'data' cannot be read"),
        ("data=1,data=1", "'data=1' cannot be read"),
        ("data=-1", "'data=-1' cannot be read"),
        ("data=", "'data=' cannot be read"),
    ],
)
def test_what_is_no_mesh_is_named(text, told):
    with pytest.raises(RequestError, match=told):
        mesh.parsed(text)


REFUSALS = """
import dataclasses, sys
import jax, numpy as np, optax
from deepzoo import zoo
from deepzoo.recipes import pretrain
from deepzoo.recipes.parts import mesh
from deepzoo.recipes.parts.step import start
from deepzoo.zoo.config import Config
from deepzoo.zoo.errors import RequestError
v2 = dataclasses.replace(pretrain.PRESETS["nano"].config, n_routed_experts=12)
student = Config(
    model_type="qwen2", hidden_size=36, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, vocab_size=50, max_position_embeddings=64,
    bos_token_id=1, eos_token_id=2, dtype="float32",
)
def told(text, config):
    abstract = jax.eval_shape(
        lambda: start(zoo.init(config or v2, jax.random.key(0)), optax.sgd(1.0), 0)
    )
    try:
        mesh.placements(abstract, config, mesh.parsed(text))
    except RequestError as error:
        print(error)
told("expert=8", v2)
told("expert=8", student)
told("fsdp=8", student)
told("fsdp=2,tensor=4", None)
try:
    mesh.spread({"tokens": np.zeros((6, 3))}, mesh.parsed("data=4,tensor=2"))
except RequestError as error:
    print(error)
"""


def test_what_cannot_be_divided_is_named():
    lines = child.run(REFUSALS, devices=8).stdout.splitlines()
    assert [line.partition(";")[0] for line in lines] == [
        "mesh expert=8: does not divide expert (12)",
        "mesh expert=8: divides nothing in this model",
        "mesh fsdp=8: does not divide embed (36)",
        "mesh fsdp=2,tensor=4: what is trained here is whole on every device",
        "mesh data=4,tensor=2: a batch of 6 rows cannot be divided into 4 equal parts (data times"
        " fsdp)",
    ]
