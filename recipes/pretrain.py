"""Pretraining of a V2 or V3 model: on made texts, or on your own with the papers' settings.

    deepzoo train pretrain --preset nano --out DIR

Papers: DeepSeek-V2 (arXiv 2405.04434, 3.1 and appendix B), DeepSeek-V3 (arXiv 2412.19437, 4.1 and
4.2), whose settings are the presets v2_lite, v2 and v3; `recipes/parts/losses.py` has the
equations.
* next-token cross entropy, plus for V3 the multi-token prediction loss, V3 eq. 21-25;
* V2: balance of experts, devices and communication, eq. 23-31; V3: sequence-wise balance, eq.
  17-20, and aux-loss-free biases, eq. 16;
* V3: a tenth of the documents as prefix, suffix, middle; documents in a row see each other.

Deviations of all presets:
* no token dropping (V2, 2.2.4), and a batch grows by `grow_by` rows at a time: every size is a
  program of its own;
* V2 does not say whether its packed documents see each other: they do, as in V3;
* the balance losses take a row for a "sequence"; V2's devices are its router's groups;
* the documents of `data` are held in memory: a corpus of the papers' size needs another loader.

Deviations of the presets whose names end in nano:
* Muon (arXiv 2502.16982) for the matrices instead of AdamW: clearly fewer steps at this size;
* warm-up, constant, linear decay to 0, instead of V2's two steps down and V3's cosine; constant
  batch size; no device-level and communication losses: there is one device;
* packed documents do not see each other;
* the numbers of a problem are random: they are read, but only what follows is learned.

`r1_nano` is the base that `recipes/r1.py` starts from, with searches for Countdown's answers that
mostly give up early (`recipes/parts/countdown_corpus.py`); `student_nano` is a dense student.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deepzoo import zoo
from deepzoo.recipes.parts import (
    countdown_corpus,
    countdown_tokenizer,
    processes,
    schedules,
    tasks,
)
from deepzoo.recipes.parts.accuracy import Score, measure
from deepzoo.recipes.parts.bias import split_bias, with_bias
from deepzoo.recipes.parts.countdown_traces import steps_right
from deepzoo.recipes.parts.documents import Documents, encoded, fill_in_the_middle, pair
from deepzoo.recipes.parts.losses import Balance, next_token
from deepzoo.recipes.parts.main import main
from deepzoo.recipes.parts.memory import Remat
from deepzoo.recipes.parts.optim import Bytes, adamw, muon
from deepzoo.recipes.parts.packing import pack
from deepzoo.recipes.parts.problems import task
from deepzoo.recipes.parts.records import DataError, read
from deepzoo.recipes.parts.rows import Rows
from deepzoo.recipes.parts.run import Options, Run
from deepzoo.recipes.parts.sample import sample
from deepzoo.recipes.parts.schedules import Ramp, Schedule, scaled
from deepzoo.recipes.parts.step import Step, jitted, start, train_step
from deepzoo.zoo.config import Config
from deepzoo.zoo.load import read_tokenizer
from deepzoo.zoo.save import save_hf
from deepzoo.zoo.tokenizer import Tokenizer
from deepzoo.zoo.types import Model


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One run: the model and how it is trained. Shares are of all steps."""

    config: Config
    """The model."""
    data: str = ""
    """File or folder of texts, instead of `corpus`."""
    corpus: Literal["arithmetic", "countdown"] = "arithmetic"
    """Texts that are made as they are needed, where there is no `data`."""
    tokenizer: str = ""
    """Directory of the tokenizer of `data`."""
    fim: float = 0.0
    """Share of the documents of `data` that are learned as prefix, suffix, middle (V3)."""
    masked: bool = True
    """Documents of a row do not see each other; those of `data`."""
    steps: int = 2000
    """Batches."""
    tokens: float = 0.0
    """Of the whole run, instead of `steps`."""
    rows: int = 8
    """Rows of a batch."""
    first_rows: int = 0
    """Rows of the first batch, where it grows."""
    growing: float = 0.0
    """Tokens over which it grows to `rows`; goes with `tokens`."""
    grow_by: int = 1
    """Rows by which it grows at a time."""
    length: int = 256
    """Tokens of a row."""
    accumulate: int = 1
    """Micro-batches of a batch; its rows are cut into so many parts, which need less memory."""
    remat: Remat = "none"
    """Layers, or all but their dense products, are computed again going back, to save memory."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the model's arithmetic; parameters are kept in float32."""
    moments: Bytes = "float32"
    """Dtype of the optimiser's state."""
    rate: float = 0.02
    """Peak learning rate of Muon; 0 for AdamW throughout."""
    adam_rate: float = 3e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.01
    """Of the matrices."""
    schedule: Literal["constant_decay", "v2", "v3"] = "constant_decay"
    """Of the rates: constant with linear ends, or as in the papers, with `warmup_steps`."""
    warmup: float = 0.05
    """Share of the steps in which the rates rise."""
    decay: float = 0.3
    """Share of the steps in which they fall to 0."""
    warmup_steps: int = 2000
    """Steps in which the rates of the papers rise."""
    drops: tuple[float, float] = (0.6, 0.9)
    """Shares of all tokens at which V2's rate falls to 0.316 of what it was."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    balance: float = 0.003
    """alpha_1 of V2, alpha of V3."""
    device: float = 0.0
    """alpha_2 of V2."""
    communication: float = 0.0
    """alpha_3 of V2."""
    bias_rate: float = 0.0
    """gamma of V3, 0 at the end: the last tenth of the steps, with schedule v3 the last 500B of
    14.8T tokens."""
    mtp: float = 0.0
    """lambda of V3."""
    mtp_last: float = 1.0
    """Share of lambda that is left after 10T of 14.8T tokens."""
    evaluate_every: int = 0
    """Steps between evaluations on held-out problems; 0 for one at the end."""
    problems: int = 500
    """Held-out problems of an evaluation; 0 for none."""
    sample_every: int = 200
    """Steps between samples of text; 0 for none."""
    seed: int = 0
    """Of the initial values and of the data."""


_V2 = Config(
    model_type="deepseek_v2",
    vocab_size=1007,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=512,
    initializer_range=0.05,
    bos_token_id=1,
    eos_token_id=2,
    dtype="float32",
    q_lora_rank=64,
    kv_lora_rank=32,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    topk_method="group_limited_greedy",
    routed_scaling_factor=2.0,
)
_V3 = dataclasses.replace(
    _V2, model_type="deepseek_v3", n_shared_experts=1, n_group=2, topk_group=1,
    topk_method="noaux_tc",
    scoring_func="sigmoid", norm_topk_prob=True, num_nextn_predict_layers=1,
)  # fmt: skip
_R1 = dataclasses.replace(
    _V3, vocab_size=countdown_tokenizer.VOCABULARY,
    max_position_embeddings=countdown_tokenizer.LENGTH,
)  # fmt: skip
_STUDENT = Config(
    model_type="qwen2", vocab_size=countdown_tokenizer.VOCABULARY, hidden_size=128,
    intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=countdown_tokenizer.LENGTH, initializer_range=0.05, bos_token_id=1,
    eos_token_id=2, dtype="float32",
)  # fmt: skip
_SMALL = dataclasses.replace(  # 64M parameters with the MTP layer; without it 56M, 23M active
    _R1, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=8, initializer_range=0.02, q_lora_rank=256, kv_lora_rank=128,
    qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=16,
    num_experts_per_tok=4, moe_intermediate_size=256, n_group=4, topk_group=2,
)  # fmt: skip
_SMALL_STUDENT = dataclasses.replace(
    _STUDENT, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=4, initializer_range=0.02,
)  # fmt: skip


def _from_scratch(name: str) -> Config:
    """A released model as its pretraining began: 4,096 positions, not quantised."""
    return dataclasses.replace(
        zoo.config(name), rope_scaling=None, max_position_embeddings=4096, dtype="float32",
        initializer_range=0.006, quantization_config=None,
    )  # fmt: skip


_PAPER = Recipe(
    config=_from_scratch("deepseek-v2"), data="data", tokenizer="data", masked=False, tokens=8.1e12,
    rows=9216, first_rows=2304, growing=225e9, grow_by=768, length=4096, accumulate=768,
    remat="full", compute="bfloat16", rate=0.0, adam_rate=2.4e-4, weight_decay=0.1, schedule="v2",
    balance=0.003, device=0.05, communication=0.02, problems=0, sample_every=0,
)  # fmt: skip
_COUNTDOWN = Recipe(
    config=_R1, corpus="countdown", steps=1200, length=512, balance=1e-4, bias_rate=0.003, mtp=0.3,
)  # fmt: skip
_COUNTDOWN_SMALL = dataclasses.replace(
    _COUNTDOWN, config=_SMALL, steps=2000, rows=64, adam_rate=1e-3, compute="bfloat16"
)
PRESETS = {
    "nano": Recipe(config=_V2),  # zoo/pretrained/v2-nano
    "v3_nano": Recipe(config=_V3, balance=1e-4, bias_rate=0.003, mtp=0.3),
    "r1_nano": _COUNTDOWN,
    "student_nano": dataclasses.replace(
        _COUNTDOWN, config=_STUDENT, steps=1000, bias_rate=0.0, mtp=0.0
    ),
    "r1_small": _COUNTDOWN_SMALL,
    "student_small": dataclasses.replace(
        _COUNTDOWN_SMALL, config=_SMALL_STUDENT, bias_rate=0.0, mtp=0.0
    ),
    "v2_lite": dataclasses.replace(
        _PAPER, config=_from_scratch("deepseek-v2-lite"), tokens=5.7e12, rows=4608, first_rows=0,
        growing=0.0, accumulate=576, adam_rate=4.2e-4, drops=(0.8, 0.9), balance=0.001, device=0.0,
        communication=0.0,
    ),
    "v2": _PAPER,
    "v3": dataclasses.replace(
        _PAPER, config=_from_scratch("deepseek-v3-base"), fim=0.1, tokens=14.8e12, rows=15360,
        first_rows=3072, growing=469e9, grow_by=1024, accumulate=1024, moments="bfloat16",
        adam_rate=2.2e-4, schedule="v3", balance=1e-4, device=0.0, communication=0.0,
        bias_rate=0.001, mtp=0.3, mtp_last=1 / 3,
    ),
}  # fmt: skip


def arithmetic(tokenizer: Tokenizer, recipe: Recipe) -> Callable[[int], dict[str, np.ndarray]]:
    """step -> batch of training problems with their steps; never a held-out one."""
    assert tokenizer.bos_id is not None
    bos: list[int] = [tokenizer.bos_id]
    eos = [tokenizer.eos_ids[0]]

    def tokenize(problem: str) -> tuple[list[int], int]:
        given, written = tokenizer.encode(problem + " ="), " = ".join(tasks.steps(problem))
        return bos + given + tokenizer.encode(written) + eos, 1 + len(given)

    def make(step: int) -> dict[str, np.ndarray]:
        documents = (tokenize(p) for p in tasks.problems(recipe.seed, step))
        return pack(documents, recipe.rows, recipe.length)

    return make


def countdown(tokenizer: Tokenizer, recipe: Recipe) -> Callable[[int], dict[str, np.ndarray]]:
    """step -> batch of searches, other requests and equations; never of held-out numbers."""
    model = Model(recipe.config, {}, tokenizer)

    def tokenize(text: countdown_corpus.Text) -> tuple[list[int], int]:
        if text.prompt:
            return pair(model, text.prompt, text.completion)
        return [*tokenizer.encode_prompt(text.completion), tokenizer.eos_ids[0]], 1

    def make(step: int) -> dict[str, np.ndarray]:
        documents = map(tokenize, countdown_corpus.corpus(recipe.seed, step))
        return pack(documents, recipe.rows, recipe.length)

    return make


def texts(recipe: Recipe, tokenizer: Tokenizer) -> Documents:
    """The documents of `data`, some of them as prefix, suffix, middle.

    Raises:
        DataError: the data cannot be used; with file and line.
    """
    made = encoded(Model(recipe.config, {}, tokenizer), read(recipe.data), format="plain")
    if recipe.fim:
        made = fill_in_the_middle(made, tokenizer, rate=recipe.fim, seed=recipe.seed)
    return made


def packed(recipe: Recipe, made: Documents) -> Callable[[int], dict[str, np.ndarray]]:
    """step -> batch of full rows of `made`; with the weight of the MTP loss, where it changes."""
    grown = plan(recipe)
    rows = Rows(
        made, rows=recipe.rows, length=recipe.length, split=True, masked=recipe.masked,
        seed=recipe.seed,
    )  # fmt: skip
    weight = schedules.v3_mtp_weight(grown.share, 1.0, recipe.mtp_last)

    def make(step: int) -> dict[str, np.ndarray]:
        count = grown.rows(step)
        batch = rows(step, first=grown.tokens(step) // recipe.length, rows=count)
        if recipe.mtp and recipe.mtp_last != 1.0:
            batch["mtp"] = np.full((count,), weight(step), np.float32)
        return batch

    return make


def plan(recipe: Recipe) -> Ramp:
    """Rows of every batch, tokens before it, steps of the run."""
    total = recipe.tokens or float(recipe.steps * recipe.rows * recipe.length)
    return schedules.ramp(
        recipe.first_rows or recipe.rows, recipe.rows, recipe.growing, total, recipe.length,
        recipe.grow_by,
    )  # fmt: skip


def train(recipe: Recipe, out: Path, options: Options | None = None) -> Model:
    """Trains; writes `out`/model in the published layout and bfloat16, and returns it.

    Called again for the same directory, it goes on from the newest checkpoint.

    Raises:
        DataError: the data cannot be used, or it has no tokenizer.
    """
    config = recipe.config
    tokenizer = _tokenizer(recipe)
    step, tx = learner(recipe)
    grown, facts = plan(recipe), {}
    if recipe.data:
        made = texts(recipe, tokenizer)
        batch, facts["data"] = packed(recipe, made), made.fingerprint
    else:
        made_up = {"arithmetic": arithmetic, "countdown": countdown}[recipe.corpus]
        batch = made_up(tokenizer, recipe)
    with Run(out, recipe, options, model=config, tokenizer=tokenizer, facts=facts) as run:

        def initial():
            return start(zoo.init(config, jax.random.key(recipe.seed)), tx, recipe.seed)

        def held_out(state):
            if not recipe.problems:
                return {}
            temperature = 0.0 if recipe.corpus == "arithmetic" else 1.0  # the base is to be sampled
            found = measured(trained(state), recipe.problems, temperature, recipe.corpus)
            return {"held_out": found.accuracy, "held_out_steps": links(found, recipe.corpus)}

        def look(state):
            return sample(trained(state), task(recipe.corpus), recipe.seed, int(state.step))

        def trained(state, gathered=processes.local):
            return Model(config, gathered(with_bias(state.params, state.bias)), tokenizer)

        state = run.state(initial)
        state = run.fit(
            jitted(step, state),
            state,
            batch,
            grown.steps,
            on=[
                run.every(recipe.evaluate_every, held_out, last=recipe.problems > 0),
                run.every(recipe.sample_every, look),
            ],
            tokens=grown.tokens,
        )
        final, greedy = trained(state, processes.for_first), recipe.corpus == "arithmetic"
        path = run.product("model", lambda path: export(final, path, greedy=greedy))
    return zoo.load(path, dtype="float32", mesh=run.mesh)


def _tokenizer(recipe: Recipe) -> Tokenizer:
    if not recipe.data:
        made = {"arithmetic": tasks, "countdown": countdown_tokenizer}[recipe.corpus]
        return Tokenizer(made.tokenizer_files(), recipe.config)
    found = read_tokenizer(Path(recipe.tokenizer).expanduser(), recipe.config)
    if found is None:
        raise DataError(
            f"{recipe.tokenizer or '--tokenizer'}: has no tokenizer.json; name the directory that"
            " holds the one of --data"
        )
    return found


def learner(recipe: Recipe) -> tuple[Step, optax.GradientTransformation]:
    """The step and its optimiser."""
    shape, _ = split_bias(zoo.abstract(recipe.config))
    grown = plan(recipe)
    factor = factor_of(recipe, grown)
    rate, adam_rate = scaled(recipe.rate, factor), scaled(recipe.adam_rate, factor)
    settings: dict[str, Any] = {"decay": recipe.weight_decay, "state": recipe.moments}
    if recipe.rate:
        tx = muon(shape, rate, adam_rate, **settings)
    else:
        tx = adamw(shape, adam_rate, **settings)
    weights = Balance(
        expert=recipe.balance, device=recipe.device, communication=recipe.communication
    )
    if recipe.schedule == "v3":
        bias_rate = schedules.v3_bias_rate(recipe.bias_rate, grown.share)
    else:
        bias_rate = lambda at: jnp.where(at < 0.9 * grown.steps, recipe.bias_rate, 0.0)  # noqa: E731
    step = train_step(
        next_token(recipe.config, balance=weights, mtp=recipe.mtp, remat=recipe.remat),
        tx,
        recipe.accumulate,
        clip=recipe.clip,
        bias_rate=bias_rate,
        compute=recipe.compute,
    )
    return step, tx


def factor_of(recipe: Recipe, grown: Ramp) -> Schedule:
    """What the peak rates are multiplied with."""
    if recipe.schedule == "v2":
        return schedules.v2(grown.steps, recipe.warmup_steps, recipe.drops, share=grown.share)
    if recipe.schedule == "v3":
        return schedules.v3(grown.steps, recipe.warmup_steps, share=grown.share)
    return schedules.warmup_constant_decay(grown.steps, recipe.warmup, recipe.decay)


def export(model: Model, path: Path, *, greedy: bool) -> None:
    """The model in the published layout and bfloat16; `greedy`: it answers so unless told
    otherwise."""
    final = dataclasses.replace(model.config, dtype="bfloat16")
    cast = jax.tree.map(lambda a, like: a.astype(like.dtype), model.params, zoo.abstract(final))
    save_hf(Model(final, cast, model.tokenizer), path)
    if greedy:
        settings = {
            "bos_token_id": final.bos_token_id,
            "eos_token_id": final.eos_token_id,
            "do_sample": False,
        }
        (path / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def report(model: Model, count: int = 500) -> str:
    """Greedy and sampled accuracy on held-out problems."""
    begin = time.perf_counter()
    greedy = measured(model, count, temperature=0.0)
    seconds = time.perf_counter() - begin
    sampled = measured(model, count, temperature=1.0)
    lines = [
        f"{name} {found.right.sum()} of {count} right; {found}; {links(found):.2%} of steps right"
        for name, found in (("greedy:       ", greedy), ("temperature 1:", sampled))
    ]
    return "\n".join([*lines, f"{greedy.lengths.sum()} tokens in {seconds:.0f} s (greedy)"])


def measured(model: Model, count: int, temperature: float, corpus: str = "arithmetic") -> Score:
    """Accuracy on held-out problems, from the whole distribution."""
    longest = 128 if corpus == "arithmetic" else 192
    return measure(
        model, task(corpus), count, max_tokens=longest, temperature=temperature, top_p=1.0
    )


def links(found: Score, corpus: str = "arithmetic") -> float:
    """Share of the written-out steps that are right."""
    pairs = [(p, made) for p, row in zip(found.problems, found.completions, strict=True)
             for made in row]  # fmt: skip
    if corpus == "arithmetic":
        counts = [tasks.steps_right(p.answer, made.text) for p, made in pairs]
    else:
        counts = [steps_right(made.text) for _, made in pairs]
    return sum(right for right, _ in counts) / max(1, sum(total for _, total in counts))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--evaluate"] and len(sys.argv) == 3:  # a trained model, instead
        print(report(zoo.load(sys.argv[2], dtype="float32")))
    else:
        main(train, PRESETS, __doc__)
