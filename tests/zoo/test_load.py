"""Where `load` finds a model, where it puts the parts, and what an interruption leaves."""

import os
from pathlib import Path
from typing import Any

import child
import pytest
import shards
from golden import GOLDEN

from deepzoo import zoo
from deepzoo.zoo import assemble, catalog
from deepzoo.zoo.errors import RequestError, WeightError
from deepzoo.zoo.fingerprint import fingerprint


def test_a_bare_name_is_a_shipped_model_and_a_path_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shards.copy_case(GOLDEN / "qwen2_tied", tmp_path / "shipped" / "tiny")
    shards.copy_case(GOLDEN / "qwen2_untied", tmp_path / "here" / "tiny")
    monkeypatch.setattr(catalog, "PRETRAINED", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path / "here")
    assert zoo.load("tiny").config.tie_word_embeddings
    assert zoo.load("TINY").name == "tiny"
    for path in ("./tiny", Path("tiny"), str(tmp_path / "here" / "tiny"), "../here/tiny"):
        model = zoo.load(path)
        assert not model.config.tie_word_embeddings
        assert (model.name, model.source) == ("tiny", tmp_path / "here" / "tiny")
        assert model.tokenizer is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing-here", "no such directory, and no model of that name ships"),
        ("./nothing/here", "no such directory"),
        (Path("org/name"), "no such directory"),
        ("org/name", "to fetch org/name from the hub pass download=True"),
        ("deepseek-r1", "to fetch deepseek-ai/DeepSeek-R1 from the hub pass download=True"),
    ],
)
def test_a_source_that_is_nothing(source: str | Path, message: str):
    with pytest.raises(WeightError, match=message):
        zoo.load(source)


def test_a_directory_may_be_reached_through_a_link(tmp_path: Path):
    (tmp_path / "link").symlink_to(GOLDEN / "qwen2_tied")
    assert zoo.load(tmp_path / "link").source == GOLDEN / "qwen2_tied"


def test_options_that_cannot_be():
    with pytest.raises(RequestError, match="a model can be cast to bfloat16 or float32"):
        zoo.load(GOLDEN / "qwen2_tied", dtype="float16")
    with pytest.raises(RequestError, match="pass mesh="):
        zoo.load(GOLDEN / "qwen2_tied", rules={"vocab": "tensor"})


@pytest.mark.parametrize("stacked", [True, False])
def test_filling_blocks_on_the_device_gives_the_same(
    stacked: bool, monkeypatch: pytest.MonkeyPatch
):
    """The way of accelerators, taken here in pieces of 1,000 bytes."""
    expected = fingerprint(zoo.load(GOLDEN / "v3_fp8", stacked=stacked).params)
    monkeypatch.setattr(assemble, "_IN_PLACE", ())
    monkeypatch.setattr(assemble, "_PIECE", 1000)
    assert fingerprint(zoo.load(GOLDEN / "v3_fp8", stacked=stacked).params) == expected


def test_each_device_gets_its_own_block_and_nothing_else():
    child.run(
        """
        import sys
        from pathlib import Path
        import jax, numpy as np
        from deepzoo import zoo

        golden = Path(sys.argv[1])
        devices = np.array(jax.devices())
        mesh = jax.sharding.Mesh(devices.reshape(2, 2, 2), ("expert", "fsdp", "tensor"))
        cast = {"quantized": False, "dtype": "float32", "stacked": True}
        for case, options in (("v3_fp8", cast), ("v3_fp8", {}), ("qwen2_untied", {})):
            plain = zoo.load(golden / case, **options)
            model = zoo.load(golden / case, mesh=mesh, **options)
            want = zoo.shardings(plain.config, mesh, stacked=options.get("stacked", False))
            leaves = [jax.tree.leaves(tree) for tree in (model.params, want, plain.params)]
            for x, s, whole in zip(*leaves, strict=True):
                assert x.sharding == s
                for shard in x.addressable_shards:
                    assert shard.data.shape == s.shard_shape(x.shape)
                    expected = np.asarray(whole)[shard.index]
                    assert np.asarray(shard.data).tobytes() == expected.tobytes()
        one = zoo.load(golden / "v3_fp8", mesh=mesh, rules={"vocab": "fsdp"})
        divided = [x for x in jax.tree.leaves(one.params) if not x.is_fully_replicated]
        assert [tuple(x.sharding.spec) for x in divided] == [("fsdp", None)] * 2
        """,
        str(GOLDEN),
        devices=8,
    )


@pytest.mark.parametrize("case", ["v3_like", "v3_fp8"])
@pytest.mark.parametrize("options", [{}, {"quantized": False}, {"mtp": False}], ids=str)
def test_progress_counts_every_byte_once(case: str, options: dict[str, Any]):
    seen: list[tuple[int, int]] = []
    zoo.load(GOLDEN / case, progress=lambda done, total: seen.append((done, total)), **options)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) > 50 and {total for _, total in seen} == {seen[-1][0]}


def test_an_interrupted_load_leaves_nothing(tmp_path: Path):
    directory = shards.copy_case(GOLDEN / "v3_like", tmp_path / "x")
    before = len(os.listdir("/dev/fd"))

    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with shards.unchanged(tmp_path), pytest.raises(KeyboardInterrupt):
        zoo.load(directory, progress=interrupt)
    assert len(os.listdir("/dev/fd")) == before
