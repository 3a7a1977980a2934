"""transformers as a peer: run by its own Python as `python transformers_cpu.py MODEL THREADS`,
never imported.

Reads one JSON request a line, {"operation", "ids", "tokens", "rate", "betas", "decay"}, and answers
with the seconds of one round and the tokens, or the loss before the update.
"""

import json
import sys
import time


def main() -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, DynamicCache

    directory, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps(versions), flush=True)
    optimiser = None
    for line in sys.stdin:
        request = json.loads(line)
        ids = torch.tensor(request["ids"])
        if request["operation"] == "train":
            if optimiser is None:
                model.train()
                optimiser = torch.optim.AdamW(
                    model.parameters(), request["rate"], request["betas"], eps=1e-8,
                    weight_decay=request["decay"],
                )  # fmt: skip
            found = train(model, optimiser, ids)
        else:
            with torch.inference_mode():
                cache = DynamicCache(config=model.config)
                found = generate(model, cache, ids, request)
        print(json.dumps(found), flush=True)


def generate(model, cache, ids, request) -> dict:
    """Seconds and tokens of a prompt's pass, or of the tokens after it."""
    start = time.perf_counter()
    token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    tokens = [int(token[0, 0])]
    if request["operation"] == "decode":
        tokens = []
        start = time.perf_counter()
        for _ in range(request["tokens"]):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            tokens.append(int(token[0, 0]))
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


def train(model, optimiser, ids) -> dict:
    """Seconds and loss of one step: the mean over all tokens that have one before them."""
    start = time.perf_counter()
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    return {"seconds": time.perf_counter() - start, "loss": loss.item()}


if __name__ == "__main__":
    main()
