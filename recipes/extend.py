"""Context extension of a model by YaRN, in one or more phases of longer rows.

    deepzoo train extend --preset nano --out DIR

Papers: YaRN (arXiv 2309.00071, 3.1 to 3.4). DeepSeek-V2 (arXiv 2405.04434, 3.1.4): scale s = 40,
alpha = 1, beta = 32, target 160K, sqrt(t) = 0.0707 ln s + 1; 1000 steps of 576 rows of 32K tokens.
DeepSeek-V3 (arXiv 2412.19437, 4.3): the same with sqrt(t) = 0.1 ln s + 1; 1000 steps of 1920 rows
of 32K, then 1000 of 480 rows of 128K, at 7.3e-6.

In a config alpha and beta are `beta_slow` and `beta_fast`, the factor of ln s is a tenth of
`mscale`. They concern the decoupled query and key alone, which carry the positions; sqrt(t) is
squared on the scale of the softmax. Both papers keep YaRN the same in all phases, so the config is
rewritten once, and phases differ in the length and the number of rows.

`report.md` tells the loss on held-out rows by the place of a token in what it can see: of the model
as it was, of the same weights with YaRN, and at the end.

Deviations:
* V2 does not say its rate: the last of its pretraining, as in V3;
* the moments of pretraining are not there any more: AdamW begins anew, with `warmup` if wanted;
* neither paper says which texts, or what the other losses and the router biases do: as at the end
  of pretraining (V3: lambda 0.1, gamma 0). No fill-in-the-middle;
* nano extends v2-nano, which was trained on documents of at most about 110 tokens, each alone, to
  rows of 1024 in which they see each other.

What nano's report says (seed 0, 2.5 minutes of CPU time): loss per token on 512 to 1,024 tokens
12.10 as it was, 0.019 at the end; on the first 128, 1.93 and 0.013. After its first phase alone it
is 1.21 beyond 512. The price: greedy answers to 200 held-out problems, each alone, right in 94.0%
(95% interval 89.8% to 96.5%) from 99.5%.
"""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optax

from deepzoo import zoo
from deepzoo.recipes.parts import positions, problems, processes
from deepzoo.recipes.parts.bias import split_bias, with_bias
from deepzoo.recipes.parts.documents import Documents, encoded, pair
from deepzoo.recipes.parts.losses import Balance, next_token
from deepzoo.recipes.parts.main import main
from deepzoo.recipes.parts.memory import Remat
from deepzoo.recipes.parts.mtp import loaded, with_mtp
from deepzoo.recipes.parts.optim import Bytes, adamw
from deepzoo.recipes.parts.packing import pack
from deepzoo.recipes.parts.records import DataError, Records, read
from deepzoo.recipes.parts.rows import Rows
from deepzoo.recipes.parts.run import Options, Run, mesh_of
from deepzoo.recipes.parts.sample import sample
from deepzoo.recipes.parts.schedules import Schedule, scaled, warmup_constant_decay
from deepzoo.recipes.parts.step import State, Step, cast, jitted, start, train_step
from deepzoo.zoo.config import Config
from deepzoo.zoo.errors import RequestError
from deepzoo.zoo.model import Params
from deepzoo.zoo.prompt import tokenizer_of
from deepzoo.zoo.rope_scaling import RopeScaling, yarn_mscale
from deepzoo.zoo.types import Model


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One extension. `lengths`, `rows` and `batches` have an entry for each phase."""

    model: str = "v2-nano"
    """Where it starts: a shipped model or a directory."""
    data: str = ""
    """File or folder of texts, instead of `task`."""
    task: str = "arithmetic"
    """Problems whose written-out solutions fill the rows, where there is no `data`."""
    held_out: str = ""
    """Texts that are measured on; without them one in 20 of `data`, by its hash."""
    masked: bool = False
    """Documents of a row do not see each other."""
    original: int = 0
    """Positions that the model was pretrained with; 0 for what its config says."""
    factor: float = 8
    """s of YaRN: times `original` is the new context."""
    mscale: float = 0.707
    """sqrt(t) is 0.1 * mscale * ln s + 1."""
    beta_fast: float = 32
    """Pairs that turn more often than this in `original` positions stay; beta of YaRN."""
    beta_slow: float = 1
    """Pairs that turn less often are interpolated; alpha of YaRN."""
    lengths: tuple[int, ...] = (512, 1024)
    """Tokens of a row."""
    rows: tuple[int, ...] = (8, 4)
    """Rows of a batch."""
    batches: tuple[int, ...] = (100, 60)
    """Batches."""
    accumulate: int = 1
    """Micro-batches of a batch; its rows are cut into so many parts, which need less memory."""
    remat: Remat = "none"
    """Layers, or all but their dense products, are computed again going back, to save memory."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the model's arithmetic; parameters are kept in float32."""
    moments: Bytes = "float32"
    """Dtype of the optimiser's state."""
    rate: float = 3e-3
    """Learning rate of AdamW."""
    warmup: float = 0.05
    """Share of all batches in which the rate rises."""
    decay: float = 0.3
    """Share of all batches in which it falls to 0."""
    weight_decay: float = 0.01
    """Of the matrices."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    balance: float = 0.003
    """alpha_1 of V2, alpha of V3."""
    device: float = 0.0
    """alpha_2 of V2."""
    communication: float = 0.0
    """alpha_3 of V2."""
    bias_rate: float = 0.0
    """gamma of V3; 0 keeps the router biases as they are."""
    mtp: float = 0.0
    """lambda of V3; 0 leaves a model's MTP layers as they are."""
    held_rows: int = 32
    """Rows that are measured on, as long as the longest of training; 0 for none."""
    evaluate_every: int = 0
    """Steps between such measurements; 0 for one at the end of each phase."""
    sample_every: int = 40
    """Steps between samples of text, behind the beginning of such a row; 0 for none."""
    seed: int = 0
    """Of the data."""


