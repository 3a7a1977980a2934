"""`deepzoo train`, `recipes` and `plot`, and a copied recipe file that runs alone."""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from deepzoo.recipes.parts import main as line
from deepzoo.recipes.parts.log import METRICS, read_metrics
from deepzoo.recipes.parts.run import Options
from deepzoo.zoo import cli
from deepzoo.zoo.cli import recipes

RECIPES = recipes.names()


def run(*args: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, stdout, stderr."""
    status = cli.main([str(arg) for arg in args])
    return status, *capsys.readouterr()


def mistake(*args: object, capsys: pytest.CaptureFixture[str]) -> str:
    status, out, err = run(*args, capsys=capsys)
    assert (status, out) == (2, ""), err
    found = re.fullmatch(r"deepzoo: (.+)\n", err)
    assert found, f"not one line: {err!r}"
    return found[1]


def test_list_names_every_file_and_what_it_does(capsys: pytest.CaptureFixture[str]):
    status, out, _ = run("recipes", "list", capsys=capsys)
    assert status == 0
    listed = dict(text.split(None, 1) for text in out.splitlines())
    assert sorted(listed) == RECIPES
    told = (
        "Pretraining of a V2 or V3 model: on made texts, or on your own with the papers' settings."
    )
    assert listed["pretrain"] == told
    assert run("recipes", capsys=capsys)[1] == out


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_what_the_command_line_needs(name: str):
    module = import_module(f"deepzoo.recipes.{name}")
    assert callable(module.train)
    taken = {f.name for f in dataclasses.fields(Options)} | {"out", "preset", "recipe", "options"}
    assert module.PRESETS
    for preset in module.PRESETS.values():
        fields = dataclasses.fields(preset)
        assert not taken & {f.name for f in fields}
        parameters = type(preset).__dataclass_params__
        assert parameters.frozen
        assert parameters.kw_only
    assert recipes.summary(name).endswith(".")
    assert re.search(
        r'if __name__ == "__main__":\n(?s:.*)\bmain\(train, PRESETS, __doc__\)',
        recipes.path(name).read_text(encoding="utf-8"),
    )


def test_show_prints_the_file_and_copy_writes_it_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = recipes.path("pretrain").read_text(encoding="utf-8")
    assert run("recipes", "show", "pretrain", capsys=capsys) == (0, source, "")
    mine = tmp_path / "mine.py"
    status, out, _ = run("recipes", "copy", "pretrain", mine, capsys=capsys)
    assert (status, mine.read_text(encoding="utf-8")) == (0, source)
    assert f"python {mine}" in out
    assert "exists; name another file" in mistake(
        "recipes", "copy", "pretrain", mine, capsys=capsys
    )


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["train"], "RECIPE is missing"),
        (["train", "pretrian"], "no recipe is called 'pretrian'; did you mean pretrain?"),
        (["train", "pretrain"], "--out"),
        (["train", "pretrain", "--preset", "nanno", "--out", "x"], "did you mean nano?"),
        (["train", "pretrain", "--preset", "zzz", "--out", "x"], "there are nano, "),
        (["train", "pretrain", "--out", "x", "--stpes", "3"], "did you mean --steps?"),
        (["train", "pretrain", "--out", "x", "--steps", "few"], "--steps"),
        (["train", "pretrain", "--out", "x", "--on-full", "cry"], "expected one of stop, continue"),
        (["recipes", "show"], "NAME is missing; there are "),
        (["recipes", "show", "pretrian"], "did you mean pretrain?"),
        (["recipes", "copy", "pretrain"], "FILE is missing; such as: copy pretrain my_pretrain.py"),
        (["recipes", "list", "pretrain"], "`show pretrain` shows that one"),
        (["plot"], "RUN is missing"),
        (["plot", "a", "--smooth", "1"], "expected from 0 to below 1"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_one_line(
    args: list[str], told: str, capsys: pytest.CaptureFixture[str]
):
    assert told in mistake(*args, capsys=capsys)


def test_help_of_a_recipe_tells_its_flags_its_presets_and_an_example(
    capsys: pytest.CaptureFixture[str],
):
    status, out, err = run("train", "pretrain", "--help", capsys=capsys)
    assert (status, err) == (0, "")
    assert "usage: deepzoo train pretrain" in out
    for text in ("--steps", "--config.hidden-size", "--save-every", "--on-full", "nano, v3_nano"):
        assert text in out
    assert "Example: deepzoo train pretrain --preset nano --out runs/nano" in out
    _, other, _ = run("train", "pretrain", "--preset", "v3_nano", "--help", capsys=capsys)
    assert re.search(r"--balance FLOAT.*0\.0001|1e-0?4", other)


def test_flags_change_a_preset_and_nothing_else():
    presets = import_module("deepzoo.recipes.pretrain").PRESETS
    args = "--steps 7 --preset=v3_nano --config.hidden-size 64 --out a/b --keep 5".split()
    recipe, out, options = line.parse(presets, "", args, "x")
    base = presets["v3_nano"]
    config = dataclasses.replace(base.config, hidden_size=64)
    assert recipe == dataclasses.replace(base, steps=7, config=config)
    assert (out, options) == (Path("a/b"), Options(keep=5))


def test_a_copied_file_runs_alone(tmp_path: Path):
    """In another folder, under another name, changed in one line."""
    mine = tmp_path / "mine.py"
    source = recipes.path("pretrain").read_text(encoding="utf-8")
    changed = source.replace('"nano": Recipe(config=_V2)', '"mine": Recipe(config=_V2, problems=0)')
    assert changed != source
    mine.write_text(changed, encoding="utf-8")
    small = {
        "hidden-size": 16, "intermediate-size": 16, "num-hidden-layers": 2, "q-lora-rank": 8,
        "num-attention-heads": 2, "num-key-value-heads": 2, "moe-intermediate-size": 8,
    }  # fmt: skip
    flags = [w for k, v in small.items() for w in (f"--config.{k}", str(v))]
    flags += "--rows 2 --length 64 --sample-every 0 --log-every 1".split()

    def start(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "mine.py", "--out", "run", *flags, *more], cwd=tmp_path, text=True,
            capture_output=True, check=False, env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip

    done = start("--preset", "mine", "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert "memory per device: " in done.stderr
    steps = [r["step"] for r in read_metrics(tmp_path / "run" / METRICS) if "loss" in r]
    assert steps == [1, 2]
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    wrong = start("--rate", "1")
    assert wrong.returncode == 2
    assert re.fullmatch(r"deepzoo: .* other settings \(rate: 0\.02 -> 1\.0\).*\n", wrong.stderr)


def rows(run: Path, factor: float = 1.0) -> Path:
    run.mkdir()
    text = [f'{{"step": {s}, "loss": {factor / s}, "sample": "x"}}\n' for s in range(1, 30)]
    (run / METRICS).write_text("".join(text))
    return run


def test_plot_says_how_to_install_what_it_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # type: ignore[arg-type]
    told = mistake("plot", rows(tmp_path / "a"), capsys=capsys)
    assert "pip install 'deepzoo[notebooks]'" in told


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="an extra: notebooks")
def test_plot_draws_one_run_or_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one, two = rows(tmp_path / "a"), rows(tmp_path / "b", 2.0)
    status, out, err = run("plot", one, capsys=capsys)
    assert (status, out) == (0, f"{one / 'curves.png'}\n"), err
    alone = (one / "curves.png").read_bytes()
    assert alone[:8] == b"\x89PNG\r\n\x1a\n"
    assert run("plot", one, two, "--out", tmp_path / "both.png", capsys=capsys)[0] == 0
    assert (tmp_path / "both.png").read_bytes() != alone
    assert "no row has 'lost'; there are loss" in mistake(
        "plot", one, "--keys", "lost", capsys=capsys
    )
    assert "holds no metrics.jsonl" in mistake("plot", tmp_path, capsys=capsys)
