"""Hugging Face `Trainer` itself: its accumulation, clipping and checkpoints; `enable()`, and stepping in backward."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from _cases import assert_same_bits
from _trainers import (
    BATCHES,
    GROUPS,
    IN_BACKWARD,
    SETTINGS,
    everything,
    everything_is_put_back,  # noqa: F401
)
from adafactor import Adafactor
from adafactor.compat import TransformersAdafactor
from adafactor.integrations import transformers as ours


def language_model(dtype: torch.dtype = torch.bfloat16, dropout: float = 0.1) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 40, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=64, max_position_embeddings=16, attention_dropout=dropout, **sizes)
    return transformers.LlamaForCausalLM(config).to(dtype)  # pyright: ignore[reportArgumentType]


def sentences(count: int = 4 * BATCHES) -> list[Any]:
    tokens = [torch.randint(64, (16,), generator=torch.Generator().manual_seed(seed)) for seed in range(count)]
    return [{"input_ids": each, "labels": each} for each in tokens]


def arguments_of(folder: Path, **options: Any) -> Any:
    defaults = {"max_grad_norm": 0.0, "learning_rate": 1e-2, "lr_scheduler_type": "cosine", "save_strategy": "no"}
    return transformers.TrainingArguments(
        str(folder),
        use_cpu=True,
        dataloader_pin_memory=False,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        num_train_epochs=2,
        logging_steps=1,
        disable_tqdm=True,
        report_to=[],
        **(defaults | options),
    )


def trainer_of(folder: Path, optimizer: Any = None, model: Any = None, resume: Any = None, **options: Any) -> Any:
    """One that has trained."""
    trainer = transformers.Trainer(
        model or language_model(),
        arguments_of(folder, **options),
        train_dataset=sentences(),  # pyright: ignore[reportArgumentType]
        eval_dataset=sentences(4),  # pyright: ignore[reportArgumentType]
        optimizer_cls_and_kwargs=optimizer,
    )
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def result_of(trainer: Any) -> dict[str, Any]:
    assert type(trainer.optimizer.optimizer) in (Adafactor, TransformersAdafactor)
    return everything(trainer.model, trainer.optimizer)


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_accumulates_clips_and_schedules_as_a_loop_of_one_s_own(tmp_path, monkeypatch):
    batches = []
    compute = transformers.Trainer.compute_loss
    monkeypatch.setattr(
        transformers.Trainer,
        "compute_loss",
        lambda self, m, x, **rest: batches.append(x) or compute(self, m, x, **rest),
    )
    model = language_model(torch.float32, dropout=0.0)
    trainer = trainer_of(tmp_path, (Adafactor, SETTINGS), model, max_grad_norm=0.25, weight_decay=0.1)
    model = language_model(torch.float32, dropout=0.0)
    decayed = trainer.get_decay_parameter_names(model)
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if name in decayed], "weight_decay": 0.1},
        {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
    ]
    optimizer = Adafactor(groups, **SETTINGS)
    schedule = transformers.get_scheduler("cosine", optimizer, 0, 8)
    norms = []
    for epoch in range(2):
        for begin, end in GROUPS:
            group = batches[BATCHES * epoch :][begin:end]
            for inputs in group:
                model(**inputs, num_items_in_batch=torch.tensor(4 * 15 * len(group))).loss.backward()
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.25)))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    assert len(batches) == 2 * BATCHES
    assert min(norms) > 0.25
    assert logged(trainer, "grad_norm") == norms
    assert_same_bits(result_of(trainer), everything(model, optimizer))


def test_trainer_steps_in_backward_with_its_accumulation_and_shorter_groups(tmp_path):
    plain = trainer_of(tmp_path, (Adafactor, SETTINGS))
    trainer = trainer_of(tmp_path, (Adafactor, IN_BACKWARD))
    assert trainer.optimizer.optimizer._in_backward is not None
    assert logged(trainer, "loss") == logged(plain, "loss")
    first, *norms = logged(trainer, "grad_norm")  # of gradients that are gone
    assert math.isnan(first)
    assert norms == logged(plain, "grad_norm")[1:]
    assert_same_bits(result_of(trainer), result_of(plain))


@pytest.mark.parametrize("after", [SETTINGS, IN_BACKWARD], ids=["plain", "in backward"])
@pytest.mark.parametrize("before", [SETTINGS, IN_BACKWARD], ids=["plain", "in backward"])
def test_trainer_resumes_from_its_checkpoint_to_the_same_bits(before, after, tmp_path):
    whole = trainer_of(tmp_path / "whole", (Adafactor, SETTINGS))
    trainer_of(tmp_path, (Adafactor, before), save_strategy="steps", save_steps=3)
    torch.manual_seed(5)
    resumed = trainer_of(tmp_path, (Adafactor, after), resume=tmp_path / "checkpoint-3")
    assert resumed.state.global_step == 8
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert_same_bits(result_of(resumed), result_of(whole))


def test_trainer_s_adafactor_is_ours_while_enabled(tmp_path):
    plain = {"optim": "adafactor", "max_grad_norm": 1.0, "weight_decay": 0.1}

    def model():
        return language_model(torch.float32)

    theirs = trainer_of(tmp_path, model=model(), **plain, save_strategy="steps", save_steps=3)
    original = transformers.Trainer.get_optimizer_cls_and_kwargs
    ours.enable()
    ours.enable()
    trainer = trainer_of(tmp_path / "ours", model=model(), **plain)
    resumed = trainer_of(tmp_path, model=model(), resume=tmp_path / "checkpoint-3", **plain)
    assert type(trainer_of(tmp_path, model=model(), optim="adamw_torch").optimizer.optimizer) is torch.optim.AdamW
    ours.disable()
    ours.disable()
    assert transformers.Trainer.get_optimizer_cls_and_kwargs is original
    assert type(theirs.optimizer.optimizer) is transformers.Adafactor
    start = dict(model().named_parameters())
    for each in (trainer, resumed):
        assert type(each.optimizer.optimizer) is TransformersAdafactor
        assert logged(each, "loss") == pytest.approx(logged(theirs, "loss"), rel=1e-4)
        for name, p in each.model.named_parameters():
            q = dict(theirs.model.named_parameters())[name]
            assert (p - q).norm() < 1e-3 * (q - start[name]).norm(), name


def test_arguments_of_ours_through_optim_args(tmp_path):
    ours.enable()
    text = (
        "beta1=0.9, momentum_dtype=bfloat16,eps=(1e-30, 1e-2),weight_bits=24,scale_parameter=True,seed=3,beta2_cap=None"
    )
    text += ",factor='auto',min_dim_size_to_factor=8,rms_scope=matrix,step_in_backward=accelerate"
    trainer = trainer_of(tmp_path, optim="adafactor", optim_args=text)
    group = trainer.optimizer.param_groups[0]
    chosen = {"beta1": 0.9, "momentum_dtype": "bfloat16", "eps": (1e-30, 1e-2), "weight_bits": 24, "seed": 3}
    chosen |= {"scale_parameter": True, "relative_step": False, "beta2_cap": None, "factor": "auto"}
    assert {name: group[name] for name in chosen} == chosen
    assert group["initial_lr"] == 1e-2
    assert trainer.optimizer.optimizer._in_backward is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim_args": "beta1"}, "optim_args must be name=value,.* got 'beta1'"),
        ({"optim_args": "beta1=0.9,momentum=0.9"}, "got 'momentum=0.9'; it has lr, eps, .*step_in_backward"),
        ({"optim_args": "beta1=0.9,"}, "optim_args must be .* got ''"),
        ({"optim_args": "params=1"}, "got 'params=1'"),
        ({"optim_args": "scale_parameter=false"}, "scale_parameter must be one of None, True, False, got 'false'"),
        ({"optim_args": "momentum_dtype=float8"}, "momentum_dtype must be one of 'float32', 'bfloat16', 'int8'"),
        ({"optim_args": "step_in_backward=True"}, 'an integer >= 1, "accelerate", or a function .*got True'),
        ({"optim_args": "step_in_backward=accelerate", "max_grad_norm": 1.0}, "max_grad_norm must be 0 .*got 1.0"),
        ({"optim_args": "step_in_backward=2"}, "backward pass 3 since the last optimizer.step"),
        ({"optim_args": "step_in_backward=4"}, "after 3 backward passes with accumulation_steps=4"),
    ],
)
def test_what_is_refused_of_trainer_s_settings(options, message, tmp_path):
    ours.enable()
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, optim="adafactor", **options)


def test_scaled_gradients_of_trainer_are_refused(tmp_path):
    ours.enable()
    arguments = arguments_of(tmp_path, optim="adafactor", optim_args="step_in_backward=1")
    arguments.fp16 = True  # the constructor wants a GPU for it
    with pytest.raises(ValueError, match=r"fp16=True scales gradients.*use bf16=True"):
        transformers.Trainer.get_optimizer_cls_and_kwargs(arguments)


def test_trainer_s_clipping_in_backward_is_refused_without_enable_too(tmp_path):
    with pytest.raises(ValueError, match=r"nothing left to clip.*max_grad_norm=0"):
        trainer_of(tmp_path, (Adafactor, IN_BACKWARD), max_grad_norm=1.0)


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
def test_trainer_s_schedulers_that_follow_a_metric(kind, tmp_path):
    options = {"lr_scheduler_type": kind, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    options |= {"lr_scheduler_kwargs": {"patience": 0, "factor": 0.5}, "learning_rate": 0.5}
    trainer = trainer_of(tmp_path, (Adafactor, IN_BACKWARD | {"lr": 0.5}), **options)
    assert logged(trainer, "learning_rate")[-1] < 0.5
    assert trainer.optimizer.param_groups[0]["lr"] == trainer.lr_scheduler.optimizer.param_groups[0]["lr"]
