"""``adafactor bench --memory``: trains a transformer in every mode, and finds out whose its memory is."""

from __future__ import annotations

import gc
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from adafactor import Adafactor, plan
from adafactor._in_backward_ddp import Buckets, buckets_of
from adafactor.cli import _bench_memory_modes as modes
from adafactor.cli._bench_case import available
from adafactor.cli._bench_memory_modes import Mode
from adafactor.cli._bench_memory_trace import KEPT, Peaks, mark, peaks, watch_gradients
from adafactor.cli._errors import CheckFailed, UserError
from adafactor.cli._model import VOCABULARY, ByteTransformer, Loss, ModelConfig
from adafactor.cli._results import allocated
from adafactor.cli._screen import size

_ROOM = 24  # bytes per parameter that the largest mode may take, activations included


@dataclass(frozen=True)
class Subject:
    """What is trained, and on what.

    Args:
        config: the transformer's size; one window of ``config.context`` random bytes is a batch.
        device: "cpu" or "cuda".
        backend: of ours.
        compiler: the backend of ``torch.compile``.
    """

    config: ModelConfig
    device: str
    backend: str
    compiler: str


def check_room(subject: Subject) -> None:
    """Refuse what the machine cannot hold before it starts to swap or kill.

    Raises:
        UserError: it needs more than is free.
    """
    config = subject.config
    parameters = (VOCABULARY + 12 * config.depth * config.width + 2 * config.depth + 1) * config.width
    free = available(subject.device)
    if free is not None and _ROOM * parameters > free:
        raise UserError(
            f"--memory: {parameters:,} parameters need some {size(_ROOM * parameters)} in AdamW's modes, and "
            f"{size(free)} are free; choose a smaller --width or --depth"
        )


def measure_or_note(mode: Mode, subject: Subject) -> dict[str, Any]:
    """The row of ``measure``, or why there is none; the other modes go on.

    Raises:
        CheckFailed: as ``measure``.
    """
    try:
        return measure(mode, subject)
    except CheckFailed:
        raise
    except Exception as error:
        text = str(error).strip().splitlines()
        note = f"{type(error).__name__}: {text[0] if text else 'no message'}"
        return {"name": mode.name, "title": mode.title, "description": mode.description, "note": note}


def measure(mode: Mode, subject: Subject) -> dict[str, Any]:
    """One row: the peaks of a step, and the state beside its plan.

    Raises:
        CheckFailed: our state is not what ``adafactor.plan`` says.
    """
    found: dict[str, Any] = {}

    def train() -> None:
        with _set_up(mode, subject) as (net, optimizer):
            tokens = torch.randint(VOCABULARY, (1, subject.config.context + 1), device=subject.device)
            for _ in range(3 if isinstance(net, DistributedDataParallel) else 1):  # it makes its buckets anew after one
                _step(net, optimizer, tokens, traced=False)
            _step(net, optimizer, tokens, traced=True)
            found.update(_sizes(mode, net, optimizer))

    torch.manual_seed(0)
    measured = peaks(train, subject.device)
    gc.collect()
    return _row(mode, found, measured)


@contextmanager
def _set_up(mode: Mode, subject: Subject) -> Iterator[tuple[nn.Module, torch.optim.Optimizer]]:
    with ExitStack() as stack:
        model = ByteTransformer(subject.config, seed=0)
        if mode.vocabulary != VOCABULARY:
            model.embedding = nn.Embedding(mode.vocabulary, subject.config.width)
        net = Loss(model).to(subject.device)
        for p in net.parameters():
            p.data = p.data.to(mode.dtype)
            p.register_post_accumulate_grad_hook(_mark_gradient)
        optimizer = mode.build(list(net.named_parameters()), subject.backend)
        if mode.run_as in (modes.BLOCKS, modes.WHOLE):
            stack.callback(torch.compiler.reset)
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # the compiler looks at .grad of what has none, and is warned
            for part in model.blocks if mode.run_as == modes.BLOCKS else [net]:
                part.compile(backend=subject.compiler)
        elif mode.run_as in (modes.DDP, modes.DDP_VIEWS):
            stack.enter_context(_process_group())
            views = mode.run_as == modes.DDP_VIEWS
            net = DistributedDataParallel(net, bucket_cap_mb=1, gradient_as_bucket_view=views)
            if mode.in_backward:
                _mark_buckets(buckets_of(net))
            else:
                net.register_comm_hook(None, _reduce_over_one)
        if mode.in_backward:
            assert isinstance(optimizer, Adafactor)
            stack.enter_context(optimizer.step_in_backward())
        yield net, optimizer


