"""transformers as a peer on a GPU: run by its own Python as `python transformers_gpu.py`, never
imported.

The first line of JSON is {"config"}, a config.json; the model gets random weights in bfloat16. Each
further line is {"operation", "batch", "tokens", "steps", "rounds"} and is answered with the seconds
of a prefill, or of one decode step, or with a note that says why there are none.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        written = json.loads(sys.stdin.readline())["config"]
        written.pop("auto_map", None)  # transformers' own code, not the checkpoint's
        Path(folder, "config.json").write_text(json.dumps(written))
        config = AutoConfig.from_pretrained(folder)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps(versions), flush=True)

    def wait() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def prefill(batch: int, tokens: int):
        """A cache with `tokens` tokens, and the token after them."""
        cache = DynamicCache(config=model.config)
        ids = torch.randint(0, config.vocab_size, (batch, tokens), device=device)
        token = None
        for part in ids.split(512, dim=1):
            out = model(part, past_key_values=cache, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
        return cache, token

    def measured(request) -> float:
        times = []
        if request["operation"] == "prefill":
            for _ in range(request["rounds"] + 1):
                start = wait()
                prefill(request["batch"], request["tokens"])
                times.append(wait() - start)
            return statistics.median(times[1:])
        cache, token = prefill(request["batch"], request["tokens"])
        for _ in range(2):  # warm-up
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        for _ in range(request["steps"]):
            start = wait()
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            times.append(wait() - start)
        return statistics.median(times)

    with torch.inference_mode():
        for line in sys.stdin:
            try:
                answer = {"seconds": measured(json.loads(line))}
            except Exception as error:  # out of memory, above all
                text = " ".join(str(error).split())[:200]
                answer = {"note": f"{type(error).__name__}: {text}"}
            if device == "cuda":
                torch.cuda.empty_cache()
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
