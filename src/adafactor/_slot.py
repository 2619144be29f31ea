"""What the optimizer keeps of one parameter from step to step, and rebuilds when the parameter or its group changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adafactor._checks import refuse_flattened
from adafactor._distributed import Sharding, is_dtensor, local
from adafactor._hyper import Hyper
from adafactor._plan import TensorPlan, View, check_parameter, piece_of, tensor_plan
from adafactor._rounding import stream_key
from adafactor._state import Home, OnDevice
from adafactor.backends import NO_GRADIENT, Choice, Kept, Report, Streams, Task, select


@dataclass(slots=True)
class Slot:
    """
    Attributes:
        key: what the plan and the random streams were made from.
        hyper: at the last step.
        plan: of the whole parameter; the task has that of the piece that is here.
        names: of the state tensors.
        choice, served: the backend for the parameter, and what took its place at the last step.
        sharding: of a DTensor.
        is_split: whether sums have to cross a mesh.
        state: at the last step.
    """

    key: tuple
    hyper: Hyper
    plan: TensorPlan
    names: frozenset[str]
    choice: Choice
    served: Choice
    task: Task
    sharding: Sharding | None
    is_split: bool
    state: dict[str, Any] | None = None

    @property
    def home(self) -> Home:
        """Where the state lies."""
        return self.sharding or OnDevice(self.task.p.device)

    def fits(self, p: Tensor, hyper: Hyper, state: dict[str, Any] | None) -> bool:
        """Whether it is still that of the parameter as it is now, with all of its state."""
        if not state or not self.names <= state.keys() or state["step"].device != p.device:
            return False
        if hyper is self.hyper:
            return self.key[0] == _form(p)
        if self.key != _key(p, hyper):
            return False
        self.hyper = hyper
        return True

    def has_moved(self, p: Tensor, hyper: Hyper) -> bool:
        """Whether only device, dtype or memory changed, as trainers do block by block."""
        return self.plan.shape == p.shape and self.key[1:] == _key(p, hyper)[1:]

    def fill(self, hyper: Hyper, p: Tensor, g: Tensor, state: dict[str, Any]) -> None:
        """Give the task this step's gradient and the tensors that are here."""
        task = self.task
        task.hyper, task.g, self.state = hyper, g, state
        if self.sharding is None:
            task.state = state
            return
        task.p, task.g = local(p), self.sharding.gradient(self.plan.name, g)
        task.state = {name: local(state[name]) for name in self.names}

    def take(self, hyper: Hyper, p: Tensor, g: Tensor, state: dict[str, Any] | None) -> bool:
        """The same, if the backend is ready for it: if all else is as it was."""
        task = self.task
        if self.state is not state or state is None or task.hyper is not hyper or self.served is not self.choice:
            return False
        if self.sharding is None:
            task.g = g
        else:
            self.fill(hyper, p, g, state)
        if self.choice.backend.ready(task):
            return True
        task.let_go()
        return False


def slot_of(p: Tensor, name: str, hyper: Hyper, view: View | None, backend: str, old: Slot | None) -> Slot:
    """A new one; counters and what the backend keeps go on from the old one where they still hold.

    Raises:
        ValueError: for a parameter, or a placement of one, that is not taken, or that `backend` cannot serve.
    """
    check_parameter(name, p.dtype)
    refuse_flattened(name, p)
    sharding = Sharding(name, p) if is_dtensor(p) else None
    plan = tensor_plan(name, p.shape, p.dtype, hyper, view, sharding.part.split if sharding else ())
    piece = piece_of(plan, sharding.part) if sharding else plan
    key, choice = _key(p, hyper), select(backend, piece, local(p))
    report, kept, served = Report.of(piece, p.device), Kept(), choice
    if old and old.task.report.values.device == p.device and old.task.plan.dims == piece.dims:
        report = old.task.report
        if (old.key, old.task.plan, old.choice) == (key, piece, choice):
            kept, served = old.task.kept, old.served
    streams = Streams(stream_key(hyper.seed, name), stream_key(hyper.seed, f"{name}/exp_avg"))
    task = Task(piece, hyper, local(p), NO_GRADIENT, {}, None, streams, report, kept)
    names, is_split = frozenset(spec.name for spec in plan.state), bool(piece.crossings)
    return Slot(key, hyper, plan, names, choice, served, task, sharding, is_split)


def _key(p: Tensor, hyper: Hyper) -> tuple:
    momentum = hyper.momentum_dtype if hyper.momentum else None
    structure = hyper.factor, hyper.min_dim_size_to_factor, hyper.rms_scope, hyper.scale_parameter, hyper.weight_bits
    return _form(p), momentum, structure, hyper.seed


def _form(p: Any) -> tuple:
    if is_dtensor(p):
        return p.shape, p.dtype, local(p).is_contiguous(), p.placements, p.device_mesh
    return p.shape, p.dtype, p.is_contiguous()