def _mark_gradient(p: Tensor) -> None:
    mark("gradients", [p.grad])


def _mark_buckets(buckets: Buckets) -> None:
    reduce = buckets.reduce

    def marking(bucket: Any) -> torch.futures.Future[Tensor]:
        mark("gradients", [bucket.buffer()])
        return reduce(bucket)

    buckets.reduce = marking


def _reduce_over_one(_, bucket):  # DistributedDataParallel compares annotations, and refuses strings
    """A sum over one process; gloo's threads, which the profiler does not see, would hold on to buckets."""
    mark("gradients", [bucket.buffer()])
    reduced: torch.futures.Future[Tensor] = torch.futures.Future()
    reduced.set_result(bucket.buffer())
    return reduced


@contextmanager
def _process_group() -> Iterator[None]:
    """A group of this process alone."""
    with tempfile.TemporaryDirectory() as directory:
        meeting = Path(directory, "store").as_uri()
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


def _step(net: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, traced: bool) -> None:
    parameters = list(net.parameters())
    optimizer.zero_grad(set_to_none=True)
    if traced:
        mark("weights", parameters)
        mark("state", _state(optimizer))
        mark("begin")
    loss = net(tokens)
    if traced:
        mark("forward")
        watch_gradients(loss, parameters)
    loss.backward()
    if traced:
        mark("gradients", (p.grad for p in parameters))
    optimizer.step()
    if traced:
        mark("state", _state(optimizer))
        mark("end")


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]


def _sizes(mode: Mode, net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What can be known without the record, which has to agree with it."""
    parameters = list(net.parameters())
    ours = isinstance(optimizer, Adafactor)
    return {
        "parameters": sum(p.numel() for p in parameters),
        "largest_gradient": max(p.nbytes for p in parameters),
        "all_gradients": sum(p.nbytes for p in parameters),
        "weights": allocated(parameters),
        "state": allocated(_state(optimizer)),
        "planned_state": sum(t.nbytes for t in plan(net, **mode.config)) if ours else None,
        "backends": sorted({row.backend for row in optimizer.explain()}) if ours else [],
    }


def _row(mode: Mode, found: dict[str, Any], measured: Peaks) -> dict[str, Any]:
    if found["planned_state"] not in (None, found["state"]):
        raise CheckFailed(
            f"no table: in mode {mode.title}, the state takes {found['state']:,} bytes, and adafactor.plan says "
            f"{found['planned_state']:,}"
        )
    kept = {kind: measured.kept[kind] for kind in KEPT}
    parameters = found["parameters"]
    return {
        "name": mode.name,
        "title": mode.title,
        "description": mode.description,
        "note": None,
        "expected": mode.expected,
        "gradients_on_top": mode.gradients_on_top,
        "parameters": parameters,
        "kept": kept,
        "kept_per_parameter": {kind: nbytes / parameters for kind, nbytes in kept.items()},
        "kept_bytes_per_parameter": sum(kept.values()) / parameters,
        "gradients_share": kept["gradients"] / found["all_gradients"],
        "gradients_in_largest": kept["gradients"] / found["largest_gradient"],
        "peak": measured.total,
        "peak_bytes": sum(measured.total.values()),
        "state_bytes": found["state"],
        "planned_state_bytes": found["planned_state"],
        "backends": found["backends"],
    }
