"""The directory of a run: who may write it, what it trains, how far it is, how to go on.

    recipe.json       the settings; going on with others is refused
    metrics.jsonl     one JSON object a line: metrics, evaluations, samples of text
    tensorboard/      the same for TensorBoard
    checkpoints/      the newest states, see `checkpoint`
    .lock             held, with the owner's process id, while a process writes here

Kill the process at any instant and start it again with the same command: it goes on from the newest
whole checkpoint, and ends with the same bits and the same metrics as if nothing had happened.

Of several `jax.distributed` processes (see `processes`) the first has the lock and writes all of it
but the checkpoints, which they write together; all of them see the directory.
"""

import dataclasses
import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, Self

import jax
from jax.sharding import Mesh

from deepzoo.recipes.parts import checkpoint, processes
from deepzoo.recipes.parts.fit import Hook, fit
from deepzoo.recipes.parts.log import Log
from deepzoo.recipes.parts.memory import estimate
from deepzoo.recipes.parts.mesh import begun, parsed, placements, spread
from deepzoo.recipes.parts.settings import differences, plain
from deepzoo.recipes.parts.step import Batch, Metrics, State, Step
from deepzoo.zoo.config import Config
from deepzoo.zoo.errors import CheckpointError, RequestError
from deepzoo.zoo.fingerprint import digest

if TYPE_CHECKING:
    from deepzoo.zoo.tokenizer import Tokenizer

# Settings of a recipe that a run may go on with after they were changed: they say how long and how
# often, not what is learned. Everything in `Options` may change, too.
MAY_CHANGE = frozenset({"steps", "evaluate_every", "sample_every", "until"})

_SETTINGS, _LOCK, _CHECKPOINTS = "recipe.json", ".lock", "checkpoints"
_PARTIAL = "recipe.tmp"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How a run is kept and watched; the same for every recipe, and free to change on resuming."""

    save_every: int = 1000
    """Steps between checkpoints; 0 for none but the last."""
    save_minutes: float = 10.0
    """Minutes after which a checkpoint is saved, however few steps were done; 0 for never."""
    keep: int = 2
    """The newest checkpoints that are kept; 0 for all."""
    on_full: Literal["stop", "continue"] = "stop"
    """What to do when a checkpoint cannot be written."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    tensorboard: bool = True
    """Write event files for TensorBoard, too."""
    quiet: bool = False
    """Print nothing but errors."""
    mesh: str = ""
    """How all devices are used, such as "data=2,fsdp=2,expert=2"; see recipes/parts/mesh.py."""


def mesh_of(options: Options | None) -> Mesh | None:
    """The mesh that a recipe loads its models onto; None without options or `mesh`.

    Raises:
        RequestError: it cannot be read, or does not fit the devices; or there is none, and several
            processes have nothing in common.
    """
    found = None if options is None else parsed(options.mesh)
    if found is None and (count := jax.process_count()) > 1:
        devices = jax.device_count()
        raise RequestError(
            f"there are {count} processes with {devices} devices, and no mesh; say how all of them"
            f" are used, such as --mesh fsdp={devices}"
        )
    return found


