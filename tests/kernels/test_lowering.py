"""T1: every case and form is lowered for CUDA with plain jax, for GPUs that are not there."""

import contextlib
from collections.abc import Iterator

import child
import jax
import jax.numpy as jnp
import pytest

from deepzoo.kernels import cases
from deepzoo.kernels.cases import Case
from deepzoo.kernels.dispatch import Form, UnsupportedError, dispatch

KINDS = {"h200": ("NVIDIA H200", 132), "a100": ("NVIDIA A100-SXM4-80GB", 108)}
CALLS = {"triton": "__gpu$xla.gpu.triton", "mosaic": "mosaic_gpu_v2"}


@contextlib.contextmanager
def traced_for(gpu: str) -> Iterator[None]:
    """What is traced inside is traced for a GPU of this kind."""
    kind, cores = KINDS[gpu]
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=cores, platform="gpu")
    mesh = jax.sharding.AbstractMesh(
        (1,), ("x",), (jax.sharding.AxisType.Explicit,), abstract_device=device
    )
    with jax.sharding.use_abstract_mesh(mesh):
        yield


ALL = [case for operation in cases.operations() for case in cases.cases(operation)]


def _own(forms: tuple[str, ...]) -> list[str]:
    return [form for form in forms if form in ("xla", "triton", "mosaic")]


def _jobs() -> list:
    return [
        pytest.param(case, form, gpu, id=f"{case.operation}-{case.name}-{form}-{gpu}")
        for case in ALL
        for form in _own(case.forms)
        for gpu in KINDS
        if not (gpu == "a100" and form == "mosaic")
    ]


def _calls(text: str) -> set[str]:
    return {form for form, call in CALLS.items() if call in text}


@pytest.mark.parametrize(("case", "form", "gpu"), _jobs())
def test_lowers_for_cuda(case: Case, form: str, gpu: str):
    inputs = case.abstract()
    with traced_for(gpu):
        try:
            traced = jax.jit(case.bind(form)).trace(*inputs)
        except UnsupportedError as error:
            if gpu == "h200":  # a case lists the forms that are worth something there
                raise
            pytest.skip(f"refused on {gpu}: {error}")
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # A Mosaic form may leave the small rest (a combine step) to Triton, but not the other way.
    assert _calls(text) - ({"triton"} if form == "mosaic" else set()) == {form} - {"xla"}


def _with_kernels() -> list:
    """One case of each operation that has a kernel for GPUs."""
    first = {case.operation: case for case in reversed(ALL) if set(case.forms) & set(CALLS)}
    return [pytest.param(case, id=operation) for operation, case in first.items()]


@pytest.mark.parametrize("case", _with_kernels())
def test_one_traced_program_lowers_for_both(case: Case):
    with traced_for("h200"):
        traced = jax.jit(case.bind("auto")).trace(*case.abstract())
        cuda = traced.lower(lowering_platforms=("cuda",)).as_text()
        cpu = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert _calls(cuda) and not _calls(cpu)


@pytest.mark.parametrize("case", _with_kernels())
def test_a_named_form_says_which_platform_it_needs(case: Case):
    for form in set(case.forms) & set(CALLS):
        with traced_for("h200"), pytest.raises(UnsupportedError, match="NVIDIA GPUs only"):
            jax.jit(case.bind(form)).trace(*case.abstract()).lower(lowering_platforms=("cpu",))


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=f"{c.operation}-{c.name}") for c in ALL if "mosaic" in c.forms]
)
def test_mosaic_forms_are_for_hopper(case: Case):
    with traced_for("a100"), pytest.raises(UnsupportedError, match=r"needs a Hopper GPU.*sm_80"):
        jax.jit(case.bind("mosaic")).trace(*case.abstract())
    with pytest.raises(UnsupportedError, match="no GPU is known"):
        jax.jit(case.bind("mosaic")).trace(*case.abstract())


# The choice itself, with forms that add different numbers.