_PAPER = Recipe(
    model="runs/v2/model", data="data", factor=40, lengths=(32768,), rows=(576,),
    batches=(1000,), accumulate=576, remat="full", compute="bfloat16", rate=2.4e-4 * 0.316**2,
    warmup=0.0, decay=0.0, weight_decay=0.1, device=0.05, communication=0.02, sample_every=0,
)  # fmt: skip
PRESETS = {
    "nano": Recipe(original=128),
    "v2_32k": _PAPER,
    "v3_32k_128k": dataclasses.replace(
        _PAPER, model="runs/v3/model", mscale=1.0, lengths=(32768, 131072), rows=(1920, 480),
        batches=(1000, 1000), accumulate=480, moments="bfloat16", rate=7.3e-6, balance=1e-4,
        device=0.0, communication=0.0, mtp=0.1,
    ),
}  # fmt: skip

STAGES = ("as it was", "with YaRN", "trained")  # columns of the report


def train(recipe: Recipe, out: Path, options: Options | None = None) -> Model:
    """Extends; writes `out`/model in the published layout, report.json and report.md.

    Called again for the same directory, it goes on from the newest checkpoint, in whatever phase
    that is.

    Returns:
        The extended model.

    Raises:
        DataError: the data cannot be used.
        RequestError: the settings contradict each other or the model.
    """
    check(recipe)
    mesh = mesh_of(options)
    model, aside = loaded(recipe.model, recipe.mtp, dtype="float32", quantized=False, mesh=mesh)
    before, tokenizer = model.config, tokenizer_of(model)
    config = extended(before, recipe)
    phases, held, facts = data(recipe, model._replace(params={}), config)
    step, tx = learner(recipe, config)
    told: dict[str, Any] = {"facts": facts, "models": {"model": model.params | aside}}
    with Run(out, recipe, options, model=config, tokenizer=tokenizer, **told) as run:

        def measured(config: Config, params: Params) -> np.ndarray:
            assert held is not None
            if recipe.compute != "float32":
                params = cast(params, recipe.compute)
            some = recipe.rows[-1] // recipe.accumulate  # what fits in training fits here, too
            return positions.measure(config, params, held, some)

        def look(state: State) -> dict[str, float]:
            assert held is not None
            found = measured(config, with_bias(state.params, state.bias))
            pairs = zip(held.ranges, positions.means(held, found), strict=True)
            return {f"held_out_{low}_{high}": float(loss) for (low, high), loss in pairs}

        def written(state: State) -> dict[str, str]:
            assert held is not None
            ids, at = held.batch["tokens"], int(state.step)
            trained = Model(config, with_bias(state.params, state.bias), tokenizer)
            return sample(trained, ids[at % len(ids), :64].tolist(), recipe.seed, at)

        hooks, found = [], []
        if held is not None:
            hooks.append(run.every(recipe.evaluate_every, look, last=True))
            hooks.append(run.every(recipe.sample_every, written))
            # Each time anew, also of a run that goes on: there is nothing to be remembered.
            found = [measured(c, model.params) for c in (before, config)]
        state = run.state(lambda params: start(params, tx, recipe.seed), model.params)
        model = model._replace(params={})  # the state has them, or newer ones
        update, begin = jitted(step, state), 0
        for batch, count in zip(phases, recipe.batches, strict=True):
            state = run.fit(
                update,
                state,
                lambda at, batch=batch, begin=begin: batch(at - begin),
                begin + count,
                on=hooks,
                tokens=functools.partial(tokens_before, recipe),
            )
            begin += count
        params = with_bias(state.params, state.bias)
        longer = processes.for_first(with_mtp(model._replace(config=config, params=params), aside))
        path = run.product("model", lambda path: zoo.save_hf(longer, path))
        if held is not None:
            found.append(measured(config, params))
            records = positions.compared(held, found, STAGES)
            report = {
                "model": recipe.model, "settings": dataclasses.asdict(recipe), "rows":
                len(held.batch["tokens"]), "rope_scaling": config.to_hf()["rope_scaling"],
                "max_position_embeddings": config.max_position_embeddings, "ranges": records,
            }  # fmt: skip
            text, lines = json.dumps(report, indent=1) + "\n", positions.table(records, STAGES)
            run.product("report.json", lambda path: path.write_text(text, encoding="utf-8"))
            run.product("report.md", lambda path: path.write_text(lines, encoding="utf-8"))
            run.say(lines.rstrip())
    return zoo.load(path, dtype="float32", mesh=mesh)


