"""What works on a machine and what does not, judged from its facts (`machine.Machine`) alone.

Each finding is a line that a person can act on: `ok` works, `off` will not work here though the
rest does, `fail` keeps deepzoo from working at all.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from deepzoo.zoo.machine import PLUGINS, Backend, Device, Machine

Status = Literal["ok", "off", "fail"]

TOKENS = 4096  # of cache, counted beside a model's weights
GPU_EXTRA = "pip install 'deepzoo[cuda]'"

# Lowest driver, and lowest compute capability, of NVIDIA's libraries that a plugin brings.
DRIVERS = {"jax-cuda13-plugin": 580, "jax-cuda12-plugin": 525}
CAPABILITIES = {"jax-cuda13-plugin": (7, 5), "jax-cuda12-plugin": (5, 2)}

_FORMS = {"published": "as published", "bfloat16": "in bfloat16"}

# Package of an extra: the extra, and what it is for.
EXTRAS = {
    "pyarrow": ("parquet", "Parquet files as training data"),
    "matplotlib": ("notebooks", "pictures (`deepzoo plot`)"),
}


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        status: "ok", "off" or "fail".
        topic: one word.
        text: what was found.
        todo: what to do about it; empty if nothing.
    """

    status: Status
    topic: str
    text: str
    todo: str = ""


class Size(NamedTuple):
    """Bytes of one released model: weights as published and in bfloat16, both without MTP, files on
    disk, and a cache of `TOKENS` tokens."""

    name: str
    published: int
    bfloat16: int
    files: int
    cache: int


def works(findings: Iterable[Finding]) -> bool:
    """Whether nothing essential fails."""
    return all(finding.status != "fail" for finding in findings)


def diagnose(machine: Machine, sizes: Sequence[Size] = ()) -> list[Finding]:
    """Judges a machine.

    Args:
        machine: its facts.
        sizes: of the released models; see `catalog_sizes`.
    """
    found = [python(machine), *packages(machine), *devices(machine)]
    found += [*plugins(machine), *hidden_gpus(machine), *kernels(machine)]
    found += [memory(machine), *models(machine, sizes), disk(machine, sizes), sandbox(machine)]
    return [*found, *extras(machine), hub(machine)]


def python(machine: Machine) -> Finding:
    """Whether Python is in the supported range."""
    text = f"{machine.python} on {machine.system}, needed is {machine.requires_python}"
    if SpecifierSet(machine.requires_python).contains(machine.python, prereleases=True):
        return Finding("ok", "python", text)
    return Finding("fail", "python", text, f"use Python {machine.requires_python}")


def packages(machine: Machine) -> list[Finding]:
    """Whether every required package is there, in the range that deepzoo and JAX ask for."""
    found = []
    needed = [(r, "deepzoo") for r in _needed(machine.requirements)]
    needed += [(r, "jax") for r in _needed(machine.jax_requirements)]
    for requirement, by in needed:
        if told := _unfit(requirement, machine.installed):
            todo = f"pip install '{requirement.name}{requirement.specifier}'"
            found.append(Finding("fail", "packages", f"{told}, {by} needs it", todo))
    if not found:
        told = [f"{name} {machine.installed.get(name)}" for name in ("deepzoo", "jax", "jaxlib")]
        number = len({canonicalize_name(r.name) for r, _ in needed})
        found.append(Finding("ok", "packages", f"{', '.join(told)}; all {number} fit"))
    return found


def devices(machine: Machine) -> list[Finding]:
    """Whether JAX starts, every device multiplies right, and a shipped model runs."""
    backend = machine.backend
    if isinstance(backend, str):
        todo = "`python -c 'import jax; print(jax.devices())'` shows the whole error"
        return [Finding("fail", "jax", f"cannot use its devices: {backend}", todo)]
    if not backend.devices:
        return [Finding("fail", "jax", "sees no device", "see JAX_PLATFORMS")]
    found = []
    for kind in dict.fromkeys((d.kind, d.wrong) for d in backend.devices):
        alike = [d for d in backend.devices if (d.kind, d.wrong) == kind]
        text = f"{len(alike)} x {alike[0].kind} ({backend.platform})"
        if wrong := alike[0].wrong:
            todo = "set JAX_PLATFORMS to another, and report it with this page"
            found.append(Finding("fail", "devices", f"{text}: {wrong}", todo))
        else:
            right = "products in float32, bfloat16 and FP8 are right"
            found.append(Finding("ok", "devices", f"{text}: {right}"))
    if backend.model is not None:
        todo = "reinstall deepzoo and what it needs: pip install --force-reinstall deepzoo"
        return [*found, Finding("fail", "model", f"the shipped model fails: {backend.model}", todo)]
    return [*found, Finding("ok", "model", "the shipped v2-nano loads and answers")]


