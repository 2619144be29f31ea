"""The GPU kernels of `_triton_kernels.py`: three launches for hundreds of parameters, and no wait for the device.

Parameters are taken in waves whose column sums need little scratch. A wave's table (a row per parameter, and the lists
of what programs do) crosses to the device in one copy from pinned memory; the launches follow it on the same stream.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from itertools import chain
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adafactor._hyper import dtype_name
from adafactor._plan import TensorPlan
from adafactor.backends import Task, _records
from adafactor.backends._records import ready as ready

name = "triton"

OLDEST = (3, 4)  # Triton, of those tried

STRIP_ROWS = 128  # the column sums of a strip cost 16 bytes per column; its elements 8 or more in all
STRIP_LEAST, STRIP_MOST = 1 << 17, 1 << 21  # elements
BLOCK = 1 << 17  # elements that a program of apply takes, in whole rows
PARTIAL_BYTES = 16 << 20  # of column sums in a wave, and of one parameter if it can be
WAVE_BYTES = 1 << 30  # of gradients in a wave
_SWEEP, _APPLY = 1, 2
_ADDRESS = struct.Struct("q")


@lru_cache(maxsize=1)
def _module() -> tuple[Any, str | None]:
    """The kernels, or why there are none."""
    try:
        from adafactor.backends import _triton_kernels
    except ImportError as error:
        return None, f"Triton is not installed ({error}); pip install triton"
    except Exception as error:  # a Triton that does not know this machine or this Python
        return None, f"Triton does not load: {error}"
    found = _triton_kernels.triton.__version__
    if tuple(map(int, found.split(".")[:2])) < OLDEST:
        return None, f"Triton {found} is too old; pip install 'triton>={OLDEST[0]}.{OLDEST[1]}'"
    return _triton_kernels, None


def missing() -> str | None:
    """Why there are no kernels here, or None."""
    return _module()[1]


def describe() -> str:
    return "Triton kernels, interpreted" if _interpreted() else "Triton kernels"


def _interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, one operation after the other, as TRITON_INTERPRET=1 has it."""
    return type(_module()[0].apply).__name__ == "InterpretedFunction"


def refuses_parameter(plan: TensorPlan, p: Tensor) -> str | None:
    """Why the kernels cannot take a parameter, whatever its gradient, or None."""
    if p.device.type == "cpu":
        if missing() or not _interpreted():
            return "it is on the CPU, for which Triton has its interpreter alone (TRITON_INTERPRET=1)"
    elif p.device.type not in ("cuda", "xpu"):
        return f"no kernels for {p.device.type}"
    elif p.device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(p.device) < (8, 0):
        return "Triton needs a GPU of compute capability 8.0 or more"
    elif p.device.type == "xpu" and not torch.xpu.get_device_properties(p.device).has_fp64:
        return "the step size is computed in float64, which this GPU lacks"
    if plan.factored and plan.dims[2] >= 1 << 28:
        return "its rows are too long for offsets of 32 bits"
    return missing() or _records.refuses_parameter(plan, p)


def refuses(task: Task) -> str | None:
    """Why the kernels cannot take this task, or None."""
    plan = task.plan
    refusal = _records.refuses(task, sums_of_squares=plan.dims[0] * cut(plan.factored, plan.dims).blocks)
    if refusal is None:
        task.kept.kind = _Kind.of(task)
    return refusal


def step(tasks: Sequence[Task]) -> None:
    _run(tasks, _SWEEP | _APPLY)


def sweep(tasks: Sequence[Task]) -> None:
    for task in tasks:
        if task.plan.factored:
            matrices, rows, _ = task.plan.dims
            task.rows = torch.empty(matrices, rows, dtype=torch.float32, device=task.p.device)
    _run(tasks, _SWEEP)


def apply(tasks: Sequence[Task]) -> None:
    _run(tasks, _APPLY)


# Cutting: by the shape alone, so that a parameter's sums have one order, alone or among others.


