"""PyTorch's kernels as peers: run by its own Python as `python torch_kernels.py`, never imported.

First prints its versions, then answers each line of JSON, a problem as `kernel_peers.problem` makes
it, with {"rows": [{"name", "seconds", "low", "high", "cold", "note"}]}. Without a GPU it measures
the CPU, which only its tests want.
"""

import json
import statistics
import sys
import time

ROUNDS, COPIES, CACHE = 15, 8, 64 * 2**20


def main() -> None:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(json.dumps({"torch": torch.__version__, "device": device}), flush=True)
    for line in sys.stdin:
        found = json.loads(line)
        rows = []
        for name, make in peers(torch, found, device):
            try:
                rows.append({"name": name, **measure(torch, make, device)})
            except Exception as error:  # cannot run this: a row that says so
                text = " ".join(str(error).split())[:200]
                rows.append({"name": name, "note": f"{type(error).__name__}: {text}"})
            if device == "cuda":
                torch.cuda.empty_cache()
        print(json.dumps({"rows": rows}), flush=True)


def measure(torch, make, device):
    """Median seconds of a call. `make()` gives fresh inputs' closure and their bytes."""
    call, size = make()
    count = max(1, min(COPIES, -(-2 * CACHE // size))) if device == "cuda" else 1
    calls = [call, *(make()[0] for _ in range(count - 1))]

    def timed(repeats: int) -> float:
        if device == "cpu":
            start = time.perf_counter()
            for _ in range(repeats):
                for one in calls:
                    one()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            for one in calls:
                one()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    timed(1)
    once = max(timed(1), 1e-6)
    repeats = max(1, min(1000, int(0.02 / once)))
    # The slope between two lengths, as on our side: what a start costs cancels.
    slopes = [
        (timed(3 * repeats) - timed(repeats)) / (2 * repeats * len(calls))
        for _ in range(ROUNDS if device == "cuda" else 3)
    ]
    return {
        "seconds": statistics.median(slopes), "low": min(slopes), "high": max(slopes),
        "cold": size * count >= 2 * CACHE,
    }  # fmt: skip


def peers(torch, found, device):
    """(name, make) of each kernel that computes this problem."""
    bf16 = torch.bfloat16

    def normal(*shape, grad=False):
        return torch.randn(shape, dtype=bf16, device=device, requires_grad=grad)

    def bytes_of(*arrays):
        return sum(a.numel() * a.element_size() for a in arrays)

    operation = found["operation"]
    if operation in ("mla_prefill", "gqa_attention", "mla_decode"):
        width, value, heads = found["width"], found["value"], found["heads"]
        grad = found["backward"]

        def attention(padded):
            def make():
                q = normal(found["batch"], heads, found["queries"], width, grad=grad)
                k = normal(found["batch"], found["kv_heads"], found["keys"], width, grad=grad)
                wide = width if padded else value
                v = normal(found["batch"], found["kv_heads"], found["keys"], wide, grad=grad)
                options = {"is_causal": found["queries"] > 1, "enable_gqa": True}

                def call():
                    sdpa = torch.nn.functional.scaled_dot_product_attention
                    out = sdpa(q, k, v, **options)
                    if grad:
                        torch.autograd.grad(out, (q, k, v), out)

                return call, bytes_of(q, k, v)

            return make

        both = ", both passes" if grad else ""
        yield f"torch SDPA{both}", attention(False)
        if width != value:
            yield f"torch SDPA, padded{both}", attention(True)
    elif operation == "grouped_matmul":
        rows, inner, outer, groups = (found[n] for n in ("rows", "inner", "outer", "groups"))
        if found["backward"]:
            return

        outer *= 1 + found["fused"]  # gate and up in one matrix, as one would store them

        def finish(y):
            if not found["fused"]:
                return y
            gate, up = y.chunk(2, dim=-1)
            return torch.nn.functional.silu(gate) * up

        def grouped():
            x, w = normal(rows, inner), normal(groups, outer, inner)
            ends = torch.arange(1, groups + 1, device=device, dtype=torch.int32)
            ends = (ends * rows // groups).to(torch.int32)
            product = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
            return lambda: finish(product(x, w.transpose(1, 2), offs=ends)), bytes_of(x, w)

        def batched():
            x, w = normal(groups, max(1, rows // groups), inner), normal(groups, outer, inner)
            return lambda: finish(torch.matmul(x, w.transpose(1, 2))), bytes_of(x, w)

        yield "torch grouped_mm", grouped
        yield "torch.matmul, equal groups", batched
    elif operation == "block_fp8":
        rows, inner, outer = (found[n] for n in ("rows", "inner", "outer"))

        def dense():
            x, w = normal(rows, inner), normal(outer, inner)
            return lambda: torch.matmul(x, w.T), bytes_of(x, w)

        def scaled():
            x, w = (normal(n, inner).to(torch.float8_e4m3fn) for n in (rows, outer))
            a = torch.ones((rows, 1), device=device)
            b = torch.ones((1, outer), device=device)

            def call():
                torch._scaled_mm(x, w.T, scale_a=a, scale_b=b, out_dtype=bf16)

            return call, bytes_of(x, w)

        yield "torch.matmul, bf16", dense
        yield "torch._scaled_mm, a scale a row", scaled
    elif operation == "linear_cross_entropy":
        rows, inner, outer = (found[n] for n in ("rows", "inner", "outer"))

        def whole():
            x, w = normal(rows, inner, grad=True), normal(outer, inner, grad=True)
            targets = torch.randint(0, outer, (rows,), device=device)

            def call():
                loss = torch.nn.functional.cross_entropy((x @ w.T).float(), targets)
                torch.autograd.grad(loss, (x, w))

            return call, bytes_of(x, w)

        yield "torch, whole logits", whole


if __name__ == "__main__":
    main()
