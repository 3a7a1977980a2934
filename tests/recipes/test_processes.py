"""Several `jax.distributed` processes: train, save together, go on with one."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import child
import numpy as np
import pytest

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


def both(folder: Path, steps: int, on: str) -> list[list[float]]:
    """Losses as each of two processes saw them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | child.on_cpu(1)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(TRAIN), "2", str(i), str(port), str(folder),
             str(steps), on],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
            cwd=Path(__file__).parent,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        ends = [p.communicate(timeout=400) for p in processes]
    finally:
        for p in processes:
            p.kill()
    for p, (out, err) in zip(processes, ends, strict=True):
        assert p.returncode == 0, (out + err)[-3000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in ends]


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