def check(recipe: Recipe) -> None:
    """The settings of the phases, before anything is loaded.

    Raises:
        RequestError: they contradict each other.
    """
    phases = (recipe.lengths, recipe.rows, recipe.batches)
    if len({len(p) for p in phases}) != 1 or min((n for p in phases for n in p), default=0) < 1:
        told = ", ".join(str(list(p)) for p in phases)
        raise RequestError(
            f"--lengths, --rows, --batches need a number above 0 for each phase; they are {told}"
        )
    if uneven := [n for n in recipe.rows if recipe.accumulate < 1 or n % recipe.accumulate]:
        raise RequestError(
            f"{uneven[0]} rows cannot be cut into {recipe.accumulate} equal micro-batches; change"
            " --rows or --accumulate"
        )
    if recipe.held_out and not recipe.data:
        raise RequestError("--held-out goes with --data; a task has held-out problems of its own")


def extended(config: Config, recipe: Recipe) -> Config:
    """The config with YaRN, `factor` times as many positions as the model was pretrained with.

    Students get YaRN's own form, sqrt(t) on cosines and sines; latent attention has it on the scale
    of the softmax, and 1 there.

    Raises:
        RequestError: a phase is longer than the new context; or the model has another rule, or has
            been extended further.
    """
    old = config.rope_scaling
    if old is not None and old.rope_type != "yarn":
        raise RequestError(
            f"{recipe.model}: its positions follow the rule {old.rope_type!r}; only models with"
            " plain rotary positions, or with YaRN, can be extended"
        )
    known = old.original_max_position_embeddings if old else config.max_position_embeddings
    original = recipe.original or known
    reach = round(original * recipe.factor)
    if recipe.factor < 1 or (old is not None and (original != known or recipe.factor < old.factor)):
        has = f"{old.factor:g} times {known} positions" if old else f"{known} positions"
        raise RequestError(
            f"{recipe.model}: has {has}; {recipe.factor:g} times {original} is no extension of it"
        )
    if max(recipe.lengths) > reach:
        raise RequestError(
            f"rows of {max(recipe.lengths)} tokens do not fit into {recipe.factor:g} times"
            f" {original} positions; raise --factor, or take shorter --lengths"
        )
    form: dict[str, Any] = {"mscale": recipe.mscale, "mscale_all_dim": recipe.mscale}
    if not config.is_mla:
        form = {"attention_factor": yarn_mscale(recipe.factor, recipe.mscale)}
    scaling = RopeScaling(
        rope_type="yarn", type_key="type" if config.is_mla else "rope_type",
        original_max_position_embeddings=original, factor=_plain(recipe.factor),
        beta_fast=_plain(recipe.beta_fast), beta_slow=_plain(recipe.beta_slow), **form,
    )  # fmt: skip
    return dataclasses.replace(config, rope_scaling=scaling, max_position_embeddings=reach)


def _plain(value: float) -> float:
    """40.0 as 40, which is how config files write it."""
    return int(value) if value == int(value) else value


def rate(recipe: Recipe) -> Schedule:
    """Step of all phases -> learning rate."""
    factor = warmup_constant_decay(sum(recipe.batches), recipe.warmup, recipe.decay)
    return scaled(recipe.rate, factor)


def learner(recipe: Recipe, config: Config) -> tuple[Step, optax.GradientTransformation]:
    """The step, the same for all phases, and its optimiser."""
    shape, _ = split_bias(zoo.abstract(dataclasses.replace(config, dtype="float32")))
    tx = adamw(shape, rate(recipe), decay=recipe.weight_decay, state=recipe.moments)
    even = Balance(expert=recipe.balance, device=recipe.device, communication=recipe.communication)
    step = train_step(
        next_token(config, balance=even, mtp=recipe.mtp, remat=recipe.remat),
        tx,
        recipe.accumulate,
        clip=recipe.clip,
        bias_rate=(lambda at: recipe.bias_rate) if recipe.bias_rate else None,
        compute=recipe.compute,
    )
    return step, tx