class Run:
    """A run's directory, locked while the `with` block lasts.

        with Run(out, recipe, options, model=config, tokenizer=tokenizer) as run:
            state = run.state(lambda params: start(params, tx, recipe.seed), model.params)
            state = run.fit(jitted(step, state), state, batch, recipe.steps)
            run.product("model", lambda path: save_hf(..., path))

    Attributes:
        out: the directory.
        mesh: of the devices, or None.
        log: where rows go; `log.note(step, name=value)` adds one.
        missed: checkpoints that could not be written.
    """

    def __init__(
        self,
        out: str | Path,
        recipe: Any,
        options: Options | None = None,
        *,
        model: Config | None = None,
        frozen: Config | None = None,
        tokenizer: "Tokenizer | None" = None,
        facts: Mapping[str, Any] | None = None,
        models: Mapping[str, Any] | None = None,
        open: Collection[str] = (),
    ):
        """
        Args:
            out: the directory; made if it does not exist.
            recipe: the settings, a dataclass of plain values.
            options: how it is kept and watched.
            model: config that describes `params` with the biases; a checkpoint is then a model
                that `zoo.load` reads.
            frozen: config of a model beside the state: one that adapters belong to, or a teacher.
            tokenizer: saved with the model.
            facts: further values that must be the same on resuming, such as the fingerprint of a
                data set.
            models: setting that names a model -> its parameters as they were loaded; the same name
                with other weights is refused on resuming.
            open: settings that may still change, because nothing depends on them yet.
        """
        self.out, self.options = Path(out).expanduser().resolve(), options or Options()
        self.missed = 0
        self._told = {"recipe": type(recipe).__module__, "settings": plain(recipe)}
        self._told |= {"facts": plain(facts or {})}
        self._told |= {"models": {name: digest(p) for name, p in (models or {}).items()}}
        self._model, self._frozen = model, frozen
        self._tokenizer, self._open = tokenizer, frozenset(open)
        self._folder = self.out / _CHECKPOINTS
        self._ending = False
        self._saved: int | None = None
        self._steps = 0
        self._saved_at = time.monotonic()
        self._before: Any = None
        self._lock: int | None = None

    def __enter__(self) -> Self:
        """Locks the directory and compares settings and models with those it was begun with.

        Raises:
            RequestError: somebody else uses it, it holds something else, or they differ; also
                between processes.
        """
        for name in ("save_every", "save_minutes", "keep", "log_every"):
            if (value := getattr(self.options, name)) < 0:
                raise RequestError(f"{name} is {value}; expected 0 or more")
        options = self.options
        self.mesh = mesh_of(options)
        told = {"options": plain(options), "out": os.fspath(self.out)}
        processes.same(self._told | told)
        try:
            self._lock = processes.on_first(self._taken)
            with processes.together():
                if not (self.out / _SETTINGS).exists():
                    raise RequestError(
                        f"{self.out}: process {jax.process_index()} does not see what process 0"
                        " wrote there; give a directory on a file system that all share"
                    )
            self.log = Log(
                self.out, every=options.log_every, tensorboard=options.tensorboard,
                quiet=options.quiet or not processes.is_first(),
            )  # fmt: skip
        except BaseException:
            self._free()
            raise
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._terminate)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        self.log.close()
        self._free()
        if self._ending and error[0] is None and callable(self._before):
            # It came behind the last step: a program of several runs ends all the same.
            self._before(signal.SIGTERM, None)

    def say(self, line: str) -> None:
        """One line for the person who watches."""
        if not self.options.quiet:
            self.log.print(line)

    def spread(self, batch: Batch) -> Batch:
        """A batch with its rows divided over the mesh; without a mesh, as it is."""
        return batch if self.mesh is None else spread(batch, self.mesh)

    def state(self, make: Callable[..., State], *given: Any) -> State:
        """The newest whole checkpoint's state, or `make(*given)` without one.

        Under a mesh it is read or made in parts, each where it lies; see `mesh.begun`.

        Args:
            make: a pure function, such as `lambda params: start(params, tx, seed)`.
            given: arrays that the state takes over, such as a model's parameters: they are not to
                be used afterwards, since the step donates them, and a checkpoint takes their room.

        Raises:
            CheckpointError: every checkpoint is damaged, or the parameters are not finite.
            RequestError: the mesh divides nothing of this model.
        """
        if processes.decided(bool(checkpoint.saved(self._folder))):
            like = jax.eval_shape(make, *given)
            if self.mesh is not None:
                places = placements(like, self._model, self.mesh, frozen=self._frozen)
                like = jax.tree.map(
                    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), like, places
                )
            for leaf in jax.tree.leaves(given):  # there is never room for two
                if isinstance(leaf, jax.Array):
                    leaf.delete()
            found = checkpoint.newest(self._folder, like, self.say)
            assert found is not None
            state = found
            self._saved = int(state.step)
            self.say(f"going on from step {self._saved}")
        elif self.mesh is not None:
            state = begun(make, self._model, self.mesh, *given, frozen=self._frozen)
        else:
            state = make(*given)
        checkpoint.check_finite(state.params, self.out)
        at = int(state.step)
        processes.on_first(lambda: self.log.go_on(at))
        return state

    def fit(
        self,
        step: Step,
        state: State,
        batch: Callable[[int], Batch],
        steps: int,
        *,
        on: Iterable[Hook] = (),
        tokens: int | Callable[[int], float] = 0,
        flops: float = 0.0,
        patience: int = 3,
    ) -> State:
        """`fit` with the log before the hooks `on`, and checkpoints after them.

        Args:
            step: see `fit`; of one from `jitted` the memory is estimated and printed, and its
                batches are spread over the mesh. Another one calls `ready` for its own updates.
            state: see `fit`.
            batch: see `fit`.
            steps: see `fit`.
            on: hooks, such as `run.every(100, evaluate)`.
            tokens: tokens of a step; or step -> tokens of all steps before it.
            flops: floating-point operations of the model per token, for the utilisation.
            patience: see `fit`.

        Raises:
            SystemExit: 0, after SIGTERM, once the step is finished and saved.
            CheckpointError: a checkpoint could not be written and `on_full` is "stop".
            NonFiniteError: see `fit`.
        """
        at, self._steps = int(state.step), steps
        if at < steps:
            make = batch
            if hasattr(step, "lower"):
                make = lambda at: self.spread(batch(at))  # noqa: E731
                self.say(estimate(step, state, make(at)))
            processes.barrier()  # all have compiled it: no collective operation waits for that
            counted = tokens if callable(tokens) else lambda done: float(done * tokens)
            with self.log.watch(at, steps, counted, flops):
                state = fit(
                    step, state, make, steps, [self.log, *on, self._keep], patience=patience
                )
        if int(state.step) != self._saved:
            self.save(state)
        return state

    def ready(self, update: Any) -> Step:
        """A jitted update for a step that makes its own batches.

        Its batches are spread over the mesh, and before the first its memory is estimated and
        printed.
        """
        told = False

        def step(state: State, batch: Batch) -> tuple[State, Metrics]:
            nonlocal told
            batch = self.spread(batch)
            if not told:
                self.say(estimate(update, state, batch))
                told = True
            return update(state, batch)

        return step

    def every(
        self, steps: int, look: Callable[[State], Mapping[str, Any] | None], *, last: bool = False
    ) -> Hook:
        """A hook that calls `look(state)` and logs what it returns: numbers and texts by name.

        Args:
            steps: between calls; 0 for none.
            look: must not keep the state: the next step may donate it. All processes call it, and
                what the first one returns is logged; text is written from `processes.local`.
            last: call it after the last step, too.
        """

        def hook(state: State, metrics: Metrics) -> None:
            del metrics
            at = int(state.step)
            if (steps and at % steps == 0) or (last and at == self._steps):
                self.log.note(at, **(look(state) or {}))
                processes.barrier()

        return hook

    def save(self, state: State) -> None:
        """Writes a checkpoint and deletes the oldest.

        Raises:
            CheckpointError: the disk is full, and `on_full` is "stop"; with path, bytes needed
                and free. Checkpoints that were there stay.
        """
        self.log.flush()
        try:
            checkpoint.save_state(self._folder, state, self._described(), finish=self._finish)
        except CheckpointError as error:
            left = checkpoint.saved(self._folder)
            kept = f"{left[-1].name} stays the newest" if left else "there is no older one"
            if self.options.on_full == "stop":
                raise CheckpointError(f"{error}; {kept}") from None
            self.missed += 1
            self.log.missed = self.missed
            self.say(f"not saved, {self.missed} so far: {error}; {kept}")
        else:
            self._saved = int(state.step)
            processes.on_first(lambda: checkpoint.prune(self._folder, self.options.keep))
        self._saved_at = time.monotonic()

    def product(self, name: str, write: Callable[[Path], Any]) -> Path:
        """Writes what the run is for, such as a model, to `out`/`name`; replaces an older one.

        Of several processes the first calls `write`, with arrays from `processes.for_first`.
        """
        path = self.out / name
        new, old = (self.out / f".{name}.{end}" for end in ("partial", "deleting"))

        def replace() -> None:
            checkpoint.remove(new)
            checkpoint.remove(old)
            write(new)
            if path.exists():
                path.rename(old)
            new.rename(path)
            checkpoint.remove(old)

        processes.on_first(replace)
        return path

    def _keep(self, state: State, metrics: Metrics) -> None:
        del metrics
        options, at = self.options, int(state.step)
        late = time.monotonic() - self._saved_at > options.save_minutes * 60 > 0
        # A signal to one process ends all of them, and all have the clock of the first.
        ending, late = processes.any_of(self._ending, late and processes.is_first())
        due = options.save_every and at % options.save_every == 0
        # Nothing is saved in a streak of bad batches: its end is not known yet.
        if ending or ((due or late) and not int(state.streak)):
            self.save(state)
        if ending:
            self.say(f"SIGTERM: stopped after step {at}; the same command goes on from there")
            raise SystemExit(0)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self._ending:  # the second time: at once; what is half written is not visible
            os._exit(128 + signal.SIGTERM)
        self._ending = True

    def _taken(self) -> int:
        """The lock of the directory, whose settings are those of this run."""
        self.out.mkdir(parents=True, exist_ok=True)
        lock = _lock(self.out)
        try:
            self._compare()
            checkpoint.remove_leftovers(self._folder)
            checkpoint.remove_leftovers(self.out)
        except BaseException:
            os.close(lock)
            raise
        return lock

    def _free(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _compare(self) -> None:
        path, partial = self.out / _SETTINGS, self.out / _PARTIAL
        now = json.loads(json.dumps(self._told))
        if not path.exists():
            ours = (_LOCK, partial.name)
            if others := sorted(p.name for p in self.out.iterdir() if p.name not in ours):
                raise RequestError(
                    f"{self.out}: holds {', '.join(others[:3])}, but no run; give a new directory"
                )
            now["versions"] = {name: version(name) for name in ("deepzoo", "jax", "optax")}
            self._write_settings(now)
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            found = differences(before["settings"], now["settings"])
            facts = _of_both(before["facts"], now["facts"])
            found |= {k: v for k, v in facts.items() if k not in found}
            models = _of_both(before.get("models", {}), now["models"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RequestError(f"{path}: is damaged; give a new directory") from None
        was, ours = before.get("recipe"), now["recipe"]
        if was != ours and "__main__" not in (was, ours):  # a copied file is __main__
            raise RequestError(f"{self.out}: is a run of {was}, not of {ours}")
        free = MAY_CHANGE | self._open
        told = [f"{k}: {v}" for k, v in found.items() if k.partition(".")[0] not in free]
        if told:
            more = f"; and {len(told) - 10} more" if len(told) > 10 else ""
            raise RequestError(
                f"{self.out}: was begun with other settings ({'; '.join(told[:10])}{more}); take"
                " those, or give a new directory"
            )
        for name in [k for k in models if k not in free]:
            raise RequestError(
                f"{self.out}: --{name} {now['settings'].get(name)} holds other weights than when"
                " this run was begun; put those back, or give a new directory"
            )
        if any(k.partition(".")[0] in self._open for k in [*found, *models]):
            self._write_settings(before | {k: now[k] for k in ("settings", "models")})

    def _write_settings(self, told: Mapping[str, Any]) -> None:
        partial = self.out / _PARTIAL
        partial.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.out / _SETTINGS)

    def _described(self) -> dict[str, Any]:
        extra: dict[str, Any] = {"run": self._told}
        if self._model is not None:
            model = self._model
            extra["model"] = {"config": model.to_hf(), "norm_dtype": model.norm_dtype}
        return extra

    def _finish(self, path: Path) -> None:
        if self._tokenizer is not None:
            self._tokenizer.save(path)


def _of_both(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Differences between what both know: another version of this program takes note of others."""
    both = before.keys() & now.keys()
    return differences({k: before[k] for k in both}, {k: now[k] for k in both})


def _lock(out: Path) -> int:
    """Takes the directory for this process; the system gives it back however the process ends."""
    fd = os.open(out / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise RequestError(
            f"{out}: in use by process {owner}; wait for it, or give another directory"
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd
