"""What two processes do in the tests of trainers: stepping in backward beside the plain step. Run under torchrun."""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from accelerate import state
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

import test_trainer_transformers as hf
import test_trainers as loops
from _cases import assert_same_bits
from _trainers import IN_BACKWARD, SETTINGS
from adafactor import Adafactor
from adafactor.integrations.lightning import StepInBackward


def compare(ours: dict[str, Any], plain: dict[str, Any]) -> None:
    assert dist.get_world_size() == 2
    local = [{name: getattr(t, "_local_tensor", t) for name, t in each.items()} for each in (ours, plain)]
    assert_same_bits(*local)


def transformers_ddp(folder: Path) -> None:
    results = []
    for arguments in (IN_BACKWARD, SETTINGS):
        trainer = hf.trainer_of(folder, (Adafactor, arguments), ddp_backend="gloo")
        assert isinstance(trainer.model_wrapped, DistributedDataParallel)
        results.append((hf.logged(trainer, "loss"), *hf.logged(trainer, "grad_norm"), hf.result_of(trainer)))
    (losses, first, *norms, ours), (plain_losses, _, *plain_norms, plain) = results
    assert math.isnan(first)  # the gradients were gone
    assert (losses, norms) == (plain_losses, plain_norms)
    compare(ours, plain)


def accelerate_ddp(folder: Path) -> None:
    compare(loops.accelerated(IN_BACKWARD), loops.accelerated(SETTINGS))


def transformers_fsdp(folder: Path) -> None:
    let_accelerate_shard_on_cpus()
    wrap = {"fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    options: dict[str, Any] = {"ddp_backend": "gloo", "fsdp": True, "fsdp_config": wrap | {"version": 2}}
    options |= {"save_strategy": "steps", "save_steps": 3}
    trainer = hf.trainer_of(folder, (Adafactor, IN_BACKWARD), **options)
    assert issubclass(type(trainer.model_wrapped), FSDPModule)
    ours = hf.result_of(trainer)
    compare(
        ours, hf.result_of(hf.trainer_of(folder, (Adafactor, IN_BACKWARD), resume=folder / "checkpoint-3", **options))
    )
    compare(ours, hf.result_of(hf.trainer_of(folder, (Adafactor, SETTINGS), **options)))


def accelerate_fsdp(folder: Path) -> None:
    let_accelerate_shard_on_cpus()
    results = []
    for arguments in (IN_BACKWARD, SETTINGS):
        plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Linear"]
        )
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3, fsdp_plugin=plugin)
        model: Any = loops.layers()
        optimizer = Adafactor(model.named_parameters(), **arguments)
        model, optimizer, data = accelerator.prepare(model, optimizer, loops.rows())
        alive: list[int] = []
        norm: Any = None
        for _ in range(2):
            for batch in data:
                with accelerator.accumulate(model):
                    accelerator.backward(loops.loss_of(model, batch))
                    alive.append(sum(p.grad is not None for p in model.parameters()))
                    norm = accelerator.clip_grad_norm_(model.parameters(), float("inf"))
                    optimizer.step()
                    optimizer.zero_grad()
        results.append((alive, float(norm.full_tensor()), loops.everything(model, optimizer)))
        state.AcceleratorState._reset_state(True)
    (alive, norm, ours), (_, plain_norm, plain) = results
    assert alive[2:6:3] == [4, 0]  # the first iteration is stepped by `step()`: its parameters were exchanged
    assert norm == plain_norm
    compare(ours, plain)


def let_accelerate_shard_on_cpus() -> None:
    """It has no FSDP for CPUs; nothing but this keeps it from there."""
    start = state.AcceleratorState.__init__

    def started(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        start(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    state.AcceleratorState.__init__ = started


def lightning_ddp(folder: Path) -> None:
    warnings.simplefilter("ignore")
    options: dict[str, Any] = {"strategy": "ddp", "devices": 2}
    watch = loops.Watch()
    ours = loops.fitted(loops.lightning_of(folder / "ours", callbacks=[StepInBackward(), watch], **options))
    assert watch.gradients == 2 * [4, 4, 0, 4, 4, 0]  # each has every second of the eleven batches
    compare(ours, loops.fitted(loops.lightning_of(folder / "plain", **options)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](Path(sys.argv[2]))
    print(f"done: {sys.argv[1]}", flush=True)
    dist.destroy_process_group()
