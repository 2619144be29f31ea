"""Hugging Face `Trainer` with `optim="adafactor"`: stepped in backward, with accumulation, checkpoints and a schedule.

    python examples/trainer.py
    python examples/trainer.py --resume runs/trainer/checkpoint-60

A small Llama learns Python's standard library, read from this machine; its tokenizer is trained on the spot.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from adafactor.integrations.transformers import enable


def windows(length: int) -> tuple[list[Any], list[Any], int]:
    """The text as tokens, cut into examples: to train on, to evaluate on, and the size of the vocabulary."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(file) for file in files], vocab_size=1024, show_progress=False)
    tokens = torch.tensor(tokenizer.encode("\n".join(file.read_text(errors="replace") for file in files)).ids)
    examples = [{"input_ids": window, "labels": window} for window in tokens.split(length)[:-1]]
    return examples[64:], examples[:64], tokenizer.get_vocab_size()


def main(command_line: list[str] | None = None) -> Trainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", default="runs/trainer")
    parser.add_argument("--resume", help="a folder named checkpoint-N that an earlier run wrote")
    options = parser.parse_args(command_line)

    train, evaluation, vocabulary = windows(length=64)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=64, **sizes))
    if torch.accelerator.is_available():  # most CPUs are slow at it
        model.bfloat16()

    enable()  # optim="adafactor" is this package's from here on; `disable()` undoes it
    arguments = TrainingArguments(
        options.out,
        optim="adafactor",
        optim_args="beta1=0.9,nesterov=True,momentum_dtype=bfloat16,step_in_backward=accelerate",
        max_grad_norm=0,  # gradients are gone when their norm is known; updates are clipped instead
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=options.steps // 10,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        logging_steps=max(1, options.steps // 10),
        eval_strategy="steps",
        eval_steps=max(1, options.steps // 2),
        save_steps=max(1, options.steps // 2),
        report_to=[],
    )
    trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=evaluation)
    trainer.train(resume_from_checkpoint=options.resume)
    print(f"validation loss {trainer.evaluate()['eval_loss']:.3f} nats per token")
    return trainer


if __name__ == "__main__":
    main()
