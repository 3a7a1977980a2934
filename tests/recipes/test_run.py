"""The directory of a run: whose it is, what it holds, what happens when it cannot be written."""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import child
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepzoo import zoo
from deepzoo.recipes.parts.fit import NonFiniteError
from deepzoo.recipes.parts.log import METRICS, read_metrics
from deepzoo.recipes.parts.run import MAY_CHANGE, Options, Run
from deepzoo.recipes.parts.settings import differences, plain
from deepzoo.recipes.parts.step import Output, start, train_step
from deepzoo.zoo.errors import CheckpointError, RequestError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    steps: int = 6
    rate: float = 0.1
    sizes: tuple[int, ...] = (1, 2)
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    model: str


def loss(params, batch, key) -> Output:
    del key
    bad = jnp.where(batch["bad"], jnp.nan, 0.0)
    return Output(((params["w"] - batch["x"]) ** 2).sum() + bad * params["w"][0], jnp.ones(()), {})


TX = optax.adamw(0.1)
STEP = jax.jit(train_step(loss, TX))


def initial(value: float = 1.0):
    return start({"w": jnp.full(3, value)}, TX, 0)


def batch(step: int, bad: bool = False) -> dict:
    return {"x": np.float32(step), "bad": np.bool_(bad)}


def go(out: Path, recipe: Any = None, facts: dict | None = None, make=batch, on=(), **options: Any):
    """Trains; the state and the run."""
    recipe = recipe or Recipe()
    chosen = Options(**{"save_minutes": 0, "log_every": 1, "tensorboard": False, **options})
    with Run(out, recipe, chosen, facts=facts) as run:
        state = run.fit(STEP, run.state(initial), make, recipe.steps, on=on)
    return state, run


def steps(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "checkpoints").iterdir())


def test_the_newest_checkpoints_are_kept_and_the_last_step_is_one(tmp_path: Path):
    go(tmp_path / "a", save_every=2, keep=2)
    assert steps(tmp_path / "a") == ["00000004", "00000006"]
    go(tmp_path / "b", save_every=4, keep=9)
    assert steps(tmp_path / "b") == ["00000004", "00000006"]
    go(tmp_path / "c", save_every=0)
    assert steps(tmp_path / "c") == ["00000006"]
    go(tmp_path / "d", save_every=0, save_minutes=1e-9, keep=9)
    assert len(steps(tmp_path / "d")) == 6


def test_a_second_run_in_the_directory_is_refused_with_the_pid(tmp_path: Path):
    with Run(tmp_path, Recipe()):
        with pytest.raises(RequestError, match=f"in use by process {os.getpid()}"):
            with Run(tmp_path, Recipe()):
                pass
    with Run(tmp_path, Recipe()):  # given back
        pass


def test_other_settings_are_refused_field_by_field(tmp_path: Path):
    go(tmp_path, facts={"data": "a1"})
    before = (tmp_path / "recipe.json").read_text()
    with pytest.raises(RequestError) as told:
        go(tmp_path, Recipe(rate=0.2, sizes=(1, 3)), facts={"data": "b2"})
    assert "(rate: 0.1 -> 0.2; sizes: [1, 2] -> [1, 3]; data: 'a1' -> 'b2')" in str(told.value)
    assert (tmp_path / "recipe.json").read_text() == before
    assert "steps" in MAY_CHANGE
    state, _ = go(tmp_path, Recipe(steps=8), facts={"data": "a1"}, log_every=2, keep=1)
    assert int(state.step) == 8
    saved = json.loads(before)
    assert saved["settings"] == {"steps": 6, "rate": 0.1, "sizes": [1, 2], "seed": 0}
    assert saved["versions"]["jax"] == jax.__version__


def test_other_weights_under_the_same_name_are_refused(tmp_path: Path):
    def begun(model: str, weights: float, **how: Any) -> Run:
        params = {"w": jnp.full(3, weights), "norm": {"weight": jnp.ones(2)}}
        return Run(tmp_path / "run", Started(model=model), models={"model": params}, **how)

    with begun("base", 1.0):
        pass
    before = (tmp_path / "run" / "recipe.json").read_text()
    with begun("base", 1.0):
        pass
    told = "--model base holds other weights than when this run was begun; put those back, or give"
    with pytest.raises(RequestError, match=told):
        begun("base", 2.0).__enter__()
    with pytest.raises(RequestError, match="model: 'base' -> 'other'"):
        begun("other", 2.0).__enter__()
    assert (tmp_path / "run" / "recipe.json").read_text() == before
    with begun("base", 2.0, open=("model",)):  # nothing depends on it yet
        pass
    with begun("base", 2.0):
        pass
    older = json.loads(before)
    del older["models"]
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(older))
    with begun("base", 3.0):  # of a version that took no note of it
        pass


