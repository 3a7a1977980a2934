"""What a run outlives: NaN on one device of several, a file system that turns read-only, a kill in
the middle of restoring."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import child
import pytest
from resumable import Resumable, compare, newest

NAN = """
import json, sys
import jax, jax.numpy as jnp, numpy as np, optax
from deepzoo.recipes.parts.mesh import parsed, placed, spread
from deepzoo.recipes.parts.step import Output, jitted, start, train_step

mesh, tx = parsed(sys.argv[1]), optax.adamw(0.1)

def loss(params, batch, key):
    return Output(((batch["x"] @ params["w"] - 1) ** 2).sum(), jnp.float32(len(batch["x"])), {})

state = placed(start({"w": jnp.ones(4)}, tx, 0), None, mesh)
step = jitted(train_step(loss, tx, accumulate=2), state)
good = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)

def shards(tree):
    return [[np.asarray(s.data).tobytes() for s in a.addressable_shards]
            for a in jax.tree.leaves(tree)]

for row in (None, 5, None):
    batch = good.copy()
    if row is not None:
        batch[row, 2] = np.nan
    batch = spread({"x": batch}, mesh)
    bad = [bool(np.isnan(np.asarray(s.data)).any()) for s in batch["x"].addressable_shards]
    before = shards((state.params, state.opt_state))
    state, metrics = step(state, batch)
    after = shards((state.params, state.opt_state))
    print(json.dumps({
        "bad": bad, "still": before == after, "same": all(len(set(a)) == 1 for a in after),
        "finite": [bool(np.asarray(s.data)) for s in metrics["finite"].addressable_shards],
        "streak": [int(np.asarray(s.data)) for s in state.streak.addressable_shards],
    }))
"""


def test_nan_on_one_device_is_not_finite_on_all_and_moves_none():
    lines = child.run(NAN, "data=4", devices=4).stdout.splitlines()
    first, poisoned, last = map(json.loads, lines)
    assert sum(poisoned["bad"]) == 1
    assert poisoned["finite"] == [False] * 4
    assert poisoned["streak"] == [1] * 4
    assert poisoned["still"]
    for step in (first, last):
        assert step["finite"] == [True] * 4
        assert step["streak"] == [0] * 4
        assert not step["still"]
    assert all(step["same"] for step in (first, poisoned, last))


TURNING = """
import dataclasses, subprocess, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, optax
from deepzoo.recipes.parts import checkpoint
from deepzoo.recipes.parts.run import Options, Run
from deepzoo.recipes.parts.step import Output, start, train_step
from deepzoo.zoo.cli import guarded

@dataclasses.dataclass
class Recipe:
    steps: int = 4

out, how, tx = Path(sys.argv[1]), sys.argv[2], optax.sgd(0.1)
step = jax.jit(train_step(lambda p, b, k: Output((p["a"] ** 2).sum(), b, {}), tx))
folder = out / "checkpoints"

def turn(state, metrics):
    if int(state.step) == 2 and how == "mode":
        folder.chmod(0o555)
    elif int(state.step) == 2:
        for words in (["--bind", folder, folder], ["-o", "remount,bind,ro", folder]):
            subprocess.run(["mount", *words], check=True)

def initial():
    return start({"a": jnp.ones(1000)}, tx, 0)

def train():
    with Run(out, Recipe(), Options(save_every=1, tensorboard=False, keep=9, quiet=True)) as run:
        run.fit(step, run.state(initial), lambda at: np.float32(1), 4, on=[turn])
    return 0

status = guarded(train)
like = checkpoint.abstract(initial())
assert int(checkpoint.restore_state(folder / "00000001", like).step) == 1
print(status, *sorted(p.name for p in folder.iterdir()))
"""


def test_a_file_system_that_turns_read_only_ends_the_run_with_one_line(tmp_path: Path):
    """The error is the system's own: a directory that is mounted read-only, or, where nobody is
    root, may not be written. What was saved stays."""
    out = tmp_path / "run"
    command = [sys.executable, "-W", "error", "-c", TURNING, str(out)]
    if os.geteuid():
        command, reason = [*command, "mode"], "Permission denied"
    else:  # may write anywhere, whatever the mode says
        space = ["unshare", "--user", "--map-root-user", "--mount"]
        if not shutil.which("unshare") or subprocess.run([*space, "true"], check=False).returncode:
            pytest.skip("needs namespaces for users and mounts")
        command, reason = [*space, *command, "mount"], "Read-only file system"
    environment = {**os.environ, **child.on_cpu(1)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False,
        cwd=Path(child.__file__).parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 00000001\n", done.stderr
    told = done.stderr.splitlines()
    assert len(told) == 1, done.stderr
    path = out / "checkpoints" / "00000002"
    assert told[0].startswith(f"deepzoo: {path}: cannot be written ({reason}")
    assert told[0].endswith("; 00000001 stays the newest")


SOURCE = """
import jax, jax.numpy as jnp, numpy as np, optax
from deepzoo.recipes.parts.run import Run
from deepzoo.recipes.parts.step import Output, start, train_step

@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    steps: int = 6
    seed: int = 0

def loss(params, batch, key):
    noise = jax.random.normal(key, (8,))
    return Output(((params["w"] - batch - noise) ** 2).sum(), jnp.ones(()), {})

def train(recipe, out, options):
    tx = optax.adamw(0.1)
    step = jax.jit(train_step(loss, tx), donate_argnums=0)
    with Run(out, recipe, options) as run:
        state = run.state(lambda: start({"w": jnp.zeros(8)}, tx, recipe.seed))
        run.fit(step, state, lambda at: np.float32(at), recipe.steps)

recipe, read = Recipe(), itertools.count(1)
def restored(*tree):
    if next(read) == {killed}:
        send(signal.SIGKILL)
wrapped(checkpoint, "read_tree", after=restored)
"""


def test_a_run_that_is_killed_while_it_restores_goes_on_all_the_same(tmp_path: Path):
    """Once with the parameters read, and once with the optimiser's state, too."""
    whole, out = tmp_path / "whole", tmp_path / "broken"
    calm = Resumable(source=SOURCE.replace("{killed}", "0"))
    calm.run(whole)
    calm.run(out, at=4, **{"with": signal.SIGTERM})
    for killed in ("1", "2"):
        case = Resumable(source=SOURCE.replace("{killed}", killed))
        told = case.run(out, status=-signal.SIGKILL)
        assert "going on" not in told
        assert newest(out) == 4
    assert "going on from step 4" in calm.run(out)
    compare(whole, out)