def tokens_before(recipe: Recipe, step: int) -> float:
    """Tokens of all batches before a step, of all phases."""
    ends = list(itertools.accumulate(recipe.batches))
    each = [rows * length for rows, length in zip(recipe.rows, recipe.lengths, strict=True)]
    phase = bisect.bisect_left(ends, step)
    begin = ends[phase - 1] if phase else 0
    done = sum(n * c for n, c in zip(each[:phase], recipe.batches[:phase], strict=True))
    return float(done + (step - begin) * each[phase])


type Batches = Callable[[int], dict[str, np.ndarray]]
"""Step of a phase, from 0 on -> batch."""


def data(
    recipe: Recipe, model: Model, config: Config
) -> tuple[list[Batches], positions.Held | None, dict[str, str]]:
    """Batches of each phase, what is measured on, and fingerprints of the texts.

    Raises:
        DataError: texts cannot be used; with file and line.
    """
    assert config.rope_scaling is not None
    shapes = list(zip(recipe.rows, recipe.lengths, strict=True))
    longest, first = max(recipe.lengths), config.rope_scaling.original_max_position_embeddings
    if not recipe.data:

        def phase(number: int, rows: int, length: int) -> Batches:
            return lambda step: solved(recipe, model, rows, length, (recipe.seed, number, step))

        made = [phase(number, *shape) for number, shape in enumerate(shapes)]
        if not recipe.held_rows:
            return made, None, {}
        kept_rows = solved(recipe, model, recipe.held_rows, longest, (recipe.seed,), held=True)
        return made, positions.held(kept_rows, first), {}
    learned, kept = texts(recipe, model)
    options: dict[str, Any] = {"split": True, "masked": recipe.masked}
    facts = {"data": learned.fingerprint}
    made: list[Batches] = [
        Rows(learned, rows=rows, length=length, seed=recipe.seed + phase, **options)
        for phase, (rows, length) in enumerate(shapes)
    ]
    if kept is None:
        return made, None, facts
    facts["held_out"] = kept.fingerprint
    if len(kept.tokens) <= longest:
        raise DataError(
            f"the held-out texts have {len(kept.tokens)} tokens, fewer than one row of {longest};"
            " name more with --held-out, or measure nothing with --held-rows 0"
        )
    rows = Rows(kept, rows=1, length=longest, seed=recipe.seed, **options)
    kept_rows = rows(0, first=0, rows=min(recipe.held_rows, rows.plan(0).rows))
    return made, positions.held(kept_rows, first), facts


def texts(recipe: Recipe, model: Model) -> tuple[Documents, Documents | None]:
    """What is learned, and what is measured on.

    Raises:
        DataError: a text cannot be used, with file and line; or no text is held out.
    """
    found = read(recipe.data)
    if recipe.held_out or not recipe.held_rows:
        kept = read(recipe.held_out) if recipe.held_rows else None
    else:
        parts: tuple[list, list] = [], []
        for index in range(len(found)):
            text = found.field(index, "text").encode(errors="surrogatepass")
            digest = hashlib.blake2b(text, digest_size=4).digest()
            parts[int.from_bytes(digest) % 20 == 0].append(index)
        if not all(parts):
            raise DataError(
                f"{recipe.data}: {len(parts[1])} of its {len(found)} texts are held out (one in 20,"
                " by its hash); name other texts with --held-out, or measure none with"
                " --held-rows 0"
            )
        found, kept = (Records([found[i] for i in p], [found.places[i] for i in p]) for p in parts)
    measured = None if kept is None else encoded(model, kept, format="plain")
    return encoded(model, found, format="plain"), measured


def solved(
    recipe: Recipe, model: Model, rows: int, length: int, seed: tuple[int, ...], *,
    held: bool = False,
) -> dict[str, np.ndarray]:  # fmt: skip
    """A batch of problems with their solutions, packed; a pure function of the arguments.

    Raises:
        DataError: the task has no written solutions.
    """
    task = problems.task(recipe.task)
    solution = task.solution
    if solution is None:
        raise DataError(f"task {recipe.task} has no written solutions; give --data")
    pairs = (pair(model, p.prompt, solution(p), raw=p.raw) for p in task.problems(*seed, held=held))
    batch = pack(pairs, rows, length)
    if not recipe.masked:
        batch["segments"] = np.zeros_like(batch["segments"])
    return batch


if __name__ == "__main__":
    main(train, PRESETS, __doc__)