def plugins(machine: Machine) -> list[Finding]:
    """Whether an installed CUDA plugin is of JAX's own version."""
    found = []
    for name in PLUGINS:
        version = machine.installed.get(name)
        if version is None:
            continue
        wanted = _plugin_range(machine, name)
        text = f"{name} {version}, JAX {machine.installed.get('jax')} fits {name}{wanted or ''}"
        if wanted is None or wanted.contains(version, prereleases=True):
            found.append(Finding("ok", "cuda", text))
        else:
            todo = f"pip install '{name}{wanted}' (or {GPU_EXTRA})"
            found.append(Finding("off", "cuda", text, todo))
    return found


def hidden_gpus(machine: Machine) -> list[Finding]:
    """NVIDIA GPUs that the driver lists and JAX does not use, with every reason that shows."""
    if not machine.gpus or _of_gpu(machine.backend):
        return []
    names = ", ".join(dict.fromkeys(gpu.name for gpu in machine.gpus))
    reasons: list[tuple[str, str]] = []
    held = [name for name in PLUGINS if name in machine.installed]
    platforms = machine.settings.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        reasons.append((f"JAX_PLATFORMS={platforms}", "unset JAX_PLATFORMS"))
    visible = machine.settings.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        reasons.append((f"CUDA_VISIBLE_DEVICES={visible!r}", "unset CUDA_VISIBLE_DEVICES"))
    if not held:
        reasons.append(("JAX has no CUDA plugin", GPU_EXTRA))
    for name in held:
        wanted = _plugin_range(machine, name)
        if wanted is not None and not wanted.contains(machine.installed[name], prereleases=True):
            reasons.append((f"{name} is not of JAX's version", f"pip install '{name}{wanted}'"))
        for gpu in machine.gpus[:1]:
            if int(gpu.driver.split(".")[0]) < DRIVERS[name]:
                need = f"driver {DRIVERS[name]} or newer"
                reasons.append((f"driver {gpu.driver}, {name} needs {need}", f"install {need}"))
            if _capability(gpu.capability) < CAPABILITIES[name]:
                low = ".".join(map(str, CAPABILITIES[name]))
                reasons.append((f"compute capability below {low}", "use a newer GPU"))
    if not reasons:
        reasons.append(("no reason shows", "`python -c 'import jax; print(jax.devices())'`"))
    text = f"{len(machine.gpus)} x {names} is there and JAX does not use it: "
    text += "; ".join(reason for reason, _ in reasons)
    return [Finding("off", "gpu", text, "; ".join(todo for _, todo in reasons))]


def forms(capability: tuple[int, int]) -> tuple[str, ...]:
    """The forms of kernels that a GPU can run, best first (`kernels.dispatch` decides)."""
    if capability == (9, 0):
        return "mosaic", "triton", "xla"
    return ("triton", "xla") if capability >= (8, 0) else ("xla",)


def kernels(machine: Machine) -> list[Finding]:
    """Which kernels the GPUs get, and whether one of each form ran right."""
    gpus = _of_gpu(machine.backend)
    if not gpus:
        told = "no GPU, so every operation takes its XLA form; deepzoo[aot] compiles GPU kernels"
        return [Finding("ok", "kernels", told)]
    found = []
    for device in {(d.kind, *sorted(d.kernels.items())): d for d in gpus}.values():
        if device.capability is None:
            told = f"{device.kind}: no NVIDIA GPU, so every operation takes its XLA form"
            found.append(Finding("off", "kernels", told))
            continue
        able = forms(_capability(device.capability))
        sm = f"{device.kind} (sm_{device.capability.replace('.', '')})"
        if able == ("xla",):
            found.append(Finding("off", "kernels", f"{sm}: XLA alone; Pallas needs sm_80 or newer"))
        else:
            found.append(Finding("ok", "kernels", f"{sm} gets {', '.join(able)}"))
        for form in able:
            if (wrong := device.kernels.get(form)) is not None:
                text = f"{sm}: a {form} kernel fails: {wrong}"
                todo = "pass implementation='xla', and report it with this page"
                found.append(Finding("fail", "kernels", text, todo))
    return found


def memory(machine: Machine) -> Finding:
    """Free memory of the host and of each device."""
    parts = [] if machine.memory is None else [f"{gib(machine.memory)} of the host"]
    for number, device in enumerate(_of_gpu(machine.backend)):
        if device.free is not None:
            parts.append(f"{gib(device.free)} of GPU {number}")
    if not parts:
        return Finding("off", "memory", "this system does not tell how much is free")
    return Finding("ok", "memory", f"free: {', '.join(parts)}")


def models(machine: Machine, sizes: Sequence[Size]) -> list[Finding]:
    """Which released models fit into the devices' memory together, or into the host's."""
    gpus = _of_gpu(machine.backend)
    free = sum(d.free or 0 for d in gpus) if gpus else machine.memory
    if free is None or not sizes:
        return []
    where = "the host" if not gpus else "the GPU" if len(gpus) == 1 else f"{len(gpus)} GPUs"
    alike: dict[tuple[int, str], list[str]] = {}
    for form, words in _FORMS.items():
        alike.setdefault(_fitting(sizes, form, free), []).append(words)
    return [
        Finding(
            "ok" if number else "off",
            "models",
            f"{number} of {len(sizes)} fit {where} {' and '.join(words)}{examples}",
        )
        for (number, examples), words in alike.items()
    ]


