"""`evaluate` and `reject` under a mesh: no device holds the model whole, answers are the same."""

import json

import child
import pytest

ANSWERS = """
import dataclasses, json, sys
from pathlib import Path
import jax
from deepzoo import zoo
from deepzoo.recipes import evaluate, reject
from deepzoo.recipes.parts import answers
from deepzoo.recipes.parts.mesh import parsed
from deepzoo.recipes.parts.run import Options

folder, name, meshes = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
(folder / "text.jsonl").write_text('{"text": "47 + 3 = 50"}\\n{"text": "12 - 2 = 10"}\\n' * 3)
few = dict(task="arithmetic", max_tokens=24, slots=4, at_once=2)
recipe = {
    "evaluate": dataclasses.replace(
        evaluate.PRESETS["nano"], problems=4, samples=2, passes=(1,), majorities=(),
        text=str(folder / "text.jsonl"), length=8, **few,
    ),
    "reject": dataclasses.replace(reject.PRESETS["nano"], prompts=4, answers=2, **few),
}[name]
config, whole = zoo.config("v2-nano"), []

def looked(module, name, on):
    "Notes the parameters that lie whole on a device although the mesh divides them."
    original = getattr(module, name)

    def call(*args, **how):
        for stacked in (True, False):
            shapes = jax.tree.leaves(zoo.abstract(config, stacked=stacked))
            places = jax.tree.leaves(zoo.shardings(config, on, stacked=stacked))
            pairs = [(a.shape, s.shard_shape(a.shape)) for a, s in zip(shapes, places)]
            # A part of one may have the shape of another, whole.
            divided = {a for a, part in pairs if a != part} - {part for _, part in pairs}
            assert len(divided) > 3
            whole.extend(
                a.shape for a in jax.live_arrays()
                if a.shape in divided and a.sharding.shard_shape(a.shape) == a.shape
            )
        calls.append(name)
        return original(*args, **how)

    setattr(module, name, call)

calls = []
for at, mesh in enumerate(["", *meshes]):
    if mesh:
        looked(answers, "rollout", parsed(mesh))
        looked(evaluate, "spread", parsed(mesh))
    out = folder / str(at)
    report = {"evaluate": evaluate, "reject": reject}[name].train(
        recipe, out, Options(mesh=mesh, tensorboard=False, quiet=True)
    )
    made = [a._asdict() for a in answers.made(out)]
    print(json.dumps({"report": report, "made": made, "whole": whole, "calls": sorted(set(calls))}))
"""


@pytest.mark.parametrize("recipe", ["evaluate", pytest.param("reject", marks=pytest.mark.slow)])
def test_answers_are_those_of_one_device(tmp_path, recipe):
    # XLA's threads wait for each other's in collectives: more than there are devices.
    done = child.run(
        ANSWERS, str(tmp_path), recipe, "fsdp=2,expert=2,tensor=2", devices=8, timeout=900,
        env={"NPROC": "32"},
    )  # fmt: skip
    one, several = (json.loads(line) for line in done.stdout.splitlines())
    assert one["made"] == several["made"]
    assert len({a["text"] for a in one["made"]}) > 3
    assert several["whole"] == []
    wanted = ["rollout", "spread"] if recipe == "evaluate" else ["rollout"]
    assert (one["calls"], several["calls"]) == ([], wanted)
    for name in {"nll", "perplexity"} & one["report"].keys():
        one["report"][name] = pytest.approx(one["report"][name], rel=1e-5)
    assert one["report"] == several["report"]
