"""The contract of every recipe: end it at any instant, start it again, and nothing is different.

    CASE = Resumable(
        source='''
            pretrain = copied("pretrain")
            recipe = dataclasses.replace(pretrain.PRESETS["nano"], config=..., steps=9, rows=2)
            train = pretrain.train
        ''',
    )

    def test_it_can_be_killed(tmp_path):
        check(CASE, tmp_path)

`source` runs in a child process and defines `recipe`, the settings, and `train(recipe, out,
options)`; `copied(name)` is a recipe of this project as one who forks it has it: a copied file. A
run of it should take a second or two, and `recipe.steps` be at least 6. `check` makes one
uninterrupted run and one that is ended by each of `ends` in turn, and compares: every leaf of the
last checkpoint, every row of metrics.jsonl but its times, every other file that was written.

A random instant is a random event in the run's directory (a file opened, renamed or deleted, a step
logged) and a moment behind it. The seed differs each time and is printed where a test fails; to see
the same again, set DEEPZOO_KILL_SEED to it. DEEPZOO_KILLS=20 looks for more than one an "instant":

    DEEPZOO_KILLS=20 uv run pytest tests/recipes -k ended -n 2
"""

import dataclasses
import hashlib
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import child

from deepzoo.recipes.parts.log import METRICS, TIMES, read_metrics

# Where in a save the process can be killed: nothing written; the first tree written; all written
# but not visible yet; visible, the oldest not deleted; the oldest half deleted.
SAVE_POINTS = ("before", "half", "written", "visible", "deleting")

_SEED, _KILLS = "DEEPZOO_KILL_SEED", "DEEPZOO_KILLS"

