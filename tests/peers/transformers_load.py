"""transformers, loading a checkpoint: `python transformers_load.py MODEL THREADS`, one load each.

Says when it is ready, loads when asked, and answers with seconds, memory, and what the parameters
amount to, which shows that both sides loaded the same.
"""

import sys

import wire


def main() -> None:
    channel = wire.Channel()
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    directory, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    # The model's own module is imported before the clock starts, as everything else is.
    kind = type(AutoConfig.from_pretrained(directory))
    AutoModelForCausalLM._model_mapping[kind]
    channel.say(torch=torch.__version__, transformers=transformers.__version__)
    for _ in channel.requests():
        before = wire.forget()
        start = wire.clock()
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
        seconds = wire.clock() - start
        found = wire.memory()
        total, count = 0.0, 0
        with torch.inference_mode():
            for value in model.parameters():
                total += float(value.double().square().sum())
                count += value.numel()
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
        channel.say(
            seconds=seconds, before=before, squares=total, count=count, dtypes=dtypes, **found
        )


if __name__ == "__main__":
    main()
