"""Host memory while loading: what the devices of this host hold, and a little more.

The checkpoints have the tensor dimensions of the 671B models and a few layers of them. A child
process loads them onto eight forced CPU devices, whose memory is this host's, and reads the high
water mark of its own memory from the kernel.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import child
import pytest
import synthetic

from deepzoo import zoo

MB = 1 << 20
LIMIT = 192 * MB
"""Allowed beyond the shards themselves: a tenth of the largest tensor (the embedding, 1.85 GB)."""

LOAD = """
    import gc, json, sys
    import jax, numpy as np
    from deepzoo import zoo
    from deepzoo.zoo import names
    import synthetic

    def high_water():
        for line in open("/proc/self/status"):
            if line.startswith("VmHWM"):
                return int(line.split()[1]) << 10

    small, large, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    shape = options.pop("mesh")
    mesh = None
    if shape:
        devices = np.array(jax.devices()).reshape(list(shape.values()))
        mesh = jax.sharding.Mesh(devices, tuple(shape))
    zoo.load(small, mesh=mesh, **options)  # imports, threads, first compilations
    gc.collect()
    before = high_water()
    model = zoo.load(large, mesh=mesh, **options)
    peak = high_water() - before
    flat = dict(names.flatten(model.params))
    held = sum(s.data.nbytes for x in flat.values() for s in x.addressable_shards)
    whole = sum(x.nbytes for x in flat.values())

    # Each device has its own block, and the block has the published values.
    rng = np.random.default_rng(0)
    checked = 0
    for leaf in names.leaves(model.config, stacked=options.get("stacked", False)).values():
        for tensor in (leaf.tensors[0], leaf.tensors[-1]):
            if not options.get("quantized", True) and tensor.kind == "linear":
                continue
            for shard in flat[tensor.path].addressable_shards:
                bounds = [s.indices(n) for s, n in zip(shard.index, leaf.shape)]
                lead = len(tensor.index)
                if not all(a <= i < b for i, (a, b, _) in zip(tensor.index, bounds)):
                    continue
                local = tuple(i - a for i, (a, _, _) in zip(tensor.index, bounds))
                block = np.asarray(shard.data)[local]
                row = int(rng.integers(block.shape[0]))
                column = bounds[lead + 1] if len(tensor.shape) == 2 else (0, 1, 1)
                width = tensor.shape[1] if len(tensor.shape) == 2 else 1
                start = (bounds[lead][0] + row) * width + column[0]
                want = synthetic.values(tensor, start, column[1] - column[0])
                assert np.array_equal(np.atleast_1d(block[row]), want), tensor
                checked += 1
    print(json.dumps({"peak": peak, "held": held, "whole": whole, "checked": checked}))
"""


def config(**changes):
    """R1's dimensions, with few layers and without the MTP layer."""
    few = {"num_nextn_predict_layers": 0, "first_k_dense_replace": 1, "num_hidden_layers": 2}
    few |= {"n_routed_experts": 16, "n_group": 1, "topk_group": 1}
    return dataclasses.replace(zoo.config("deepseek-r1"), **(few | changes))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture, a few megabytes."""
    directory = tmp_path_factory.mktemp("small")
    few = {"hidden_size": 256, "vocab_size": 512, "intermediate_size": 256}
    few |= {"moe_intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 8}
    synthetic.write(directory, config(**few, q_lora_rank=128, kv_lora_rank=128), 1 << 30)
    return directory


def measure(small: Path, large: Path, options: dict) -> dict:
    """What the child prints."""
    helpers = {"PYTHONPATH": str(Path(synthetic.__file__).parent)}
    done = child.run(LOAD, str(small), str(large), json.dumps(options), devices=8, env=helpers)
    return json.loads(done.stdout)


FSDP = {"expert": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory):
    """3.4 GB: one dense layer, one layer with 16 experts, the whole vocabulary (1.85 GB)."""
    directory = tmp_path_factory.mktemp("large")
    total = synthetic.write(directory, config(tie_word_embeddings=True), 10**9)
    assert total > 3.2e9
    yield directory
    shutil.rmtree(directory)


@pytest.mark.parametrize("stacked", [False, True])
def test_sharded_load_of_3_gb_needs_little_more_than_the_shards(
    small: Path, large: Path, stacked: bool
):
    found = measure(small, large, {"mesh": FSDP, "stacked": stacked})
    extra = found["peak"] - found["held"]
    print(f"{found['held'] / MB:.0f} MB of shards, {extra / MB:.0f} MB more at the peak")
    assert found["checked"] > 100
    assert extra < LIMIT


def test_load_on_one_device_needs_little_more_than_the_weights(small: Path, large: Path):
    found = measure(small, large, {"mesh": None})
    extra = found["peak"] - found["held"]
    print(f"{found['held'] / MB:.0f} MB of weights, {extra / MB:.0f} MB more at the peak")
    assert found["held"] == found["whole"]
    assert extra < LIMIT


def test_dequantising_while_loading_keeps_no_second_copy(
    small: Path, tmp_path_factory: pytest.TempPathFactory
):
    """1.2 GB of FP8 become 2.4 GB of bfloat16; neither exists twice."""
    directory = tmp_path_factory.mktemp("fp8")
    synthetic.write(directory, config(vocab_size=4096, n_routed_experts=8), 10**9)
    found = measure(small, directory, {"mesh": FSDP, "quantized": False, "stacked": True})
    shutil.rmtree(directory)
    extra = found["peak"] - found["held"]
    print(f"{found['held'] / MB:.0f} MB of shards, {extra / MB:.0f} MB more at the peak")
    assert found["whole"] > 2.2e9
    assert extra < LIMIT