_DRIVER = """
import dataclasses, importlib.util, itertools, json, os, re, shutil, signal, sys, threading, time
from pathlib import Path
from deepzoo.recipes.parts import checkpoint
from deepzoo.recipes.parts.log import Log
from deepzoo.recipes.parts.run import Options
from deepzoo import zoo
from deepzoo.zoo import trees
from deepzoo.zoo.cli import recipes
from deepzoo.zoo.errors import DeepzooError

out, plan = Path(sys.argv[1]), json.loads(sys.argv[2])
saves, counter, within = 0, itertools.count(1), str(out.resolve())


def copied(name):
    path = out.parent / f"my_{name}.py"
    path.write_bytes(recipes.path(name).read_bytes())
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def send(number):
    os.kill(os.getpid(), number)


def reached(point):
    if saves == plan.get("save", 2) and point == plan.get("point"):
        send(plan.get("signal", signal.SIGKILL))


def wrapped(owner, name, before=None, after=None):
    original = getattr(owner, name)

    def call(*args, **keywords):
        if before is not None:
            before(*args)
        result = original(*args, **keywords)
        if after is not None:
            after(*args)
        return result

    setattr(owner, name, call)


def begun(*args):
    global saves
    saves += 1
    reached("before")


def renamed(source, target, *rest):
    if re.fullmatch("[0-9]{8}", Path(target).name):
        reached("written")


def deleted(path, *rest):
    if str(path).endswith(".deleting") and plan.get("point") == "deleting":
        for file in [p for p in Path(path).rglob("*") if p.is_file()][::2]:
            file.unlink()
        reached("deleting")


def happened():
    if next(counter) == plan.get("event"):
        if not plan["after"]:
            send(signal.SIGKILL)
        killer = threading.Timer(plan["after"], send, [signal.SIGKILL])
        killer.daemon = True
        killer.start()


def audited(event, args):
    if event in WATCHED and isinstance(args[0], str | os.PathLike):
        if os.fspath(args[0]).startswith(within):
            happened()


def logged(log, state, metrics):
    happened()
    step = int(state.step)
    if plan.get("at") == step:
        send(plan["with"])
    time.sleep(plan["pace"])


WATCHED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
sys.addaudithook(audited)
wrapped(checkpoint, "save_state", before=begun)
wrapped(trees, "_write_orbax", after=lambda *args: reached("half"))
wrapped(os, "rename", before=renamed)
wrapped(checkpoint, "prune", before=lambda *args: reached("visible"))
wrapped(shutil, "rmtree", before=deleted)
wrapped(Log, "__call__", after=logged)
options = Options(
    save_every=plan["save_every"], save_minutes=0, keep=plan["keep"], log_every=1, quiet=False
)
{source}
def refused(settings):
    try:
        train(settings, out, options)
    except DeepzooError as error:
        print("refused:", error, file=sys.stderr)
    else:
        sys.exit("it was not refused")


def retrained(*args, load=zoo.load, **how):
    import jax

    model = load(*args, **how)
    (*leaves, last), tree = jax.tree.flatten(model.params)
    return model._replace(params=jax.tree.unflatten(tree, [*leaves, last + 1]))


if plan.get("changed"):
    refused(eval(plan["changed"]))
    if any(getattr(recipe, name, "") for name in ("model", "base", "teacher", "student")):
        load, zoo.load = zoo.load, retrained
        refused(recipe)
        zoo.load = load
try:
    train(recipe, out, options)
except DeepzooError as error:
    print("deepzoo:", error, file=sys.stderr)
    sys.exit(2)
(out.parent / "events").write_text(str(next(counter) - 1))
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resumable:
    """A recipe small enough to be run a dozen times.

    Attributes:
        source: see the head of this file.
        changed: expression of `recipe` for settings that must be refused.
        told: what the refusal says of them.
        save_every: steps.
        keep: checkpoints; with 1, every save deletes one.
        pace: seconds added to each step, so that a kill at a random instant finds it in one.
        devices: that the child has.
    """

    source: str
    changed: str = "dataclasses.replace(recipe, seed=recipe.seed + 1)"
    told: str = "seed: "
    save_every: int = 2
    keep: int = 1
    pace: float = 0.02
    devices: int = 1

    def start(self, out: Path, **plan: Any) -> subprocess.Popen[str]:
        """A child process that trains in `out`, and ends as planned."""
        plan = {"save_every": self.save_every, "keep": self.keep, "pace": self.pace, **plan}
        environment = {
            "JAX_COMPILATION_CACHE_DIR": str(out.parent / "programs"), **os.environ,
            **child.on_cpu(self.devices), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip
        script = _DRIVER.replace("{source}", textwrap.dedent(self.source))
        return subprocess.Popen(
            [sys.executable, "-W", "error", "-c", script, str(out), json.dumps(plan)],
            env=environment, cwd=Path(__file__).parent, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, out: Path, *, status: int = 0, **plan: Any) -> str:
        """The same, to its end; returns what it wrote to stderr.

        Raises:
            AssertionError: it ended with another status than `status` (-9: killed).
        """
        return self.ended(out, (status,), **plan)[1]

    def ended(self, out: Path, expected: Sequence[int], **plan: Any) -> tuple[int, str]:
        """(one of the statuses that are expected, what it wrote to stderr)."""
        process = self.start(out, **plan)
        told, errors = process.communicate(timeout=600)
        assert process.returncode in expected, (
            f"ended with {process.returncode}, expected {expected}:\n{(told + errors)[-3000:]}"
        )
        return process.returncode, errors


def random_instants(seed: int | None = None) -> random.Random:
    """Where `kill` draws from; a failing test prints the seed."""
    if seed is None:
        seed = int(os.environ.get(_SEED) or secrets.randbits(32))
    print(f"{_SEED}={seed} ends the runs at the same instants again")
    return random.Random(seed)


def kill(case: Resumable, out: Path, draw: random.Random, share: float = 1.0) -> tuple[bool, str]:
    """Ends a run at a random instant; (whether it was finished before that, its stderr).

    Args:
        case: the recipe; an earlier run beside `out` was finished, so that its events are known.
        out: of the run.
        draw: from `random_instants`.
        share: of the recipe that is left.
    """
    events = int((out.parent / "events").read_text())
    event = draw.randint(1, max(round(events * share), events // 4))
    # At the event itself, or where no event is: in a step, in the threads that write arrays.
    after = draw.choice((0.0, draw.uniform(0, 0.1)))
    print(f"killed {after:.3f} s behind event {event} of {events}")
    status, told = case.ended(out, (0, -signal.SIGKILL), event=event, after=after)
    return status == 0, told


def check(
    case: Resumable,
    folder: Path,
    ends: Sequence[str] = ("half", "term", "instant"),
    *,
    seed: int | None = None,
) -> Path:
    """Compares an uninterrupted run with one that is ended again and again; returns the latter.

    Args:
        case: the recipe.
        folder: for both runs.
        ends: a point of SAVE_POINTS, killed there in its second save, so that at least two have to
            be left; "term", SIGTERM in a random step; "terms", a second one while the first saves;
            "second", stopped while another process tries to start, then killed; behind all these,
            because it may find the run finished, "instant", killed at random ones.
        seed: of the random instants; see the head of this file.
    """
    whole, broken, draw = folder / "whole", folder / "broken", random_instants(seed)
    case.run(whole)
    steps = max(row["step"] for row in rows(whole))
    step, finished = 0, False
    for end in ends:
        if finished:
            break
        assert step < steps or end == "instant", f"finished before {end!r}: give it more steps"
        early = draw.randint(min(step + 1, steps), steps)
        if end == "instant":
            for _ in range(int(os.environ.get(_KILLS, "1"))):
                finished, _ = kill(case, broken, draw, share=1 - step / steps)
                assert finished or (newest(broken) or 0) >= step, "a step that was saved is gone"
                step = newest(broken) or 0
                if finished:
                    break
        elif end == "term":
            told = case.run(broken, at=early, **{"with": signal.SIGTERM})
            assert f"SIGTERM: stopped after step {early}" in told
            assert newest(broken) == early
        elif end == "terms":
            again = {"point": "half", "save": 1, "signal": signal.SIGTERM}
            case.run(broken, status=143, at=step + 1, **{"with": signal.SIGTERM}, **again)
            assert newest(broken) == (step or None)
        elif end == "second":
            _second(case, broken, step + 1)
        else:
            assert end in SAVE_POINTS
            case.run(broken, status=-signal.SIGKILL, point=end)
        assert newest(broken) is None or newest(broken) >= step, "a step that was saved is gone"
        step = newest(broken) or 0
    before = newest(broken)
    told = case.run(broken, changed=case.changed)
    refused = [line for line in told.splitlines() if line.startswith("refused: ")]
    assert "was begun with other settings" in refused[0]
    assert case.told in refused[0]
    from_a_model = "copied(" in case.source and 'copied("pretrain")' not in case.source
    assert len(refused) == 1 + from_a_model
    if from_a_model:  # its name is the same, its weights are others
        assert "holds other weights than when this run was begun; put those back" in refused[1]
    assert before is None or f"going on from step {before}" in told
    compare(whole, broken)
    return broken


def compare(one: Path, other: Path) -> None:
    """Two finished runs hold the same: state, rows, files."""
    assert rows(one) == rows(other)
    assert fingerprints(one) == fingerprints(other)
    assert _files(one) == _files(other)


def rows(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the machine."""
    return [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(out / METRICS)]


def newest(out: Path) -> int | None:
    """The newest step whose manifest is there."""
    found = [int(p.parent.name) for p in out.glob("checkpoints/[0-9]*/manifest.json")]
    return max(found, default=None)


def fingerprints(out: Path) -> dict[str, Any]:
    """Of every leaf of the newest checkpoint."""
    path = out / "checkpoints" / f"{newest(out):08d}" / "manifest.json"
    return json.loads(path.read_text())["trees"]


def _files(out: Path) -> dict[str, str]:
    """Hashes of what the run was for; and that nothing half done is left."""
    found = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = path.relative_to(out)
        assert not any(part.endswith((".partial", ".deleting", ".tmp")) for part in name.parts)
        if name.parts[0] not in ("checkpoints", "tensorboard", METRICS, ".lock"):
            found[str(name)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _second(case: Resumable, out: Path, step: int) -> None:
    """While a process is stopped in `step`, another one is refused; then the first is killed."""
    first = case.start(out, at=step, **{"with": signal.SIGSTOP})
    try:
        _, status = os.waitpid(first.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), status
        held = newest(out)
        told = case.run(out, status=2)
        assert f"in use by process {first.pid}" in told
        assert newest(out) == held
    finally:
        first.kill()
        first.communicate(timeout=60)
