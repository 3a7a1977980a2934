"""Which form of an operation runs: chosen when a program is lowered; no silent fallback.

An operation has up to four forms: `xla` (every platform), `triton` (NVIDIA GPUs from sm_80 on),
`mosaic` (Hopper, sm_90) and, as a baseline of others, `tokamax`. With `implementation="auto"` the
traced program holds a branch for CUDA and one for everything else, and lowering keeps the one it
needs: the same traced program lowers right for both. Within CUDA the first form that does not
refuse is taken, by shapes, dtypes and the compute capability of the GPU the program is traced for.

XLA's partitioner cannot cut a kernel. In a program that it spreads over several devices (a mesh,
outside of a `shard_map` over all its axes, with check_vma=False) "auto" is therefore the XLA form,
and a kernel that is named is refused; this too is decided when the program is lowered.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

Implementation = Literal["auto", "xla", "triton", "mosaic", "tokamax"]


class UnsupportedError(ValueError):
    """A form was asked for by name and cannot run here; the message lists every reason."""


class Form(NamedTuple):
    """One implementation of an operation, for arguments that are already known.

    run: arrays -> result, of the same shapes and dtypes for every form. Imports its backend itself:
        the run of a GPU form is called, and traced, only when a program is lowered for CUDA.
    refusals: () -> every reason why it cannot run these arguments, in words; none if it can.
    """

    run: Callable[..., Any]
    refusals: Callable[[], list[str]]


def dispatch(
    operation: str,
    implementation: Implementation,
    forms: Mapping[str, Form],
    *arrays: Any,
    interpret: bool = False,
) -> Any:
    """Runs `operation` on `arrays` in the form that `implementation` names.

    Args:
        operation: its name, for messages.
        implementation: "auto" or one of `forms`.
        forms: by name, best first for a GPU; must hold "xla", which refuses nothing.
        arrays: traced arguments (pytrees), passed to the form's `run`.
        interpret: whether the named form runs in Pallas's interpreter; then it lowers for any
            platform. The form's `run` was built by the caller with the same flag.

    Raises:
        UnsupportedError: the named form cannot run these arguments, or there is no such form.
    """
    if implementation == "auto":
        if interpret:
            raise UnsupportedError(f"{operation}: interpret=True needs a named implementation")
        gpu = next(name for name, form in forms.items() if name == "xla" or not form.refusals())
        if gpu == "xla":
            return forms["xla"].run(*arrays)
        xla = forms["xla"].run
        kernel = _later(forms[gpu].run, xla, xla)
        return jax.lax.platform_dependent(*arrays, cuda=kernel, default=xla)
    if implementation not in forms:
        known = ", ".join(("auto", *forms))
        more = "" if implementation in get_args(Implementation) else " (no implementation at all)"
        raise UnsupportedError(
            f"{operation} has no implementation {implementation!r}{more}; it has {known}"
        )
    form = forms[implementation]
    if reasons := form.refusals():
        raise UnsupportedError(
            f"{operation}: implementation={implementation!r} cannot run this: {'; '.join(reasons)}"
        )
    if implementation == "xla" or interpret:
        return form.run(*arrays)
    like = forms["xla"].run
    divided = (
        f"{operation}: implementation={implementation!r} cannot be divided by XLA's partitioner,"
        " and this program runs on several devices; 'auto' and 'xla' can, and a shard_map over all"
        " axes of the mesh runs the kernel on each device's part"
    )
    return jax.lax.platform_dependent(
        *arrays, cuda=_later(form.run, like, divided),
        default=_refuse(operation, implementation, like),
    )  # fmt: skip


# Both are primitives so that nothing of a kernel is imported or traced until a program is lowered
# for CUDA: on a CPU, tracing every kernel of a model takes longer than compiling the rest of it.
_kernel_p, _refuse_p = Primitive("gpu_kernel"), Primitive("refuse_to_lower")
_kernel_p.multiple_results = _refuse_p.multiple_results = True


def _later(
    run: Callable[..., Any], like: Callable[..., Any], divided: Callable[..., Any] | str
) -> Callable[..., Any]:
    """`run`, traced when it is lowered for CUDA; `like` has results of the same shapes.

    divided: what runs in its place where the partitioner would have to cut it, or why nothing does.
    """

    def bind(*arrays: Any) -> Any:
        leaves, tree = jax.tree.flatten(arrays)
        out, out_tree = jax.tree.flatten(jax.eval_shape(like, *arrays))

        def flat(form: Callable[..., Any]) -> Callable[..., list[Any]]:
            return lambda *leaves: jax.tree.leaves(form(*tree.unflatten(leaves)))

        other = divided if isinstance(divided, str) else flat(divided)
        return out_tree.unflatten(
            _kernel_p.bind(*leaves, run=(flat(run), other), shapes=_shapes(out))
        )

    return bind


def _refuse(operation: str, implementation: str, like: Callable[..., Any]) -> Callable[..., Any]:
    """A stand-in that raises as soon as it is lowered; `like` has results of the same shapes."""
    message = (
        f"{operation}: implementation={implementation!r} runs on NVIDIA GPUs only; 'auto' and"
        " 'xla' run everywhere, and interpret=True runs the kernel in Pallas's interpreter"
    )

    def bind(*arrays: Any) -> Any:
        out, tree = jax.tree.flatten(jax.eval_shape(like, *arrays))
        leaves = jax.tree.leaves(arrays)
        return tree.unflatten(_refuse_p.bind(*leaves, run=message, shapes=_shapes(out)))

    return bind


def _shapes(out: list[Any]) -> tuple:
    return tuple((a.shape, a.dtype) for a in out)


def _abstract(*_: Any, run: Any, shapes: tuple) -> list[ShapedArray]:
    return [ShapedArray(shape, dtype) for shape, dtype in shapes]


def _lower_kernel(context: Any, *arrays: Any, run: tuple, shapes: tuple) -> Any:
    kernel, divided = run
    if not _is_partitioned(context.module_context.axis_context):
        return mlir.lower_fun(kernel, multiple_results=True)(context, *arrays)
    if isinstance(divided, str):
        raise UnsupportedError(divided)
    return mlir.lower_fun(divided, multiple_results=True)(context, *arrays)


def _is_partitioned(axes: Any) -> bool:
    """Whether the partitioner would have to cut what is lowered here: several devices, and not
    inside a `shard_map` over every axis."""
    if (mesh := getattr(axes, "mesh", None)) is not None:  # in a shard_map
        return mesh.size > 1 and frozenset(axes.manual_axes) != frozenset(mesh.axis_names)
    return getattr(axes, "num_devices", 1) > 1


def _lower_refusal(context: Any, *arrays: Any, run: Any, shapes: tuple) -> Any:
    raise UnsupportedError(run)


def _batched(primitive: Primitive, arrays: Any, axes: Any, *, run: Any, shapes: tuple) -> tuple:
    size = next(a.shape[d] for a, d in zip(arrays, axes, strict=True) if d is not None)
    wider = tuple(((size, *shape), dtype) for shape, dtype in shapes)
    if not isinstance(run, str):
        run = tuple(f if isinstance(f, str) else jax.vmap(f, in_axes=tuple(axes)) for f in run)
    return primitive.bind(*arrays, run=run, shapes=wider), [0] * len(shapes)


for _primitive, _lower in ((_kernel_p, _lower_kernel), (_refuse_p, _lower_refusal)):
    _primitive.def_abstract_eval(_abstract)
    mlir.register_lowering(_primitive, _lower)
    batching.primitive_batchers[_primitive] = partial(_batched, _primitive)


# Compute capability by the name of a device that JAX describes without one (an AbstractDevice).
_BY_KIND = {"H100": (9, 0), "H200": (9, 0), "H800": (9, 0), "H20": (9, 0), "GH200": (9, 0)}
_BY_KIND |= {"A100": (8, 0), "B200": (10, 0), "GB200": (10, 0)}


def compute_capability() -> tuple[int, int] | None:
    """(major, minor) of the NVIDIA GPU that this program is traced for, or None if none is known.

    It is the default device's (`jax.default_device`, also a device of a compile-only topology), the
    ambient abstract mesh's, or the first GPU's, in this order.
    """
    device = jax.config.jax_default_device
    if device is None:
        abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
        if abstract is not None:
            words = str(abstract.device_kind).replace("-", " ").split()
            return next((_BY_KIND[word] for word in words if word in _BY_KIND), None)
        if jax.default_backend() != "gpu":
            return None
        device = jax.devices()[0]
    text = getattr(device, "compute_capability", None)
    if text is None:
        return None
    major, minor = str(text).split(".")
    return int(major), int(minor)


def core_count() -> int:
    """Streaming multiprocessors of the GPU that is traced for; an H100's where none is known."""
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None and abstract.num_cores:
        return abstract.num_cores
    device = jax.config.jax_default_device
    if device is None and jax.default_backend() == "gpu":
        device = jax.devices()[0]
    return getattr(device, "core_count", None) or 132


def hopper_only() -> list[str]:
    """The refusal of a Mosaic form that uses Hopper's tensor cores (wgmma), if it applies here.

    A program that is traced for no GPU in particular is refused too: it might meet another one.
    """
    found = compute_capability()
    if found == (9, 0):
        return []
    name = "no GPU is known" if found is None else f"this one is sm_{found[0]}{found[1]}"
    return [f"needs a Hopper GPU (sm_90), {name}"]


def ampere_or_newer() -> list[str]:
    """The refusal of a Triton form on a GPU older than sm_80; an unknown GPU is not refused."""
    found = compute_capability()
    if found is None or found >= (8, 0):
        return []
    return [f"needs sm_80 or newer, this GPU is sm_{found[0]}{found[1]}"]
