"""Several `jax.distributed` processes: train, save together, go on with one."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from importlib import import_module
from pathlib import Path

import child
import jax
import numpy as np
import pytest
from resumable import newest, rows

from deepzoo.recipes.parts import processes
from deepzoo.recipes.parts.run import Options, mesh_of
from deepzoo.zoo.errors import RequestError

TRAIN = """
import dataclasses, json, sys, time
from pathlib import Path
import jax
count, index, port, folder, steps, on = sys.argv[1:]
if int(count) > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(index))
import numpy as np
from deepzoo import zoo
from deepzoo.recipes import pretrain
from deepzoo.recipes.parts import checkpoint
from deepzoo.recipes.parts.bias import split_bias
from deepzoo.recipes.parts.fit import fit
from deepzoo.recipes.parts.losses import next_token
from deepzoo.recipes.parts.mesh import parsed, placed, spread
from deepzoo.recipes.parts.optim import adamw
from deepzoo.recipes.parts.step import jitted, start, train_step
from deepzoo.zoo.errors import CheckpointError

config = dataclasses.replace(
    pretrain.PRESETS["v3_nano"].config, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, q_lora_rank=16, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, moe_intermediate_size=16, vocab_size=50,
)

def batch(at):
    rng = np.random.default_rng(at)
    tokens = rng.integers(3, 50, (4, 13)).astype(np.int32)
    made = {
        "tokens": tokens, "segments": np.zeros_like(tokens),
        "weights": np.ones(tokens.shape, np.float32),
    }
    return made if mesh is None else spread(made, mesh)

mesh, folder = parsed(on), Path(folder)
tx = adamw(split_bias(zoo.abstract(config))[0], 1e-2)
state = start(zoo.init(config, jax.random.key(0)), tx, 0)
if mesh is not None:
    state = placed(state, config, mesh)
if checkpoint.saved(folder):
    state = checkpoint.newest(folder, checkpoint.abstract(state), print)
loss = []
step = jitted(train_step(next_token(config, mtp=0.3), tx, bias_rate=lambda at: 0.01), state)
step.lower(state, batch(0)).compile()
ready = [folder.parent / f"compiled{i}" for i in range(int(count))]
ready[int(index)].touch()
while not all(path.exists() for path in ready):  # gloo waits 30 seconds for one that compiles
    time.sleep(0.05)
state = fit(step, state, batch, int(steps), [lambda s, m: loss.append(float(m["loss"]))])
checkpoint.save_state(folder, state)
try:
    checkpoint.save_state(folder, state)
except CheckpointError as error:
    assert "is not empty" in str(error)
else:
    raise AssertionError("saved twice")
print(json.dumps(loss))
"""


AGREE = """
import os, sys
import jax, numpy as np
from jax.sharding import PartitionSpec
from deepzoo.recipes.parts import processes
from deepzoo.recipes.parts.mesh import parsed
from deepzoo.zoo.engine import Engine
from deepzoo.zoo.errors import DeepzooError

processes.initialize()
index = jax.process_index()
assert (jax.process_count(), processes.is_first()) == (2, index == 0)
assert processes.allgather("ä" * (300 * index)) == ["", "ä" * 300]
assert processes.broadcast(f"of {index}") == "of 0"
assert processes.any_of(index == 1, index == 0, False) == [True, True, False]
assert [processes.decided(index == i) for i in range(2)] == [True, False]
assert processes.on_first(lambda: index) == (0 if index == 0 else None)
processes.same({"seed": 1, "sizes": (1, 2)})

