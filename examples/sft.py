"""TRL's `SFTTrainer`, which is a `Trainer`: this package by `optimizer_cls_and_kwargs`, without `enable()`.

    python examples/sft.py
    python examples/sft.py --resume runs/sft/checkpoint-50

A small Llama learns to answer what follows a number, on data and with a tokenizer made on the spot.
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import adafactor

QUESTIONS = [{"prompt": f"after {n} comes ", "completion": str(n + 1)} for n in range(100, 999) if n != 457]


def characters() -> PreTrainedTokenizerFast:
    """A token for each character."""
    alphabet = sorted({letter for question in QUESTIONS for letter in question["prompt"] + question["completion"]})
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<end>", "<unknown>", *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def main(command_line: list[str] | None = None) -> SFTTrainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", default="runs/sft")
    parser.add_argument("--resume", help="a folder named checkpoint-N that an earlier run wrote")
    options = parser.parse_args(command_line)

    tokenizer = characters()
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes))
    settings = adafactor.recipes.adamw_like(3e-3, step_in_backward="accelerate")
    config = SFTConfig(
        options.out,
        max_grad_norm=0,  # gradients are gone when their norm is known; updates are clipped instead
        lr_scheduler_type="cosine",
        learning_rate=settings["lr"],
        max_steps=options.steps,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        logging_steps=max(1, options.steps // 10),
        save_steps=max(1, options.steps // 2),
        bf16=torch.accelerator.is_available(),
        report_to=[],
    )
    trainer = SFTTrainer(
        model,
        config,
        train_dataset=Dataset.from_list(QUESTIONS),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(adafactor.Adafactor, settings),
    )
    trainer.train(resume_from_checkpoint=options.resume)
    unseen = tokenizer("after 457 comes ", return_tensors="pt", return_token_type_ids=False).to(model.device)
    print(tokenizer.decode(model.generate(**unseen, max_new_tokens=3, do_sample=False)[0]).replace(" ", ""))
    return trainer


if __name__ == "__main__":
    main()