def test_differences_name_nested_fields():
    old = {"model": {"width": 4, "rope": None}, "gone": 1, "same": [1]}
    new = {"model": {"width": 8, "rope": {"factor": 2.0}}, "same": [1], "added": "x"}
    assert differences(old, new) == {
        "added": "nothing -> 'x'", "gone": "1 -> nothing", "model.rope": "None -> nothing",
        "model.rope.factor": "nothing -> 2.0", "model.width": "4 -> 8",
    }  # fmt: skip
    assert plain(Recipe()) == {"steps": 6, "rate": 0.1, "sizes": [1, 2], "seed": 0}
    assert plain(Path("a/b")) == "a/b"
    with pytest.raises(TypeError, match="plain values"):
        plain({"f": len})


def test_a_directory_with_something_else_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RequestError, match=r"holds thesis\.tex, but no run"):
        go(tmp_path)
    assert (tmp_path / "thesis.tex").exists()
    assert not (tmp_path / "recipe.json").exists()


def test_parameters_that_are_not_finite_are_no_start(tmp_path: Path):
    with Run(tmp_path, Recipe()) as run:
        with pytest.raises(CheckpointError, match="params/w holds NaN"):
            run.state(lambda: initial(float("nan")))


def test_nothing_is_saved_in_a_streak_of_bad_batches(tmp_path: Path):
    with pytest.raises(NonFiniteError, match="w was not finite; 3 batches"):
        go(tmp_path, make=lambda s: batch(s, s >= 3), save_every=1, keep=9)
    assert steps(tmp_path) == ["00000001", "00000002", "00000003"]
    rows = read_metrics(tmp_path / METRICS)
    assert [(r["step"], r["skipped"]) for r in rows] == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 2)]
    assert rows[4]["loss"] is None


def test_a_full_disk_is_noticed_at_that_step_and_the_last_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage
    seen = []

    def fill(state, metrics):
        seen.append(int(state.step))
        if int(state.step) == 3:
            monkeypatch.setattr(shutil, "disk_usage", lambda p: usage(p)._replace(free=7))
        if int(state.step) == 5:
            monkeypatch.setattr(shutil, "disk_usage", usage)

    with pytest.raises(CheckpointError) as told:
        go(tmp_path / "stop", save_every=2, on=[fill])
    path = tmp_path / "stop" / "checkpoints" / "00000004"
    assert str(told.value).startswith(f"{path}: needs ")
    assert str(told.value).endswith("but 7 are free there; 00000002 stays the newest")
    assert seen == [1, 2, 3, 4]
    assert steps(tmp_path / "stop") == ["00000002"]
    monkeypatch.setattr(shutil, "disk_usage", usage)

    seen.clear()
    state, run = go(tmp_path / "on", save_every=2, on=[fill], on_full="continue")
    assert seen == [1, 2, 3, 4, 5, 6]
    assert run.missed == 1
    assert steps(tmp_path / "on") == ["00000002", "00000006"]
    missed = [r.get("missed_saves") for r in read_metrics(tmp_path / "on" / METRICS)]
    assert missed == [None, None, None, None, 1, 1]
    whole, _ = go(tmp_path / "whole")
    np.testing.assert_array_equal(state.params["w"], whole.params["w"])


FULL = """
import dataclasses, itertools, os, resource, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, optax
from deepzoo.recipes.parts import checkpoint
from deepzoo.recipes.parts.run import Options, Run
from deepzoo.recipes.parts.step import Output, start, train_step
from deepzoo.zoo.cli import guarded

@dataclasses.dataclass
class Recipe:
    steps: int = 4

out, left, tx = Path(sys.argv[1]) / "run", int(sys.argv[2]), optax.sgd(0.1)
step = jax.jit(train_step(lambda p, b, k: Output((p["a"] ** 2).sum(), b, {}), tx))

def fill(state, metrics):
    if int(state.step) == 2 and not left:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    elif int(state.step) == 2:
        made = []
        try:
            for n in itertools.count():
                made.append(out.parent / str(n))
                made[-1].touch()
        except OSError:
            for path in made[-1 - left : -1]:
                path.unlink()

def initial():
    noise = jax.random.normal(jax.random.key(0), (400_000,))  # does not compress
    return start({name: noise for name in "abcdefgh"}, tx, 0)

def train():
    options = Options(save_every=1, tensorboard=False, keep=9, quiet=True)
    with Run(out, Recipe(), options) as run:
        run.fit(step, run.state(initial), lambda at: np.float32(1), 4, on=[fill])
    return 0

status = guarded(train)
like = checkpoint.abstract(initial())
assert int(checkpoint.restore_state(out / "checkpoints" / "00000001", like).step) == 1
print(status, *sorted(p.name for p in (out / "checkpoints").iterdir()))
"""


