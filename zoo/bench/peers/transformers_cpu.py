"""transformers as a peer: run by its own Python as `python transformers_cpu.py MODEL THREADS`,
never imported.

Reads one JSON request a line, {"operation", "ids", "tokens"}, and answers with the seconds of one
round and the tokens.
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
    with torch.inference_mode():
        for line in sys.stdin:
            request = json.loads(line)
            ids = torch.tensor(request["ids"])
            cache = DynamicCache(config=model.config)
            start = time.perf_counter()
            token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
            tokens = [int(token[0, 0])]
            if request["operation"] == "decode":
                tokens = []
                start = time.perf_counter()
                for _ in range(request["tokens"]):
                    token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
                    tokens.append(int(token[0, 0]))
            seconds = time.perf_counter() - start
            print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
