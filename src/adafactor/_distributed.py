"""Sharded parameters: DTensors taken apart into local tensors and a place in the whole; the sums that cross the mesh.

A step needs few numbers from other devices: sums over the rows that lie there. Those of all parameters cross together,
in one flat buffer per process group, which is laid out by the plans alone: the same on every rank, whatever each holds.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from adafactor._hyper import dtype_of
from adafactor._plan import ROWS, SUMS, Crossing, Part, TensorPlan, TensorSpec


def is_dtensor(tensor: Any) -> bool:
    return hasattr(tensor, "device_mesh")  # without importing what only they need


def is_elsewhere(p: Tensor) -> bool:
    """Whether a parameter lies on a mesh that this rank is no part of."""
    return is_dtensor(p) and p.device_mesh.get_coordinate() is None  # type: ignore[attr-defined]


def local(tensor: Any) -> Tensor:
    """What this rank holds of a tensor, there for reading and writing."""
    if not is_dtensor(tensor):
        return tensor
    piece = tensor._local_tensor
    return piece.wait() if hasattr(piece, "trigger_wait") else piece  # an asynchronous collective's result


def whole(tensor: Any) -> Tensor:
    """All of a tensor, gathered from the mesh where it is sharded."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


class Sharding:
    """How one parameter lies on its mesh. Its state lies there in the same way.

    Raises:
        ValueError: for a parameter that is a sum over the mesh (`Partial`), naming it.
    """

    def __init__(self, name: str, p: Any) -> None:
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        self.mesh, self.placements = p.device_mesh, tuple(p.placements)
        for placement in self.placements:
            if not (placement.is_replicate() or hasattr(placement, "dim")):
                raise ValueError(f"parameter {name!r} is placed as {placement}; Adafactor takes Shard and Replicate")
        shape, offset = compute_local_shape_and_global_offset(p.shape, self.mesh, self.placements)
        placed = zip(self.placements, self.mesh.shape, strict=True)
        split = tuple(getattr(placement, "dim", None) if size > 1 else None for placement, size in placed)
        self.part = Part(tuple(shape), tuple(offset), split)
        self.device = local(p).device

    def gradient(self, name: str, g: Any) -> Tensor:
        """The local part of a gradient that lies as its parameter does.

        Raises:
            ValueError: if it does not, naming the parameter.
        """
        if is_dtensor(g) and g.placements == self.placements and g.device_mesh == self.mesh:
            return local(g)
        found = f"placed as {tuple(g.placements)}" if is_dtensor(g) else "no DTensor"
        raise ValueError(
            f"the gradient of parameter {name!r} is {found}, the parameter as {self.placements}: it is not final, or "
            "not sharded as the parameter is; before step(), p.grad = p.grad.redistribute(p.device_mesh, p.placements) "
            "makes it so (parameters of norms under sequence parallelism have such gradients)"
        )

    def zeros(self, spec: TensorSpec) -> Tensor:
        return self._wrap(spec, torch.zeros(self._box(spec)[0], dtype=dtype_of(spec.dtype), device=self.device))

    def place(self, spec: TensorSpec, value: Any, *, copy: bool = False) -> Tensor:
        """A tensor of the whole parameter's state, or of this rank's part of it, as this sharding wants it."""
        dtype = dtype_of(spec.dtype)
        if is_dtensor(value) and (value.device_mesh, tuple(value.placements)) == (self.mesh, self._placements(spec)):
            if not copy and value.dtype == dtype and local(value).device == self.device:
                return value
            piece = local(value)
        else:
            shape, offset = self._box(spec)
            piece = whole(value)
            for axis, (start, size) in enumerate(zip(offset, shape, strict=False)):
                piece = piece.narrow(axis, start, size)
        piece = piece.detach().to(self.device, dtype, copy=True).contiguous()
        return self._wrap(spec, piece)

    def _box(self, spec: TensorSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shape of this rank's part of a state tensor, and where it begins."""
        rest = spec.shape[len(spec.axes) :]
        shape = *(self.part.shape[axis] for axis in spec.axes), *rest
        return shape, (*(self.part.offset[axis] for axis in spec.axes), *(0 for _ in rest))

    def _placements(self, spec: TensorSpec) -> tuple[Any, ...]:
        """The parameter's own, with the dims that are averaged away left out."""
        from torch.distributed.tensor import Replicate

        placements = []
        for placement in self.placements:
            axis = getattr(placement, "dim", None)
            placements.append(_moved(placement, spec.axes.index(axis)) if axis in spec.axes else Replicate())
        return tuple(placements)

    def _wrap(self, spec: TensorSpec, piece: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        if not spec.shape:
            return piece  # `step` is the same everywhere, and torch's own optimizers keep it plain
        stride = torch.empty(spec.shape, device="meta").stride()
        return DTensor.from_local(
            piece, self.mesh, self._placements(spec), run_check=False, shape=torch.Size(spec.shape), stride=stride
        )

    def like(self, p: Any, piece: Tensor) -> Tensor:
        """A tensor of the parameter's shape that lies as it does."""
        every = tuple(range(p.dim()))
        return self._wrap(TensorSpec("", tuple(p.shape), "", every), piece)


def _moved(placement: Any, dim: int) -> Any:
    if placement.dim == dim:
        return placement
    if hasattr(placement, "split_factor"):
        return type(placement)(dim, split_factor=placement.split_factor)
    return type(placement)(dim)


_twins: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def twin(group: Any) -> Any:
    """A process group over the same ranks: what crosses it during backward meets no collective of anybody else's.

    The first call is made by all its ranks, and only by them. `new_group` names what some ranks make by how many groups
    each of them has; a name that begins with this group's is the same on all.
    """
    if group not in _twins:
        from torch.distributed import distributed_c10d as c10d

        ranks = dist.get_process_group_ranks(group)
        backend: Any = dist.get_backend(group)
        name: Any = f"{group.group_name}/adafactor"
        _twins[group], _ = c10d._new_process_group_helper(
            len(ranks),
            dist.get_rank(group),
            ranks,
            c10d.Backend(dist.get_backend_config(group)),
            c10d._get_default_store(),
            name,
            timeout=c10d._get_default_timeout(backend),
            group_desc="adafactor",
        )
        c10d._world.pg_group_ranks[_twins[group]] = {rank: place for place, rank in enumerate(ranks)}
    return _twins[group]


class Member(NamedTuple):
    """One sharded parameter of a step: the plan of the piece that is here, and where it lies."""

    plan: TensorPlan
    sharding: Sharding


class _Waiting(NamedTuple):
    crossing: Crossing
    group: str


@dataclass(frozen=True)
class _Round:
    """One collective.

    Attributes:
        entries: (member, name of the sum, its size), in the buffer's order.
        members: whose gradients are checked to be everywhere or nowhere.
    """

    group: Any
    dtype: torch.dtype
    entries: tuple[tuple[int, str, int], ...]
    members: tuple[int, ...]


class Reduction:
    """The collectives of a step of some sharded parameters: one per process group where that is possible.

    Args:
        members: the parameters, with or without a gradient, in the same order on every rank.
        group_of: the process group to use in place of one of the mesh's.
    """

    def __init__(self, members: Sequence[Member], group_of: Callable[[Any], Any] = lambda group: group) -> None:
        self.members = members
        self._group_of = group_of
        self.before, self.after = self._schedule()
        self._unseen: list[tuple[torch.Event, _Round, Tensor, int]] = []

    def _schedule(self) -> tuple[list[_Round], list[_Round]]:
        groups: dict[str, Any] = {}  # by name, those of a mesh in its order
        pending: list[list[_Waiting]] = []  # of each member
        for member in self.members:
            mesh = member.sharding.mesh
            here = [mesh.get_group(dim) for dim in range(mesh.ndim)]
            groups.update((group.group_name, group) for group in here if group.group_name not in groups)
            crossings = member.plan.crossings
            pending.append([_Waiting(each, here[dim].group_name) for each in crossings for dim in each.dims])
        before = [each for group in groups.values() for each in self._rounds(group, pending, rows=True)]
        after: list[_Round] = []
        while any(pending):
            for group in groups.values():
                after += self._rounds(group, pending, rows=False)
        return before, after

    def _rounds(self, group: Any, pending: list[list[_Waiting]], rows: bool) -> Iterator[_Round]:
        """The collective over one group of all that can cross it now, one for each dtype that there is.

        The means wait for the sums, which they are made from.
        """
        chosen: dict[torch.dtype, list[tuple[int, str, int]]] = {}
        for index, waiting in enumerate(pending):
            plan = self.members[index].plan
            sizes = {spec.name: spec.numel for spec in plan.sums}
            complete = all(each.crossing.stage != SUMS or each.group == group.group_name for each in waiting)
            for each in list(waiting):
                stage = each.crossing.stage
                may = stage == ROWS if rows else stage == SUMS or complete
                if each.group == group.group_name and may:
                    waiting.remove(each)
                    entries = chosen.setdefault(plan.compute_dtype, [])
                    entries += [(index, name, sizes[name]) for name in each.crossing.sums]
        for dtype, entries in chosen.items():
            members = () if rows else tuple(dict.fromkeys(index for index, _, _ in entries))
            yield _Round(self._group_of(group), dtype, tuple(entries), members)

    def rows(self, sums: Sequence[dict[str, Tensor] | None]) -> None:
        """Before the sweep: rows that are split get their sums of g^2.

        `sums` are those of each member's task, None where it has no gradient.
        """
        self._raise_late()
        for each in self.before:
            self._cross(each, sums)

    def complete(self, sums: Sequence[dict[str, Tensor] | None]) -> Iterator[tuple[int, ...]]:
        """After the sweep: makes the sums complete. Yields the members whose "means" are to be filled in now.

        Raises:
            ValueError: at the end, if a gradient is there on some ranks only, naming the parameter. On accelerators
                that parameter's step is skipped, and a later step raises: nobody waits.
        """
        flagged = [own for own in sums if own is not None and "finite" in own]
        for own in flagged:
            for name in ("grad_sq", "row_sum", "param_sq"):
                if name in own:
                    own["finite"] += (own[name] * 0).sum()  # 0, or NaN where the step is not to be taken
        counts, begun = [], set()
        for each in self.after:
            begins = dict.fromkeys(index for index, name, _ in each.entries if name == "means" and index not in begun)
            if begins:
                begun.update(begins)
                yield tuple(begins)
            counts.append(self._cross(each, sums))
        for own in flagged:
            own["grad_sq"] += own["finite"]
        for each, count in zip(self.after, counts, strict=True):
            self._check(each, count, sums)

    def _cross(self, each: _Round, sums: Sequence[dict[str, Tensor] | None]) -> Tensor:
        """Add up over a group. Returns how many ranks have each member's gradient."""
        device = self.members[each.entries[0][0]].sharding.device
        pieces = []
        for index, name, size in each.entries:
            own = sums[index]
            absent = own is None
            pieces.append(torch.zeros(size, dtype=each.dtype, device=device) if absent else own[name].view(-1))
        present = torch.ones(len(each.members), dtype=each.dtype, device=device)
        for place, index in enumerate(each.members):
            if sums[index] is None:
                present[place] = 0
        buffer = torch.cat([*pieces, present])
        dist.all_reduce(buffer, group=each.group)
        *crossed, count = buffer.split([*(piece.numel() for piece in pieces), len(each.members)])
        torch._foreach_copy_(pieces, crossed)  # pyright: ignore[reportPrivateImportUsage]
        return count

    def _check(self, each: _Round, count: Tensor, sums: Sequence[dict[str, Tensor] | None]) -> None:
        size = dist.get_world_size(each.group)
        if count.device.type == "cpu":
            self._raise_partial(each, count, size)
            return
        partial = (count != 0) & (count != size)
        for place, index in enumerate(each.members):
            own = sums[index]
            if own is not None:
                for name in {"grad_sq", "finite"} & own.keys():
                    own[name].masked_fill_(partial[place], float("nan"))
        seen = torch.empty(count.shape, dtype=count.dtype, pin_memory=True).copy_(count, non_blocking=True)
        event = torch.Event(count.device)
        event.record()
        self._unseen.append((event, each, seen, size))

    def _raise_late(self) -> None:
        """What earlier steps have found on an accelerator that nobody waited for."""
        while self._unseen and self._unseen[0][0].query():
            _, each, seen, size = self._unseen.pop(0)
            self._raise_partial(each, seen, size)

    def _raise_partial(self, each: _Round, count: Tensor, size: int) -> None:
        for index, ranks in zip(each.members, count.tolist(), strict=True):
            if ranks not in (0, size):
                raise ValueError(
                    f"parameter {self.members[index].plan.name!r} has a gradient on {ranks:.0f} of the {size} ranks it "
                    "is sharded over; every rank has to use the same parameters in a step"
                )