def fails(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")

def inside(*errors):
    with processes.together():
        if errors[index] is not None:
            raise errors[index]

told = fails(lambda: processes.same({"seed": index, "rate": 0.1}))
assert "process 1 was started with other settings or data than process 0 (seed: 0 -> 1);" in told
full = OSError(28, "No space left on device", "/x/y")
told = [
    fails(lambda: inside(ValueError("a"), None)), fails(lambda: inside(None, full)),
    fails(lambda: inside(DeepzooError("b"), DeepzooError("c"))),
    fails(lambda: processes.on_first(lambda: 1 // 0)),
]
first = [
    "ValueError: a", "DeepzooError: /x/y: No space left on device", "DeepzooError: b",
    "ZeroDivisionError: integer division or modulo by zero",
]
second = [
    "RuntimeError: ValueError: a", "OSError: [Errno 28] No space left on device: '/x/y'",
    "DeepzooError: b", "RuntimeError: ZeroDivisionError: integer division or modulo by zero",
]
assert told == [first, second][index], told

mesh = parsed("fsdp=2,tensor=2")
for shape in ((4, 6), (3, 4, 6), (2, 2, 4, 6)):
    want = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    spec = PartitionSpec(*[None] * (len(shape) - 2), "fsdp", "tensor")
    where = jax.sharding.NamedSharding(mesh, spec)
    spread = jax.make_array_from_callback(shape, where, lambda at: want[at])
    tree = {"a": spread, "b": 3, "c": np.ones(2)}
    here = processes.local(tree)
    assert here["a"].devices() == {jax.local_devices()[0]} and here["b"] == 3
    np.testing.assert_array_equal(here["a"], want)
    np.testing.assert_array_equal(processes.on_host(spread), want)
    kept = processes.for_first(tree)["a"]
    assert (kept is spread) == (index == 1)
    if index == 0:
        assert isinstance(kept, np.ndarray)
        np.testing.assert_array_equal(kept, want)
told = fails(lambda: Engine(None, {"w": spread}, slots=1, capacity=8))
assert "RequestError: w lies partly on devices of other processes" in told
processes.barrier()
print("agreed")
"""

# A dense model of one layer; rates that do not depend on how many steps there will be.
SMALL = (
    "--preset student_nano --corpus arithmetic --rate 0 --warmup 0 --decay 0 --rows 4 --length 64"
    " --problems 2 --sample-every 0 --log-every 1 --config.vocab-size 1007 --config.hidden-size 16"
    " --config.intermediate-size 32 --config.num-hidden-layers 1 --config.num-attention-heads 2"
    " --config.num-key-value-heads 1"
)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(count: int, args: list[str], folder: Path, *, devices: int) -> list[subprocess.Popen]:
    """`count` processes of `python ARGS`, as a user starts them; compiled programs in `folder`."""
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}  # JAX warns
    environment |= child.on_cpu(devices) | {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    if count > 1:
        environment[processes.ADDRESS] = f"127.0.0.1:{free_port()}"
        environment[processes.COUNT] = str(count)
    return [
        subprocess.Popen(
            [sys.executable, "-W", "error", *args],
            env=environment | ({processes.INDEX: str(i)} if count > 1 else {}),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent,
        )
        for i in range(count)
    ]  # fmt: skip


def ended(started: list[subprocess.Popen], status: int = 0) -> list[str]:
    """What each process wrote, but Gloo's greetings; all end with `status`."""
    try:
        ends = [p.communicate(timeout=400) for p in started]
    finally:
        for p in started:
            p.kill()
    told = [
        "".join(x for x in (out + err).splitlines(True) if not x.startswith("[Gloo]"))
        for out, err in ends
    ]
    assert [p.returncode for p in started] == [status] * len(started), "".join(told)[-3000:]
    return told


def recipe(name: str, count: int, out: Path, flags: str) -> list[subprocess.Popen]:
    """`deepzoo train NAME`, on two devices in all."""
    words = ["-m", "deepzoo.zoo.cli", "train", name, "--out", str(out), "--mesh", "fsdp=2"]
    return start(count, [*words, *flags.split()], out.parent, devices=2 // count)


def both(folder: Path, steps: int, on: str) -> list[list[float]]:
    """Losses as each of two processes saw them."""
    port, environment = free_port(), os.environ | child.on_cpu(1)
    words = ["2", str(port), str(folder), str(steps), on]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(TRAIN), words[0], str(i), *words[1:]],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
            cwd=Path(__file__).parent,
        )
        for i in range(2)
    ]  # fmt: skip
    return [json.loads(told.splitlines()[-1]) for told in ended(started)]


def alone(folder: Path, steps: int) -> list[float]:
    done = child.run(TRAIN, "1", "0", "0", str(folder), str(steps), "")
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_two_processes_train_and_save_and_one_goes_on(tmp_path):
    first, second = both(tmp_path / "two", 2, "fsdp=2")
    assert first == second and len(first) == 2
    held = sorted(p.name for p in (tmp_path / "two").iterdir())
    assert held == ["00000002"]  # nothing half written beside it
    after = alone(tmp_path / "two", 4)
    want = alone(tmp_path / "one", 4)
    np.testing.assert_allclose(first + after, want, rtol=1e-5)


def test_processes_agree(tmp_path):
    """On what they say, decide, compare and fail with; and arrays come to where they are needed."""
    assert ended(start(2, ["-c", AGREE], tmp_path, devices=2)) == ["agreed\n", "agreed\n"]


@pytest.mark.slow
def test_a_recipe_is_ended_and_goes_on_with_two_processes_and_with_one(tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    # Saved at every step, because the first process's clock says so.
    flags = f"{SMALL} --save-every 0 --save-minutes 1e-5 --keep 0"
    started = recipe("pretrain", 2, out, f"{flags} --steps 100000")
    while not rows(out):
        assert started[0].poll() is None, ended(started)
        time.sleep(0.05)
    started[1].send_signal(signal.SIGTERM)
    first, second = ended(started)
    step = newest(out)
    assert step is not None
    assert f"SIGTERM: stopped after step {step}; the same command goes on from there" in first
    assert second == ""

    first, second = ended(recipe("pretrain", 2, out, f"{flags} --steps {step + 2}"))
    assert f"going on from step {step}" in first and f"{out}: done in" in first
    assert second == ""
    saved = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert saved == [f"{i:08d}" for i in range(1, step + 3)]  # nothing half written beside them
    assert (out / "model" / "model.safetensors").exists()

    refused = ended(recipe("pretrain", 2, out, f"{flags} --steps {step + 2} --seed 1"), 2)
    assert refused[0] == refused[1]
    assert refused[0].count("\n") == 1
    assert f"deepzoo: {out}: was begun with other settings (seed: 0 -> 1); take" in refused[0]

    flags = f"{SMALL} --save-every 0 --save-minutes 0 --steps {step + 4}"
    (told,) = ended(recipe("pretrain", 1, out, flags))
    assert f"going on from step {step + 2}" in told
    ended(recipe("pretrain", 1, whole, flags))
    found, want = ([r for r in rows(path) if "loss" in r] for path in (out, whole))
    assert [r["step"] for r in found] == [r["step"] for r in want] == [*range(1, step + 5)]
    for name in ("loss", "norm"):
        np.testing.assert_allclose([r[name] for r in found], [r[name] for r in want], rtol=1e-5)

    # A published model, its held-out problems answered by each process for itself.
    tuned = f"--model {out}/model --task arithmetic --samples 8 --epochs 3 --rows 4 --length 128"
    tuned += " --held-out 2 --log-every 1"
    first, second = ended(recipe("sft", 2, tmp_path / "two", tuned))
    assert "held out" in first and second == ""
    ended(recipe("sft", 1, tmp_path / "one", tuned))
    two, one = (rows(tmp_path / name) for name in ("two", "one"))
    assert [r.keys() for r in two] == [r.keys() for r in one] and "held_out" in two[-1]
    losses = [[r["loss"] for r in told if "loss" in r] for told in (two, one)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize(
    "given, told",
    [
        (("a:1", "", ""), "ADDRESS: set without JAX_NUM_PROCESSES and JAX_PROCESS_ID; several"),
        (("", "2", "0"), "JAX_PROCESS_ID: set without JAX_COORDINATOR_ADDRESS; several"),
        (("a:1", "two", "0"), "JAX_NUM_PROCESSES=two: expected a number"),
        (("a:1", "2", "2"), "JAX_PROCESS_ID=2 with JAX_NUM_PROCESSES=2: processes are counted"),
        (("here", "2", "1"), "JAX_COORDINATOR_ADDRESS=here: expected a host and a port, such as"),
    ],
)
def test_variables_that_are_half_set_or_wrong_are_refused(monkeypatch, given, told):
    names = (processes.ADDRESS, processes.COUNT, processes.INDEX)
    for name, value in zip(names, given, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(RequestError, match=told):
        processes.initialize()


def test_one_process_needs_no_variables(monkeypatch):
    for name in (processes.ADDRESS, processes.COUNT, processes.INDEX):
        monkeypatch.delenv(name, raising=False)
    processes.initialize()
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize("name", ["grpo", "reject", "evaluate", "r1", "distill"])
def test_recipes_whose_model_answers_as_it_learns_want_one_process(monkeypatch, tmp_path, name):
    module = import_module(f"deepzoo.recipes.{name}")
    settings = next(iter(module.PRESETS.values()))
    if name == "distill":
        settings = dataclasses.replace(settings, mode="on_policy", steps=1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(RequestError, match=f"^{name}.* runs in one process, and this is one of 2;"):
        module.train(settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_several_processes_need_a_mesh(monkeypatch):
    assert mesh_of(Options()) is None
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for options in (None, Options()):
        with pytest.raises(RequestError, match="there are 2 processes with 1 devices, and no mesh"):
            mesh_of(options)
