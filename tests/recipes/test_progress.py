"""What a person at a terminal sees of a run: which step, of how many, and the time left."""

import re

from terminal import Terminal

SOURCE = """
import dataclasses, sys, time
import jax, jax.numpy as jnp, numpy as np, optax
from deepzoo.recipes.parts.run import Options, Run
from deepzoo.recipes.parts.step import Output, start, train_step

@dataclasses.dataclass(frozen=True)
class Recipe:
    steps: int = 14

tx = optax.sgd(0.1)
step = jax.jit(train_step(lambda p, b, k: Output((p["w"] ** 2).sum(), b, {}), tx))

def slow(at):
    time.sleep(0.25)
    return np.float32(1)

with Run(sys.argv[1], Recipe(), Options(tensorboard=False, quiet=sys.argv[2] == "quiet")) as run:
    state = run.state(lambda: start({"w": jnp.ones(3)}, tx, 0))
    run.fit(step, state, slow, Recipe().steps, on=[run.every(7, lambda state: {"seen": 1.0})])
"""
BAR = re.compile(r"step\s+(\d+)/14 .*?(\d):(\d\d):(\d\d)\S* left")


def shown(tmp_path, how: str) -> str:
    with Terminal("-c", SOURCE, str(tmp_path / "run"), how, columns=120) as terminal:
        status, text = terminal.finish()
    assert status == 0, text
    return text


def test_the_bar_counts_steps_up_and_the_time_down(tmp_path):
    raw = shown(tmp_path, "loud")
    assert "\x1b[2K" in raw[raw.rindex("left") :]  # at the end the bar's line is cleared
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw)
    bars = [tuple(map(int, found)) for found in BAR.findall(text)]
    steps = [done for done, *_ in bars]
    assert steps == sorted(steps)
    assert len(set(steps)) >= 8
    seconds = {done: 3600 * h + 60 * m + s for done, h, m, s in bars if done > 3}
    assert len(set(seconds.values())) >= 2
    for done, left in seconds.items():  # a step takes a quarter of a second, or more where it waits
        assert (14 - done) / 4 - 1 <= left < 60
    for line in ("step 7: seen 1\r\n", "step 14: seen 1\r\n"):  # above the bar
        assert line in text


def test_a_quiet_run_shows_nothing(tmp_path):
    assert shown(tmp_path, "quiet") == ""