@pytest.mark.parametrize("disk", ["limited", "full"])
def test_a_disk_that_fills_up_while_it_is_written(tmp_path: Path, disk: str):
    """One line, nothing else on stderr, nothing half written; the last checkpoint stays.

    Files that may not grow fail in the middle, as on a full disk; a file system in memory that has
    room for a few more files is one that fills up while Orbax writes.
    """
    command = [sys.executable, "-W", "error", "-c", FULL, str(tmp_path), "0"]
    if disk == "full":
        space = ["unshare", "--user", "--map-root-user", "--mount"]
        if not shutil.which("unshare") or subprocess.run([*space, "true"], check=False).returncode:
            pytest.skip("needs namespaces for users and mounts")
        mount = f"mount -t tmpfs -o size=99m,nr_inodes=300 tmpfs {shlex.quote(str(tmp_path))}"
        command = [*space, "sh", "-c", f'{mount} && exec "$@"', "sh", *command[:-1], "12"]
    environment = {**os.environ, **child.on_cpu(1), "JAX_ENABLE_COMPILATION_CACHE": "0"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=Path(child.__file__).parent,
        timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 00000001\n", done.stderr
    reason = "File too large" if disk == "limited" else "No space left on device"
    path = tmp_path / "run" / "checkpoints" / "00000002"
    assert re.sub("[0-9]{1,3}(,[0-9]{3})+", "N", done.stderr) == (
        f"deepzoo: {path}: cannot be written ({reason}); needs N bytes, N were free; what was"
        " written is removed; 00000001 stays the newest\n"
    )


def test_memory_is_told_before_the_first_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    go(tmp_path)
    told = capsys.readouterr().err
    assert "memory per device: " in told
    assert told.index("parameters 12 bytes, optimiser 28 bytes") < told.index("step")


def test_a_product_replaces_an_older_one_and_is_whole(tmp_path: Path):
    def half(path: Path) -> None:
        path.mkdir()
        raise OSError("the power is gone")

    with Run(tmp_path, Recipe()) as run:
        for text in ("one", "two"):
            run.product("note", lambda path, text=text: path.write_text(text))
            assert (tmp_path / "note").read_text() == text
        with contextlib.suppress(OSError):
            run.product("note", half)
        assert (tmp_path / "note").read_text() == "two"
        run.product("note", lambda path: path.write_text("three"))
    assert (tmp_path / "note").read_text() == "three"
    assert not list(tmp_path.glob(".note*"))


def test_a_checkpoint_of_a_whole_model_is_one_that_load_reads(tmp_path: Path):
    from deepzoo.recipes import pretrain

    config = pretrain.PRESETS["v3_nano"].config
    params = zoo.init(config, jax.random.key(1))
    params["moe"]["mlp"]["gate"]["e_score_correction_bias"] += 0.5
    tx = optax.sgd(0.1)
    with Run(tmp_path, Recipe(), Options(quiet=True), model=config) as run:
        run.save(start(params, tx, 0))
    model = zoo.load(tmp_path / "checkpoints" / "00000000")
    assert dataclasses.replace(model.config, inert=()) == config
    found = zoo.stack(model.params)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


DEVICES = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from deepzoo.recipes.parts import checkpoint
from deepzoo.recipes.parts.step import Output, jitted, start, train_step
from deepzoo.zoo.fingerprint import fingerprint

mesh = Mesh(np.array(jax.devices()), ("fsdp",))
def place(a):
    spec = PartitionSpec("fsdp") if a.ndim and a.shape[0] % 8 == 0 else PartitionSpec()
    return jax.device_put(a, NamedSharding(mesh, spec))
tx = optax.adamw(0.1)
loss = lambda p, b, k: Output(((b @ p["w"]) ** 2).sum(), jnp.float32(b.shape[0]), {})
state = jax.tree.map(place, start({"w": jnp.arange(64.0).reshape(8, 8)}, tx, 0))
step = jitted(train_step(loss, tx, accumulate=2), state)
folder = Path(sys.argv[1])
batch = place(np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32))
if found := checkpoint.saved(folder):
    state = checkpoint.restore_state(found[-1], checkpoint.abstract(state))
    print(fingerprint((state.params, state.opt_state)))
assert len(state.params["w"].sharding.device_set) == len(jax.devices()) == int(sys.argv[2])
held = {a.sharding for a in jax.tree.leaves(state)}
state, metrics = step(state, batch)
assert {a.sharding for a in jax.tree.leaves(state)} == held
assert len(state.params["w"].addressable_shards) == int(sys.argv[2])
checkpoint.save_state(folder, state)
print(fingerprint((state.params, state.opt_state)))
print(float(metrics["loss"]))
"""


def test_a_state_goes_on_with_other_devices(tmp_path: Path):
    told = [
        child.run(DEVICES, str(tmp_path), str(n), devices=n).stdout.splitlines() for n in (4, 2, 1)
    ]
    assert told[0][0] == told[1][0]
    assert told[1][1] == told[2][0]
    losses = [float(lines[-1]) for lines in told]
    assert losses[0] > losses[1] > losses[2]
    alone = child.run(DEVICES, str(tmp_path / "alone"), "1").stdout.splitlines()
    assert float(alone[-1]) == pytest.approx(losses[0], rel=1e-6)
