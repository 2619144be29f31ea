"""``--shard``: several processes, started by torchrun, that train as one. In one process these functions do nothing."""

from __future__ import annotations

import functools
import os
import re
import shlex
import signal
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adafactor._distributed import is_dtensor
from adafactor.cli._errors import UserError

KINDS = ("fsdp", "hsdp", "ddp")
_LOST = re.compile("[Cc]onnection (closed|reset) by peer|Broken pipe|remote process exited")  # gloo, sockets, nccl


def count(shard: str | None, device: str) -> int:
    """How many processes torchrun started; 1 without it.

    Args:
        shard: one of ``KINDS``; None for a process on its own.
        device: ``cpu`` or ``cuda``.

    Raises:
        UserError: ``shard`` is none of these, or does not go with how this process was started.
    """
    if shard is not None and shard not in KINDS:
        raise UserError(f"--shard must be one of {', '.join(KINDS)}, got {shard!r}")
    if not _launched():
        if shard:
            raise UserError(
                f"--shard {shard} needs processes to share the work; start them with: torchrun --nproc-per-node 2 "
                f"--no-python adafactor ... --shard {shard}"
            )
        return 1
    ranks, here = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if not shard:
        raise UserError(
            f"torchrun started {ranks} process{'es' * (ranks > 1)}, and nothing says how they share the model; add "
            f"--shard {', '.join(KINDS[:-1])} or {KINDS[-1]}, or start adafactor without torchrun"
        )
    if shard == "hsdp" and ranks % 2:
        raise UserError(f"--shard hsdp keeps two sharded copies, so the processes must be even in number, got {ranks}")
    if device == "cuda" and here > torch.cuda.device_count():
        raise UserError(
            f"--device cuda needs one device per process; here are {here} processes and "
            f"{torch.cuda.device_count()} devices; start fewer, or use --device cpu"
        )
    return ranks


def join(device: str) -> None:
    """Meet the other processes, if there are any; ``count`` has been asked."""
    if not _launched():
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # What is said about one number travels by gloo, also on a GPU: it waits for nothing that is queued there.
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, store=_store(), rank=rank, world_size=ranks)
    wait()  # a process that failed now would leave others that are still connecting


def leave() -> None:
    """The end of a run that went well; one that did not just exits, which the other processes notice."""
    if _joined():
        dist.destroy_process_group()


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _joined() else 1


def first() -> bool:
    """Whether this process is the one that prints and writes."""
    return not _joined() or dist.get_rank() == 0


def first_to_fail() -> bool:
    """Whether no other process has reported a failure before; asked once, by whoever is about to."""
    if not _launched():
        return True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, for another that failed: say first what is to be said
    return _store().add("failures", 1) == 1


def lost_another(error: Exception) -> bool:
    """Whether ``error`` is what one sees of another process that is gone."""
    return size() > 1 and bool(_LOST.search(str(error)))


def command(arguments: Sequence[str]) -> str:
    """The line that runs ``adafactor`` with ``arguments`` in as many processes as now."""
    launcher = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "--no-python"] if _joined() else []
    return shlex.join([*launcher, "adafactor", *arguments])


def sharded(loss: nn.Module, blocks: Sequence[nn.Module], shard: str | None) -> nn.Module:
    """What to call in place of ``loss``, whose parameters it shards or keeps equal and whose gradients it averages.

    Args:
        loss: a module on its device.
        blocks: the parts of it that gather their weights one after the other.
        shard: one of ``KINDS``, or None.
    """
    if shard is None:
        return loss
    if shard == "ddp":
        return nn.parallel.DistributedDataParallel(loss)
    from torch.distributed.device_mesh import init_device_mesh  # here, as they take a second to import
    from torch.distributed.fsdp import fully_shard

    device = next(loss.parameters()).device.type
    if shard == "hsdp":
        mesh = init_device_mesh(device, (2, size() // 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device, (size(),))
    for part in (*blocks, loss):
        fully_shard(part, mesh=mesh)
    return loss


def reshard(loss: nn.Module) -> None:
    """Give back the weights that FSDP's outermost part holds on to after a pass without gradients."""
    if hasattr(loss, "reshard"):
        cast(Any, loss).reshard()


def rows(batch: Tensor) -> Tensor:
    """This process's share of a batch that is the same everywhere."""
    return batch.chunk(size())[dist.get_rank()] if _joined() else batch


def mean(value: float) -> float:
    """The average over all processes, the same on each."""
    return _reduced(value, dist.ReduceOp.SUM) / size() if _joined() else value


def largest(value: float) -> float:
    """The largest among all processes, the same on each."""
    return _reduced(value, dist.ReduceOp.MAX) if _joined() else value


def wait() -> None:
    """Go on when all processes have come this far."""
    largest(0)


def same(number: int) -> bool:
    """Whether all processes ask it about the same number, below 2^53."""
    return largest(number) == -largest(-number)


def made_once(make: Callable[[], str]) -> str:
    """What the first process makes, on all of them. An error of its own ends the others too."""
    made = [make() if first() else ""]
    if _joined():
        dist.broadcast_object_list(made)
    return made[0]


def whole(value: Any) -> Any:
    """A sharded tensor gathered: on the first process, and nothing on the others. Anything else is returned."""
    if not is_dtensor(value):
        return value
    gathered = value.full_tensor()
    return gathered.cpu() if first() else None


def placed_like(tensor: Any, value: Any) -> Any:
    """``value`` sharded as ``tensor`` is, where it is a whole tensor of its shape. Anything else is returned."""
    if not is_dtensor(tensor) or not isinstance(value, Tensor) or value.shape != tensor.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)


def _launched() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


@functools.cache
def _store() -> Any:
    """Where torchrun lets its processes meet. It outlives them, so those of a restart meet under names of their own."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, *_ = next(iter(rendezvous("env://")))
    return PrefixStore(f"adafactor, restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def _reduced(value: float, operation: Any) -> float:
    number = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(number, operation)
    return number.item()
