"""`deepzoo doctor`: no check may lie, so each one is given a machine on which it must say no."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import jax
import pytest

from deepzoo.kernels import dispatch
from deepzoo.zoo import catalog, cli, doctor, machine, probe
from deepzoo.zoo.doctor import Finding, Size
from deepzoo.zoo.machine import Backend, Device, Gpu, Machine

CPU = Backend(platform="cpu", devices=(Device(kind="cpu", platform="cpu"),))
GOOD = Machine(
    system="Linux x86_64",
    python="3.12.4",
    requires_python=">=3.12",
    requirements=(
        "jax<0.13,>=0.11.2", "rich>=14", 'pyarrow>=21; extra == "parquet"',
        'matplotlib>=3.10; extra == "notebooks"', 'jupyterlab>=4; extra == "notebooks"',
    ),
    jax_requirements=(
        "jaxlib<=0.12.0,>=0.11.2", "numpy>=2.2",
        'jaxlib<=0.12.0,>=0.12.0; extra == "cuda13"',
        'jax-cuda13-plugin[with-cuda]<=0.12.0,>=0.12.0; extra == "cuda13"',
        'jax-cuda13-plugin<=0.12.0,>=0.12.0; extra == "cuda13-local"',
    ),
    installed={
        "deepzoo": "0.1.0", "jax": "0.12.0", "jaxlib": "0.12.0", "numpy": "2.5.0", "rich": "15.0.0",
        "pyarrow": "22.0", "matplotlib": "3.11",
    },
    backend=CPU,
    gpus=(),
    memory=20 << 30,
    cache="~/hub",
    disk=50 << 30,
    writable=True,
    sandbox=None,
    settings={},
)  # fmt: skip
SIZES = (Size("small", 10 << 30, 16 << 30, 11 << 30, 1 << 30), Size("big", *[100 << 30] * 4))
H200 = Gpu(name="NVIDIA H200", driver="580.65.06", capability="9.0")


def gpu(capability: str | None = "9.0", **more) -> Backend:
    device = Device(
        kind="NVIDIA H200", platform="gpu", capability=capability, free=100 << 30, **more
    )
    return Backend(platform="gpu", devices=(device, device))


def changed(**fields) -> Machine:
    return dataclasses.replace(GOOD, **fields)


def with_installed(**versions: str | None) -> Machine:
    found = {**GOOD.installed, **{n.replace("_", "-"): v for n, v in versions.items()}}
    return changed(installed={n: v for n, v in found.items() if v is not None})


def told(found: Machine, topic: str) -> list[Finding]:
    return [f for f in doctor.diagnose(found, SIZES) if f.topic == topic]


def test_a_good_machine_has_nothing_to_be_done():
    found = doctor.diagnose(GOOD, SIZES)
    assert [f for f in found if f.todo] == []
    assert {f.status for f in found if f.topic != "models"} == {"ok"}
    assert doctor.works(found)


@pytest.mark.parametrize(
    ("broken", "topic", "text", "todo"),
    [
        (changed(python="3.11.9"), "python", "3.11.9", "use Python >=3.12"),
        (with_installed(jax="0.11.1"), "packages", "jax is 0.11.1, not <0.13", "'jax<0.13,>=0.11"),
        (with_installed(jax="0.13.0"), "packages", "jax is 0.13.0", "pip install 'jax"),
        (with_installed(jax=None), "packages", "jax is not installed, deepzoo", "pip install"),
        (with_installed(jaxlib="0.11.1"), "packages", "jaxlib is 0.11.1", "'jaxlib<=0.12.0"),
        (with_installed(rich=None), "packages", "rich is not installed", "'rich>=14'"),
        (changed(backend="Aborted (signal 6)"), "jax", "Aborted (signal 6)", "jax.devices()"),
        (changed(backend=Backend(platform="cpu", devices=())), "jax", "no device", "JAX_PLATFORMS"),
        (changed(backend=gpu(wrong="wrong products in bfloat16")), "devices", "wrong products", ""),
        (changed(backend=dataclasses.replace(CPU, model="says 20")), "model", "says 20", "reinsta"),
        (changed(backend=gpu(kernels={"triton": "no ptxas"})), "kernels", "triton kernel", "xla"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_essential_fails(broken: Machine, topic: str, text: str, todo: str):
    findings = doctor.diagnose(broken, SIZES)
    assert not doctor.works(findings)
    (failed,) = [f for f in findings if f.status == "fail"]
    assert failed.topic == topic and text in failed.text and todo in failed.todo


CUDA = with_installed(jax_cuda13_plugin="0.12.0")


@pytest.mark.parametrize(
    ("found", "reason", "todo"),
    [
        (GOOD, "no CUDA plugin", "deepzoo[cuda]"),
        (with_installed(jax_cuda13_plugin="0.11.2"), "not of JAX's version", "plugin<=0.12.0"),
        (dataclasses.replace(CUDA, settings={"JAX_PLATFORMS": "cpu"}), "=cpu", "unset JAX_PLAT"),
        (dataclasses.replace(CUDA, settings={"CUDA_VISIBLE_DEVICES": ""}), "=''", "unset CUDA_V"),
        (dataclasses.replace(CUDA, settings={"JAX_PLATFORMS": "cuda"}), "no reason", "devices()"),
    ],
)
def test_a_gpu_that_jax_does_not_use_is_explained(found: Machine, reason: str, todo: str):
    (line,) = told(dataclasses.replace(found, gpus=(H200,)), "gpu")
    assert line.status == "off" and reason in line.text and todo in line.todo
    assert told(found, "gpu") == []  # none is there
    assert told(dataclasses.replace(found, gpus=(H200,), backend=gpu()), "gpu") == []  # in use


def test_old_drivers_and_gpus_are_named():
    old = Gpu(name="NVIDIA T", driver="570.1", capability="7.0")
    (line,) = told(dataclasses.replace(CUDA, gpus=(old,)), "gpu")
    assert "driver 570.1, jax-cuda13-plugin needs driver 580" in line.text
    assert "below 7.5" in line.text


def test_a_plugin_must_be_the_one_that_jax_asks_for():
    assert [f.status for f in told(CUDA, "cuda")] == ["ok"]
    (line,) = told(with_installed(jax_cuda13_plugin="0.12.0.1"), "cuda")
    assert line.status == "off" and "'jax-cuda13-plugin<=0.12.0,>=0.12.0'" in line.todo


def test_forms_are_those_that_dispatch_chooses(monkeypatch: pytest.MonkeyPatch):
    for capability in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(
            dispatch, "compute_capability", lambda capability=capability: capability
        )
        allowed = ["xla"]
        allowed = allowed if dispatch.ampere_or_newer() else ["triton", *allowed]
        allowed = allowed if dispatch.hopper_only() else ["mosaic", *allowed]
        assert doctor.forms(capability) == tuple(allowed)


def test_kernels_of_each_gpu():
    def line(capability: str | None) -> Finding:
        (found,) = told(changed(backend=gpu(capability)), "kernels")
        return found

    assert "sm_90) gets mosaic, triton, xla" in line("9.0").text
    assert "sm_80) gets triton, xla" in line("8.0").text
    assert line("7.5").status == "off" and "XLA alone" in line("7.5").text
    assert line(None).status == "off"
    # A form that this GPU lacks cannot fail on it.
    lacks = gpu("8.0", kernels={"mosaic": "needs a Hopper GPU", "triton": None})
    assert [f.status for f in told(changed(backend=lacks), "kernels")] == ["ok"]


def test_models_that_fit_are_counted_with_their_cache():
    published, wide = told(changed(memory=16 << 30), "models")
    assert published.text.startswith("1 of 2 fit the host as published, the largest small (10.0")
    assert "big needs 200.0 GiB" in published.text
    assert wide.status == "off" and wide.text.startswith("0 of 2") and "small needs 17" in wide.text
    # Two GPUs hold a model together, and the host's memory is then of no interest.
    (both,) = told(changed(backend=gpu(), memory=1), "models")
    assert both.text == (
        "2 of 2 fit 2 GPUs as published and in bfloat16, the largest big (100.0 GiB)"
    )
    assert told(changed(memory=None), "models") == []


def test_sizes_are_the_published_ones():
    by_name = {size.name: size for size in doctor.catalog_sizes()}
    assert set(by_name) == {n for n in catalog.models() if catalog.card(n).repo}
    r1 = by_name["deepseek-r1"]
    # 671.0B parameters, one byte each but for 1.96B in bfloat16; the files hold the MTP layer too.
    assert r1.bfloat16 == 2 * 671_026_419_200 + 2 * 58 * 256  # router biases are float32
    assert 671.0e9 < r1.published < 675e9 < r1.files < 700e9
    assert r1.cache == 4096 * 61 * 576 * 2


@pytest.mark.parametrize(
    ("off", "topic", "text"),
    [
        (changed(writable=False), "disk", "cannot be written"),
        (changed(disk=1 << 30), "disk", "any one of 0 of 2"),
        (changed(sandbox="no user namespaces"), "sandbox", "no user namespaces"),
        (with_installed(pyarrow=None), "extras", "no Parquet files"),
        (with_installed(matplotlib="3.9"), "extras", "matplotlib is 3.9, not >=3.10"),
        (changed(settings={"HF_HUB_OFFLINE": "1"}), "hub", "HF_HUB_OFFLINE=1"),
        (changed(settings={"TRANSFORMERS_OFFLINE": "true"}), "hub", "TRANSFORMERS_OFFLINE"),
        (changed(memory=None), "memory", "does not tell"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_off_leaves_the_rest_working(off: Machine, topic: str, text: str):
    found = [f for f in told(off, topic) if f.status == "off"]
    assert len(found) == 1 and text in found[0].text
    assert doctor.works(doctor.diagnose(off, SIZES))


def test_free_memory_is_the_least_of_host_and_container(tmp_path: Path):
    for folder in ("proc", "sys/fs/cgroup"):
        (tmp_path / folder).mkdir(parents=True)
    assert machine.free_memory(tmp_path) is None
    (tmp_path / "proc/meminfo").write_text("MemTotal: 100 kB\nMemAvailable:  64 kB\n")
    assert machine.free_memory(tmp_path) == 64 << 10
    group = tmp_path / "sys/fs/cgroup"
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("5\n")
    assert machine.free_memory(tmp_path) == 64 << 10
    (group / "memory.max").write_text("1005\n")
    assert machine.free_memory(tmp_path) == 1000


def test_the_driver_s_table_is_read():
    listed = "NVIDIA H200, 580.65.06, 9.0\nNVIDIA A100-SXM4-80GB, 580.65.06, 8.0\n"
    assert machine.gpus(listed)[0] == H200
    assert [g.capability for g in machine.gpus(listed)] == ["9.0", "8.0"]
    assert machine.gpus("No devices were found\n") == ()


def test_the_cache_folder_is_the_hub_s_own():
    from huggingface_hub.constants import HF_HUB_CACHE

    assert machine._cache_folder(os.environ) == Path(HF_HUB_CACHE)
    assert machine._cache_folder({"HF_HOME": "/a"}) == Path("/a/hub")


def test_a_child_that_dies_or_hangs_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "dies.py").write_text("import os\nos.abort()\n")
    (tmp_path / "fails.py").write_text("import sys\nsys.exit('no driver')\n")
    (tmp_path / "hangs.py").write_text("import time\ntime.sleep(60)\n")
    assert machine.ask("dies") == "it said nothing (signal 6)"
    assert machine.ask("fails") == "no driver (status 1)"
    assert machine.ask("hangs", seconds=0.5) == "no answer within 0.5 s"


def test_wrong_products_and_kernels_are_seen(monkeypatch: pytest.MonkeyPatch):
    assert probe.products() is None
    monkeypatch.setattr(jax, "jit", lambda f: lambda *a: f(*a) + (a[0].dtype == "bfloat16"))
    assert probe.products() == "wrong products in bfloat16"


def test_a_kernel_is_compared_with_float64():
    off = probe.error("mosaic", interpret=True)
    assert 1e-6 < off < 5e-3  # rounded to bfloat16, so not 0
    assert probe.judged(off) is None
    assert probe.judged(0.1) == "an FP8 product is off by 10.0% of its largest value"
    assert "nan" in str(probe.judged(float("nan")))


def test_this_machine(capsys: pytest.CaptureFixture[str]):
    status = cli.main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (status, found["works"]) == (0, True), found["findings"]
    facts = found["machine"]
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["installed"]["jax"] == jax.__version__
    assert {d["platform"] for d in facts["backend"]["devices"]} == {jax.default_backend()}
    topics = [finding["topic"] for finding in found["findings"]]
    for topic in ("python", "packages", "devices", "model", "kernels", "memory", "models", "disk"):
        assert topic in topics


def test_the_report_ends_with_what_it_amounts_to(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        machine, "look", lambda: with_installed(rich=None, pyarrow=None, matplotlib=None)
    )
    monkeypatch.setattr(doctor, "catalog_sizes", lambda: SIZES)
    assert cli.main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "fail  packages  rich is not installed, deepzoo needs it" in lines
    assert "                -> pip install 'rich>=14'" in lines
    assert lines[-1] == "deepzoo does not work here: packages; 2 things are off."
