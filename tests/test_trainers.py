"""Accelerate and Lightning themselves: their accumulation, clipping and checkpoints, and stepping in backward."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
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
from adafactor import Adafactor, _in_backward_guards

accelerate = pytest.importorskip("accelerate", reason="needs the package accelerate")
lightning = pytest.importorskip("lightning", reason="needs the package lightning")
StepInBackward = pytest.importorskip("adafactor.integrations.lightning").StepInBackward

# What Lightning says of itself; every other warning is an error.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (".*does not have many workers", ".*LeafSpec", "Checkpoint directory .* exists", "The dirpath has")
]


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 48), nn.Tanh(), nn.Linear(48, 40)).bfloat16()


def loss_of(model: nn.Module, batch: Any) -> Any:
    return model(batch).float().square().mean()


def rows() -> Any:
    data = torch.randn(4 * BATCHES, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    return torch.utils.data.DataLoader(data, 4)  # pyright: ignore[reportArgumentType]


def by_hand(clip: float) -> tuple[nn.Module, Adafactor]:
    model = layers()
    optimizer = Adafactor(model.named_parameters(), **SETTINGS)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=8)
    batches = list(rows())
    for begin, end in 2 * GROUPS:
        for batch in batches[begin:end]:
            (loss_of(model, batch) / 3).backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), clip) > clip
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model, optimizer


# Accelerate


def accelerated(
    arguments: dict[str, Any], clip: float | None = None, folder: Path | None = None, resume: bool = False
) -> dict[str, Any]:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
    model = layers()
    optimizer = Adafactor(model.named_parameters(), **arguments)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=8)
    model, optimizer, schedule, data = accelerator.prepare(model, optimizer, schedule, rows())
    if resume:
        accelerator.load_state(str(folder))
    for epoch in range(int(resume), 2):
        for batch in data:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, batch))
                if clip is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        if folder and not epoch:
            accelerator.save_state(str(folder))
    return everything(accelerator.unwrap_model(model), optimizer)


def test_accelerate_accumulates_clips_and_schedules_as_a_loop_of_one_s_own():
    assert_same_bits(accelerated(SETTINGS, clip=1e-3), everything(*by_hand(1e-3)))


def test_accelerate_steps_in_backward_with_its_accumulation_and_shorter_groups():
    assert_same_bits(accelerated(IN_BACKWARD), accelerated(SETTINGS))


@pytest.mark.parametrize("arguments", [SETTINGS, IN_BACKWARD], ids=["plain", "in backward"])
def test_accelerate_resumes_from_its_checkpoint_to_the_same_bits(arguments, tmp_path):
    whole = accelerated(arguments, folder=tmp_path)
    for handle in list(_in_backward_guards.live):
        handle.remove()
    torch.manual_seed(5)
    assert_same_bits(accelerated(arguments, folder=tmp_path, resume=True), whole)


def test_what_is_refused_under_accelerate():
    with pytest.raises(ValueError, match="nothing left to clip"):
        accelerated(IN_BACKWARD, clip=1.0)
    with pytest.raises(ValueError, match=r"after 2 backward passes with accumulation_steps=3.*assign accum"):
        accelerated(SETTINGS | {"step_in_backward": 3})  # the last group of an epoch is shorter


def test_a_step_before_accelerate_s_last_pass_is_refused():
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
    model = layers()
    optimizer = Adafactor(model.named_parameters(), **IN_BACKWARD)
    model = accelerator.prepare(model)
    with accelerator.accumulate(model):
        accelerator.backward(loss_of(model, next(iter(rows()))))
        with pytest.raises(ValueError, match="after 1 backward passes, none of which was the last one"):
            optimizer.step()  # not the prepared one, which would wait


# Lightning


class Module(lightning.LightningModule):
    def __init__(self, arguments: dict[str, Any], manual: bool = False) -> None:
        super().__init__()
        self.layers, self.arguments = layers(), arguments
        self.automatic_optimization = not manual

    def training_step(self, batch: Any, index: int) -> Any:
        return loss_of(self.layers, batch)

    def configure_optimizers(self) -> Any:
        kind, arguments = self.arguments.get("kind", Adafactor), self.arguments.get("with", SETTINGS)
        optimizer = kind(self.layers.named_parameters(), **arguments)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Watch(lightning.Callback):
    """How many parameters have a gradient after each backward pass."""

    def __init__(self) -> None:
        self.gradients: list[int] = []

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.gradients.append(sum(p.grad is not None for p in pl_module.parameters()))


def lightning_of(folder: Path, module: Module | None = None, resume: Path | None = None, **options: Any) -> Any:
    callbacks = [
        *options.pop("callbacks", []),
        lightning.pytorch.callbacks.ModelCheckpoint(folder, every_n_epochs=1, save_top_k=-1),
    ]
    trainer = lightning.Trainer(
        accelerator="cpu",
        accumulate_grad_batches=options.pop("accumulate_grad_batches", 3),
        max_epochs=2,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module or Module({}), rows(), ckpt_path=resume and str(resume))
    return trainer


def fitted(trainer: Any) -> dict[str, Any]:
    return everything(trainer.lightning_module.layers, trainer.optimizers[0])


def test_lightning_accumulates_clips_and_schedules_as_a_loop_of_one_s_own(tmp_path):
    assert_same_bits(fitted(lightning_of(tmp_path, gradient_clip_val=1e-3)), everything(*by_hand(1e-3)))


def test_lightning_steps_in_backward_with_its_accumulation_and_shorter_groups(tmp_path):
    watch = Watch()
    trainer = lightning_of(tmp_path / "ours", callbacks=[StepInBackward(), watch])
    assert watch.gradients == 2 * [4, 4, 0, 4, 4, 0, 4, 4, 0, 4, 0]
    assert not _in_backward_guards.live
    assert_same_bits(fitted(trainer), fitted(lightning_of(tmp_path / "plain")))


def test_lightning_may_fit_the_same_module_again(tmp_path):
    module = Module({})
    for round in range(2):
        trainer = lightning_of(tmp_path / str(round), module, callbacks=[StepInBackward()])
        assert {int(state["step"]) for state in trainer.optimizers[0].state.values()} == {8}
    trainer.fit_loop.max_epochs = 3  # and the same trainer
    trainer.fit(module, rows())
    assert trainer.global_step == 12


def test_lightning_may_change_the_accumulation(tmp_path):
    watch = Watch()
    schedule = lightning.pytorch.callbacks.GradientAccumulationScheduler({0: 4, 1: 2})
    callbacks = [StepInBackward(), watch, schedule]
    trainer = lightning_of(tmp_path / "ours", callbacks=callbacks, accumulate_grad_batches=1)
    assert watch.gradients == [4, 4, 4, 0, 4, 4, 4, 0, 4, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 0]
    plain = lightning_of(tmp_path / "plain", callbacks=[schedule], accumulate_grad_batches=1)
    assert_same_bits(fitted(trainer), fitted(plain))


@pytest.mark.parametrize("callbacks", [[], [StepInBackward()]], ids=["plain", "in backward"])
def test_lightning_resumes_from_its_checkpoint_to_the_same_bits(callbacks, tmp_path):
    whole = fitted(lightning_of(tmp_path, callbacks=callbacks))
    torch.manual_seed(5)
    resumed = lightning_of(tmp_path / "resumed", resume=tmp_path / "epoch=0-step=4.ckpt", callbacks=callbacks)
    assert resumed.global_step == 8
    assert_same_bits(fitted(resumed), whole)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (lambda: Module({}), {"gradient_clip_val": 0.5}, "gradient_clip_val must be None .*got 0.5"),
        (lambda: Module({}, manual=True), {"accumulate_grad_batches": 1}, "manual optimization; call step_in_backward"),
        (lambda: Module({"kind": torch.optim.SGD, "with": {"lr": 0.1}}), {}, "needs adafactor.Adafactor, got SGD"),
    ],
    ids=["clipping", "manual", "SGD"],
)
def test_what_is_refused_under_lightning(module, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        lightning_of(tmp_path, module(), callbacks=[StepInBackward()], **options)
    assert not _in_backward_guards.live


def test_an_error_during_fit_leaves_nothing_behind(tmp_path):
    class Failing(Module):
        def training_step(self, batch: Any, index: int) -> Any:
            if index == 4:
                raise KeyError
            return super().training_step(batch, index)

    with pytest.raises(KeyError):
        lightning_of(tmp_path, Failing({}), callbacks=[StepInBackward()])
    assert not _in_backward_guards.live


# Several processes


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["transformers_ddp", "transformers_fsdp", "accelerate_ddp", "accelerate_fsdp", "lightning_ddp"]
)
def test_two_processes_step_in_backward_to_the_bits_of_the_plain_step(case, tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [*torchrun, "_trainer_ranks.py", case, str(tmp_path)],
        cwd=Path(__file__).parent,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert done.stdout.count(f"done: {case}") == 2