def _fitting(sizes: Sequence[Size], form: str, free: int) -> tuple[int, str]:
    """How many models fit, and in words the largest that does and the smallest that does not."""

    def weights(size: Size) -> int:
        return getattr(size, form)

    fit = [size for size in sizes if weights(size) + size.cache <= free]
    more = [size for size in sizes if size not in fit]
    told = ""
    if fit:
        largest = max(fit, key=weights)
        told += f", the largest {largest.name} ({gib(weights(largest))})"
    if more:
        least = min(more, key=weights)
        told += f"; {least.name} needs {gib(weights(least) + least.cache)}"
    return len(fit), told


def disk(machine: Machine, sizes: Sequence[Size]) -> Finding:
    """Whether downloads have a place."""
    text = f"{gib(machine.disk)} free in {machine.cache}"
    if not machine.writable:
        return Finding("off", "disk", f"{text}, which cannot be written", "set HF_HOME")
    fit = [size for size in sizes if size.files <= machine.disk]
    text += f", room for any one of {len(fit)} of {len(sizes)} models" if sizes else ""
    if sizes and not fit:
        return Finding("off", "disk", text, "set HF_HOME to a larger disk")
    return Finding("ok", "disk", text)


def sandbox(machine: Machine) -> Finding:
    """Whether recipes may run programs that a model wrote."""
    if machine.sandbox is None:
        return Finding("ok", "sandbox", "programs that a model wrote can be isolated")
    return Finding("off", "sandbox", machine.sandbox)


def extras(machine: Machine) -> list[Finding]:
    """Which optional packages are there."""
    found = []
    parsed = [r for r in map(Requirement, machine.requirements) if r.marker is not None]
    for name, (extra, purpose) in EXTRAS.items():
        wanted = next(r for r in parsed if r.name == name and _of_extra(r, extra))
        if told := _unfit(wanted, machine.installed):
            todo = f"pip install 'deepzoo[{extra}]'"
            found.append(Finding("off", "extras", f"{told}, so no {purpose}", todo))
        else:
            found.append(Finding("ok", "extras", f"{name} {machine.installed[name]}: {purpose}"))
    return found


def hub(machine: Machine) -> Finding:
    """Whether `--download` may use the network; nothing is tried."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        value = machine.settings.get(name, "")
        if value.upper() in ("1", "ON", "YES", "TRUE"):
            return Finding("off", "hub", f"{name}={value}: --download is off", f"unset {name}")
        if value:
            break  # the hub's library reads the second where the first is not set
    end = machine.settings.get("HF_ENDPOINT", "the hub")
    return Finding("ok", "hub", f"--download asks {end}; without it nothing leaves this machine")


def catalog_sizes() -> list[Size]:
    """Sizes of every released model, from the catalogue; nothing is allocated."""
    from deepzoo.zoo import catalog
    from deepzoo.zoo.count import cache_bytes, count
    from deepzoo.zoo.target import target_config

    found = []
    for name in catalog.models():
        if catalog.card(name).repo is None:
            continue
        config = catalog.config(name)
        wide = target_config(config, dtype="bfloat16", quantized=False, mtp=False)
        published = count(target_config(config, mtp=False)).total_bytes
        cache = TOKENS * cache_bytes(config).stored
        files = count(config).total_bytes
        found.append(Size(name, published, count(wide).total_bytes, files, cache))
    return found


def gib(number: int) -> str:
    """Bytes in GiB."""
    return f"{number / 2**30:,.1f} GiB"


def _needed(requirements: Iterable[str]) -> list[Requirement]:
    """Those that hold without an extra."""
    parsed = map(Requirement, requirements)
    return [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]


def _of_extra(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is not None and marker.evaluate({"extra": extra})


def _unfit(requirement: Requirement, installed: Mapping[str, str]) -> str | None:
    """What is wrong with a package, or None."""
    version = installed.get(canonicalize_name(requirement.name))
    if version is None:
        return f"{requirement.name} is not installed"
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return f"{requirement.name} is {version}, not {requirement.specifier}"


def _plugin_range(machine: Machine, plugin: str) -> SpecifierSet | None:
    """The versions of a plugin that the installed JAX asks for in its own extra."""
    extra = plugin.removeprefix("jax-").removesuffix("-plugin")
    parsed = map(Requirement, machine.jax_requirements)
    fit = (r.specifier for r in parsed if r.name == plugin and _of_extra(r, extra))
    return next(fit, None)


def _of_gpu(backend: Backend | str) -> list[Device]:
    return [] if isinstance(backend, str) else [d for d in backend.devices if d.platform == "gpu"]


def _capability(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)
