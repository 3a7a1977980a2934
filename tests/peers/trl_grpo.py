"""TRL's GRPOTrainer: `python trl_grpo.py MODEL THREADS SETTINGS`, one step for each request.

SETTINGS is JSON as `run.py` writes it: prompts, answers, max_tokens, rate, betas, texts. An answer
is right where its text has an odd number of characters, on both sides: groups then differ within
themselves, and judging costs nothing.
"""

import json
import logging
import sys
import tempfile

import wire


def main() -> None:
    channel = wire.Channel()
    import datasets
    import torch
    import transformers
    import trl
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

    directory, threads, settings = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    imported = wire.memory()["resident"]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    # AutoTokenizer takes Qwen's own rules for every `qwen2`, whatever `tokenizer.json` says.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    spent, told, requests = [], {}, channel.requests()

    class Trainer(trl.GRPOTrainer):
        def _generate(self, *args, **named):
            start = wire.clock()
            found = super()._generate(*args, **named)
            spent.append(wire.clock() - start)
            return found

    class Turns(TrainerCallback):
        def on_step_begin(self, args, state, control, **named):
            if next(requests, None) is None:
                sys.exit()
            spent.clear()
            told["before"] = wire.forget()
            told["start"] = wire.clock()

        def on_step_end(self, args, state, control, **named):
            seconds = wire.clock() - told["start"]
            channel.say(
                seconds=seconds, generation=sum(spent), before=told["before"], **wire.memory(),
                length=trainer._metrics["train"]["completions/mean_length"][-1],
                reward=trainer._metrics["train"]["reward"][-1],
            )  # fmt: skip

    def odd(completions, **named):
        return [float(len(text) % 2) for text in completions]

    rows = settings["prompts"] * settings["answers"]
    with tempfile.TemporaryDirectory() as folder:
        args = trl.GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False,
            per_device_train_batch_size=rows, gradient_accumulation_steps=1,
            num_generations=settings["answers"], max_completion_length=settings["max_tokens"],
            temperature=1.0, top_p=1.0, top_k=0, beta=0.0, loss_type="grpo", epsilon=0.2,
            learning_rate=settings["rate"], adam_beta1=settings["betas"][0],
            adam_beta2=settings["betas"][1], weight_decay=0.0, max_grad_norm=1.0,
            lr_scheduler_type="constant", max_steps=10**6, save_strategy="no",
            logging_strategy="no", report_to="none", disable_tqdm=True, seed=0,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(
            model, reward_funcs=odd, args=args, processing_class=tokenizer, callbacks=[Turns()],
            train_dataset=datasets.Dataset.from_list([{"prompt": t} for t in settings["texts"]]),
        )  # fmt: skip
        ids = torch.tensor([settings["ids"]])
        with torch.inference_mode():
            logits = model.eval()(ids).logits[0, -1].tolist()
        model.train()
        versions = {m.__name__: m.__version__ for m in (trl, transformers, torch)}
        channel.say(**versions, imported=imported, logits=logits)
        trainer.train()


if __name__ == "__main__":
    main()
