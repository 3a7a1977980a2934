"""What JAX sees and gets right on this machine, as one line of JSON: `python -m deepzoo.zoo.probe`.

`machine.look` runs it in a child process: a CUDA library that aborts, hangs or takes the whole
memory of a GPU then costs a line of the report, not the report.
"""

import dataclasses
import json
from typing import Any

import numpy as np

from deepzoo.zoo.machine import Backend, Device

SHIPPED = ("v2-nano", "12 + 7 =", "19")  # model, prompt, its first token


def main() -> None:
    """Prints a `Backend`."""
    print(json.dumps(dataclasses.asdict(backend())))


def backend() -> Backend:
    """Every device of the default backend, each one tried, and the shipped model."""
    import jax

    devices = tuple(_device(device) for device in jax.local_devices())
    return Backend(platform=jax.default_backend(), devices=devices, model=_failing(_model))


def _device(device: Any) -> Device:
    import jax

    known = device.memory_stats() or {}
    free = known["bytes_limit"] - known["bytes_in_use"] if "bytes_limit" in known else None
    capability = getattr(device, "compute_capability", None)
    kernels = {}
    with jax.default_device(device):
        wrong = _failing(products)
        if device.platform == "gpu":
            kernels = {form: _failing(lambda form=form: kernel(form)) for form in FORMS}
    return Device(
        kind=device.device_kind,
        platform=device.platform,
        capability=None if capability is None else str(capability),
        free=free,
        wrong=wrong,
        kernels=kernels,
    )


def products() -> str | None:
    """Multiplies small whole numbers, exact in every format, and says which format is wrong."""
    import jax
    import jax.numpy as jnp

    # A sum of 32 products up to 4 is whole and below 256, so it is exact in bfloat16, too.
    left, right = np.indices((16, 32)).sum(0) % 3, np.indices((32, 24)).sum(0) % 3
    wrong = []
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn):
        wide = jnp.float32 if dtype == jnp.float32 else jnp.bfloat16
        product = jax.jit(lambda a, b, wide=wide: a.astype(wide) @ b.astype(wide))
        got = product(jnp.asarray(left, dtype), jnp.asarray(right, dtype))
        if not (np.asarray(got, np.float64) == left @ right).all():
            wrong.append(jnp.dtype(dtype).name)
    return f"wrong products in {', '.join(wrong)}" if wrong else None


FORMS = ("mosaic", "triton")


def kernel(form: str) -> str | None:
    """Runs one Pallas kernel and says what is wrong with it.

    Args:
        form: one of `FORMS`.

    Raises:
        UnsupportedError: this GPU has no such form.
    """
    return judged(error(form))


def judged(off: float) -> str | None:
    """What is wrong with a kernel whose `error` this is."""
    # bfloat16 results, and sums of 14 bits on Hopper; a wrong scale or block is far above.
    return None if off < 0.02 else f"an FP8 product is off by {off:.1%} of its largest value"


def error(form: str, *, interpret: bool = False) -> float:
    """Largest error of an FP8 product against float64, relative to its largest value.

    Args:
        form: one of `FORMS`.
        interpret: in Pallas's interpreter, on any machine.

    Raises:
        UnsupportedError: this GPU has no such form.
    """
    import jax

    from deepzoo.kernels.block_fp8 import matmul_fp8, quantize, quantize_activations, reference

    a, b = jax.random.split(jax.random.key(0))
    x, x_scale = quantize_activations(jax.random.normal(a, (64, 128)))
    w, w_scale = quantize(jax.random.normal(b, (128, 128)))
    named: Any = form
    got = matmul_fp8(x, x_scale, w, w_scale, implementation=named, interpret=interpret)
    rows, matrix = map(np.asarray, (x, x_scale)), map(np.asarray, (w, w_scale))
    want = reference.dequantize_activations(*rows) @ reference.dequantize(*matrix).T
    return float(np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max())


def _model() -> str | None:
    """Loads the shipped model and lets it name one token."""
    import jax.numpy as jnp

    from deepzoo import zoo

    name, prompt, expected = SHIPPED
    model = zoo.load(name)
    assert model.tokenizer is not None
    ids = model.tokenizer.encode_prompt(prompt)
    logits = zoo.apply(model.config, model.params, jnp.asarray([ids], jnp.int32)).logits
    assert logits is not None
    told = model.tokenizer.decode([int(np.asarray(logits)[0, -1].argmax())]).strip()
    return None if told == expected else f"{name} continues {prompt!r} with {told!r}"


def _failing(check: Any) -> str | None:
    """What `check` finds wrong, or the first line of what it raises."""
    try:
        return check()
    except Exception as error:  # whatever it is, it is what was asked for
        text = str(error).strip().split("\n")[0][:300]
        return f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    main()