def _forms(*triton_reasons: str) -> dict[str, Form]:
    return {
        "triton": Form(lambda x: x + 2, lambda: list(triton_reasons)),
        "xla": Form(lambda x: x + 1, lambda: []),
    }


def _added(implementation: str, *reasons: str, platform: str) -> str:
    def run(x: jax.Array) -> jax.Array:
        return dispatch("add", implementation, _forms(*reasons), x)  # pyright: ignore[reportArgumentType]

    x = jax.ShapeDtypeStruct((), jnp.float32)
    text = jax.jit(run).trace(x).lower(lowering_platforms=(platform,)).as_text()
    return "triton" if "2.000000e+00" in text else "xla" if "1.000000e+00" in text else "none"


def test_choice_by_platform_and_refusals():
    assert _added("auto", platform="cuda") == "triton"
    assert _added("auto", platform="cpu") == "xla"
    assert _added("auto", "a reason", platform="cuda") == "xla"
    assert _added("xla", platform="cuda") == "xla"
    assert _added("triton", platform="cuda") == "triton"
    with pytest.raises(UnsupportedError, match=r"'triton' runs on NVIDIA GPUs only"):
        _added("triton", platform="cpu")


DIVIDED = """
import warnings
warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated")
import jax, jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from deepzoo.kernels.dispatch import Form, dispatch
from deepzoo.kernels.grouped_matmul import grouped_matmul

forms = {
    "triton": Form(lambda x: x + 2, lambda: []), "xla": Form(lambda x: x + 1, lambda: []),
}
mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

def lowered(run, *arrays, spec=P("a"), on=mesh):
    structs = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(on, spec)) for a in arrays
    ]
    return jax.jit(run).trace(*structs).lower(lowering_platforms=("cuda",)).as_text()

def found(run, **options):
    text = lowered(run, jnp.zeros(4), **options)
    return "triton" if "2.000000e+00" in text else "xla" if "1.000000e+00" in text else "none"

def auto(x):
    return dispatch("add", "auto", forms, x)

one = jax.make_mesh((1,), ("a",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
print(found(auto), found(auto, on=one), found(jax.vmap(auto)))
spec = P(("a", "b"))
whole = jax.shard_map(auto, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
part = jax.shard_map(
    auto, mesh=mesh, in_specs=P("a"), out_specs=P("a"), axis_names={"a"}, check_vma=False
)
print(found(whole), found(part))
try:
    found(lambda x: dispatch("add", "triton", forms, x))
except ValueError as error:
    print(type(error).__name__, error)

x, w = jnp.zeros((256, 128), jnp.bfloat16), jnp.zeros((4, 128, 128), jnp.bfloat16)
sizes = jnp.zeros((4,), jnp.int32)
gradient = jax.grad(lambda x, w, sizes: grouped_matmul(x, w, sizes).sum().astype(float), (0, 1))
print("__gpu$xla.gpu.triton" in lowered(gradient, x, w, sizes))
try:
    lowered(gradient, x, w, sizes, on=one)
except RuntimeError as error:  # of Pallas, which asks which GPU it is
    print(error)
"""


def test_no_kernel_where_the_partitioner_would_have_to_cut_it():
    lines = child.run(DIVIDED, devices=4).stdout.splitlines()
    assert lines[0] == "xla triton xla"
    assert lines[1] == "triton xla"  # in a shard_map over all axes, and over one of two
    assert lines[2].startswith("UnsupportedError add: implementation='triton' cannot be divided")
    assert lines[3] == "False"
    assert "No supported GPU devices found" in lines[4]


def test_refusals_list_every_reason():
    with pytest.raises(UnsupportedError, match=r"cannot run this: first reason; second reason"):
        _added("triton", "first reason", "second reason", platform="cuda")
    with pytest.raises(UnsupportedError, match=r"no implementation 'mosaic'; it has auto, triton"):
        _added("mosaic", platform="cuda")
    with pytest.raises(UnsupportedError, match=r"'cuda' \(no implementation at all\)"):
        _added("cuda", platform="cuda")