class Cut(NamedTuple):
    """How one parameter is cut: matrices into strips of rows for sweep and blocks for apply, columns into chunks."""

    matrices: int
    rows: int  # 0 for a full V
    cols: int
    strip_rows: int  # of a full V: elements
    strips: int  # in a matrix
    block_rows: int
    blocks: int
    chunks: int
    padded: int  # columns, as partial sums have them
    width: int  # of a tile in sweep, or 0 where rows are wider than any


@lru_cache(maxsize=4096)
def cut(factored: bool, dims: tuple[int, int, int]) -> Cut:
    kernels, (matrices, n, m) = _module()[0], dims
    if not factored:
        pieces = -(-m // kernels.FULL)
        return Cut(1, 0, m, kernels.FULL, pieces, kernels.FULL, pieces, 1, 0, 0)
    block_rows = 1 << max(BLOCK // m, 1).bit_length() - 1
    rows = min(max(STRIP_ROWS, STRIP_LEAST // m), max(STRIP_MOST // m, 1))
    most = max(PARTIAL_BYTES // (8 * m * matrices), 1)
    rows = max(rows, -(-n // most))
    rows = -(-rows // block_rows) * block_rows if rows > block_rows else rows
    block_rows = min(block_rows, rows)
    padded = -(-m // kernels.CHUNK) * kernels.CHUNK
    width = next((width for width in kernels.WIDTHS if m <= width), 0)
    return Cut(
        matrices, n, m, rows, -(-n // rows), block_rows, -(-n // block_rows), padded // kernels.CHUNK, padded, width
    )


# Waves


class Wave(NamedTuple):
    """Parameters that are launched together.

    Attributes:
        members: which of the tasks.
        cuts: the numbers of each row that follow `lr_at`, packed.
        lists: what the programs of sweep, finalize and apply take, `parameter << 32 | index` each.
        scratch: float32 numbers.
    """

    members: range
    cuts: tuple[bytes, ...]
    lists: tuple[bytes, bytes, bytes]
    scratch: int


@lru_cache(maxsize=1024)
def waves(cuts: tuple[Cut, ...], itemsize: int) -> tuple[Wave, ...]:
    """Parameters in their order, as many at a time as there is room for their column sums."""
    found, begin, partial, gradient = [], 0, 0, 0
    for index, one in enumerate(cuts):
        partial_bytes = 8 * one.matrices * one.strips * one.padded
        gradient_bytes = one.matrices * max(one.rows, 1) * one.cols * itemsize
        if index > begin and (partial + partial_bytes > PARTIAL_BYTES or gradient + gradient_bytes > WAVE_BYTES):
            found.append(_wave(range(begin, index), cuts))
            begin, partial, gradient = index, 0, 0
        partial, gradient = partial + partial_bytes, gradient + gradient_bytes
    return (*found, _wave(range(begin, len(cuts)), cuts))


def _wave(members: range, cuts: Sequence[Cut]) -> Wave:
    kernels, used, packed = _module()[0], 0, []
    strips, chunks, blocks = [], [], []
    for task, index in enumerate(members):
        one = cuts[index]
        sizes = (
            one.matrices * one.strips * 2 * one.padded,
            one.matrices * one.strips * kernels.STRIP_SUMS,
            one.matrices * one.rows,
            one.matrices * one.cols * bool(one.rows),
            one.matrices * one.cols * bool(one.rows),
            one.matrices * one.chunks,
            one.matrices * kernels.TOTALS + kernels.ABOUT_STEP,
        )
        places = []
        for size in sizes:
            places.append(used)
            used += -(-size // 4) * 4  # 16 bytes
        packed.append(struct.pack(f"{len(kernels.CUT) - 1}q", *one[3:], *places))
        strips += [(one.strip_rows * max(one.cols, 1), task << 32 | k) for k in range(one.matrices * one.strips)]
        chunks += [task << 32 | k for k in range(one.matrices * one.chunks)]
        blocks += [task << 32 | k for k in range(one.matrices * one.blocks)]
    strips.sort(key=lambda strip: -strip[0])  # long ones first; what is left over at the end is then short
    blocks.reverse()  # what the sweep read last may still be in the cache
    lists = array("q", [item for _, item in strips]), array("q", chunks), array("q", blocks)
    return Wave(members, tuple(packed), tuple(each.tobytes() for each in lists), used)  # type: ignore[arg-type]


# Launching


class _Kind(NamedTuple):
    """What the kernels are compiled for."""

    device: torch.device
    P: torch.dtype
    G: torch.dtype
    M: torch.dtype | None
    PLANES: int
    STOCHASTIC: bool
    ALIGNED: bool

    @classmethod
    def of(cls, task: Task) -> _Kind:
        p, g, state, plan = task.p, task.g, task.state, task.plan
        momentum = state.get("exp_avg", state.get("exp_avg_code"))
        tensors = [
            p,
            *(state[name] for name in (*plan.planes, "exp_avg", "exp_avg_code", "exp_avg_sq") if name in state),
        ]
        aligned = not any(tensor.data_ptr() % 16 for tensor in tensors)
        aligned = aligned and (not plan.factored or plan.dims[2] % 16 == 0)
        kept = None if momentum is None else momentum.dtype
        stochastic = task.hyper.rounding == "stochastic"
        return cls(p.device, p.dtype, g.dtype, kept, len(plan.planes), stochastic, aligned)


class _Loaded(NamedTuple):
    """A wave's table and lists, on the device."""

    wave: Wave
    table: Tensor
    strips: Tensor
    chunks: Tensor
    blocks: Tensor


def _run(tasks: Sequence[Task], phases: int) -> None:
    kinds: dict[_Kind, list[Task]] = {}
    for task in tasks:
        kind = task.kept.kind
        kinds.setdefault(kind._replace(ALIGNED=False) if task.g.data_ptr() % 16 else kind, []).append(task)
    for kind, batch in kinds.items():
        with nullcontext() if kind.device.type == "cpu" else torch.get_device_module(kind.device).device(kind.device):
            _run_kind(kind, batch, phases)


def _run_kind(kind: _Kind, tasks: list[Task], phases: int) -> None:
    kernels, versions = _module()[0], _records.versions_of(tasks)
    G, P, M = (_element(dtype) for dtype in (kind.G, kind.P, kind.M))
    read = {"G": G, "ALIGNED": kind.ALIGNED}
    written = {**read, "P": P, "M": M, "PLANES": kind.PLANES, "STOCHASTIC": kind.STOCHASTIC}
    if phases & _SWEEP:
        known = map(_records.knows_param_sq, tasks, versions)
        unknown = [task for task, known in zip(tasks, known, strict=True) if task.hyper.scale_parameter and not known]
        for each in _load(kind.device, unknown):
            scratch = torch.ones(each.wave.scratch, dtype=torch.float32, device=kind.device)
            launch(kernels.apply, each.table, each.blocks, scratch, 1, **written)
    halves = (phases & _SWEEP and kernels.COMBINE) | (phases & _APPLY and kernels.PREPARE)
    for each in _load(kind.device, tasks):
        scratch = torch.empty(each.wave.scratch, dtype=torch.float32, device=kind.device)
        if phases & _SWEEP:
            launch(kernels.sweep, each.table, each.strips, scratch, **read)
        launch(kernels.finalize, each.table, each.chunks, scratch, halves)
        if phases & _APPLY:
            launch(kernels.apply, each.table, each.blocks, scratch, 0, **written)
    if phases & _APPLY:
        _records.after_write(tasks, versions)
        if _capturing(kind.device):  # nothing has run: whether the graph's sums of p^2 hold, only its replays know
            for task in tasks:
                task.kept.version = None


def launch(kernel: Any, table: Tensor, items: Tensor, scratch: Tensor, *arguments: int, **constants: Any) -> None:
    """One kernel, a program for each item."""
    kernel[(len(items),)](table, items, scratch, *arguments, **constants, **options_of(kernel))


def options_of(kernel: Any) -> dict[str, Any]:
    """Products and sums stay apart: fused, they would have other bits than the reference's."""
    kernels = _module()[0]
    return {"num_warps": kernels.SWEEP_WARPS if kernel is kernels.sweep else kernels.WARPS, "enable_fp_fusion": False}


def _element(dtype: torch.dtype | None) -> Any:
    return None if dtype is None else getattr(_module()[0].tl, dtype_name(dtype))


def _load(device: torch.device, tasks: list[Task]) -> list[_Loaded]:
    if not tasks:
        return []
    cuts = tuple(cut(task.plan.factored, task.plan.dims) for task in tasks)
    todo, parts = waves(cuts, tasks[0].g.element_size()), []
    for wave in todo:
        members = [tasks[index] for index in wave.members]
        parts += [_table(members, wave), *wave.lists]
    there = iter(_upload(device, parts))
    return [_Loaded(wave, *(next(there) for _ in range(4))) for wave in todo]


def _table(tasks: list[Task], wave: Wave) -> bytes:
    """The rows: records, where lr is if it lies on the device, and cuts."""
    for task in tasks:
        if on_device(task.lr, task.p.device):
            task.lr = task.lr.to(task.p.device)  # type: ignore[union-attr]  # the task keeps it alive
    at = [task.lr.data_ptr() if on_device(task.lr, task.p.device) else 0 for task in tasks]  # type: ignore[union-attr]
    numbers = [math.nan if address else _records.number(task.lr) for address, task in zip(at, tasks, strict=True)]
    records = memoryview(_records.table(tasks, _records.versions_of(tasks), numbers))
    rows = [records[start : start + _records.BYTES] for start in range(0, len(records), _records.BYTES)]
    return b"".join(chain.from_iterable(zip(rows, map(_ADDRESS.pack, at), wave.cuts, strict=True)))


def on_device(lr: Any, device: torch.device) -> bool:
    """Whether lr is a tensor whose value nobody waits for: kernels read it where it is."""
    return isinstance(lr, Tensor) and "cpu" not in (lr.device.type, device.type)


# To the device


class _Pinned(NamedTuple):
    """Host memory, and when the last copy from it is done."""

    memory: Tensor
    copied: Any


# By device, stream and size, the one used longest ago in front: where that is not free yet, none is.
_rings: dict[tuple[torch.device, int, int], deque[_Pinned]] = {}
# For CUDA graphs: while one is captured, nothing can be allocated or waited for.
_reserve: dict[torch.device, Tensor] = {}
_captured: list[Tensor] = []  # what graphs copy from whenever they are replayed
_RESERVE = 1 << 18  # int64
_lock = Lock()  # autograd steps parameters in threads of its own


def _upload(device: torch.device, parts: list[bytes]) -> list[Tensor]:
    """In one copy; each part begins at a multiple of 16 bytes."""
    words = torch.frombuffer(bytearray(b"".join(part + bytes(-len(part) % 16) for part in parts)), dtype=torch.int64)
    there = words if device.type == "cpu" else _copied(device, words)
    places = there.split([-(-len(part) // 16) * 2 for part in parts])
    return [place[: len(part) // 8] for place, part in zip(places, parts, strict=True)]


def _copied(device: torch.device, words: Tensor) -> Tensor:
    """The same on the device, without a wait for it."""
    there, size = torch.empty_like(words, device=device), len(words)
    with _lock:
        reserve = _reserve.get(device)
        if _capturing(device):
            if reserve is None or len(reserve) < size:  # no step came before, or not one like this
                reserve = _pinned(size)
            memory, _reserve[device] = reserve[:size], reserve[size:]
            _captured.append(memory)
            there.copy_(memory.copy_(words), non_blocking=True)
            return there
        module, room = torch.get_device_module(device), 1 << (size - 1).bit_length()
        ring = _rings.setdefault((device, module.current_stream().stream_id, room), deque())
        if not ring or not ring[0].copied.query():
            ring.appendleft(_Pinned(_pinned(room), module.Event()))
        slot = ring[0]
        there.copy_(slot.memory[:size].copy_(words), non_blocking=True)
        slot.copied.record()
        ring.rotate(-1)
        if reserve is None or len(reserve) < 4 * size:  # as many as a step may take: two kinds, RMS(p) measured first
            _reserve[device] = _pinned(max(_RESERVE, 4 * size))
    return there


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.int64, pin_memory=True)
