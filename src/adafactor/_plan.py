"""The plan: from shape, dtype and hyperparameters alone, how one parameter is treated.

Everything else asks the plan: the optimizer allocates from it, backends index by it, checkpoints are checked
against it, the memory planner adds it up. It is plain data and needs no tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch.nn.parameter import is_lazy

from adafactor._hyper import (
    DEFAULTS,
    PARAMETER_DTYPES,
    Hyper,
    check_backend,
    dtype_name,
    dtype_of,
    resolve,
)
from adafactor._rounding import MOMENTUM_BLOCK, PLANES

Axes = tuple[int, ...]
Shape = tuple[int, ...]


class View(NamedTuple):
    """Which axes of a tensor are a batch of independent matrices, which are rows, which are columns."""

    batch: Axes
    rows: Axes
    cols: Axes

    @property
    def order(self) -> Axes:
        return self.batch + self.rows + self.cols

    @property
    def swapped(self) -> View:
        return View(self.batch, self.cols, self.rows)


class Part(NamedTuple):
    """The piece of a parameter that one process holds.

    Attributes:
        shape: the piece's.
        offset: where it begins in the whole, along each axis.
        split: the axis that each dim of the device mesh splits, or None.
    """

    shape: Shape
    offset: Shape
    split: tuple[int | None, ...]

    def dims(self, axes: Axes) -> tuple[int, ...]:
        """The dims of the mesh that split any of these axes."""
        return tuple(dim for dim, axis in enumerate(self.split) if axis in axes)


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of one tensor; the axes of the parameter that its first axes are."""

    name: str
    shape: Shape
    dtype: str
    axes: Axes = ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * dtype_of(self.dtype).itemsize


class Crossing(NamedTuple):
    """Sums that are added up over dims of the mesh.

    Attributes:
        stage: ROWS before the sweep, SUMS after it, or MEANS when RMS(U) of the piece is known.
    """

    stage: int
    sums: tuple[str, ...]
    dims: tuple[int, ...]


ROWS, SUMS, MEANS = range(3)


@dataclass(frozen=True)
class TensorPlan:
    """How one parameter is treated, or the piece of a sharded one that is here.

    Attributes:
        name: the parameter's name, or "param 3" where the optimizer does not know it.
        shape, dtype: the parameter's own, or the piece's.
        view: the matrix view, or None where the full second moment V is kept.
        state: the state tensors. A row statistic has the parameter's shape without the column axes, a column
            statistic the shape without the row axes, so that each keeps the parameter's own sharding.
        sums: the partial sums that one sweep over the gradient leaves behind, `[matrices]` or
            `[matrices, columns]` each. Where a matrix is split over devices, these are what crosses the mesh.
        shared_rms: RMS(U) and RMS(p) are taken over the whole tensor, not matrix by matrix.
        planes: the state tensors that keep the missing bits of the weights, of which there may be none.
        row_stat, col_stat: the state tensors that go with the view's rows and columns.
        whole: the shape of the whole parameter.
        offset: where the piece begins in it, along each axis.
        crossings: which sums cross which dims of the mesh, in the order in which they have to.
    """

    name: str
    shape: Shape
    dtype: str
    view: View | None
    state: tuple[TensorSpec, ...]
    sums: tuple[TensorSpec, ...]
    shared_rms: bool
    planes: tuple[str, ...]
    row_stat: str
    col_stat: str
    whole: Shape
    offset: Shape
    crossings: tuple[Crossing, ...]

    @property
    def factored(self) -> bool:
        return self.view is not None

    @property
    def order(self) -> Axes:
        """The parameter's axes in the order batch, rows, columns."""
        return self.view.order if self.view else tuple(range(len(self.shape)))

    @cached_property
    def dims(self) -> tuple[int, int, int]:
        """(matrices, rows, columns); a tensor that keeps the full V counts as one row."""
        return _dims(self.shape, self.view)

    @cached_property
    def whole_dims(self) -> tuple[int, int, int]:
        """Those of the whole parameter."""
        return _dims(self.whole, self.view)

    @property
    def compute_dtype(self) -> torch.dtype:
        return _compute_dtype(self.dtype)

    @property
    def row_axes(self) -> Axes:
        """The axes of a row statistic, in the view's order."""
        assert self.view is not None
        return self.view.batch + self.view.rows

    @property
    def col_axes(self) -> Axes:
        """The axes of a column statistic, in the view's order."""
        assert self.view is not None
        return self.view.batch + self.view.cols

    @property
    def nbytes(self) -> int:
        """Bytes of optimizer state, as allocated."""
        return sum(spec.nbytes for spec in self.state)

    @property
    def crossing_bytes(self) -> int:
        """Bytes that this rank gives to a step's collectives, with the one number that says its gradient is here."""
        sizes = {spec.name: spec.numel for spec in self.sums}
        numbers = sum(sizes[name] * len(crossing.dims) for crossing in self.crossings for name in crossing.sums)
        present = len({dim for crossing in self.crossings if crossing.stage != ROWS for dim in crossing.dims})
        return (numbers + present) * self.compute_dtype.itemsize

    def describe_view(self) -> str:
        """`"32128 x 768"`, `"8 of 512 x 2048"` for a stack, `"full"`."""
        if self.view is None:
            return "full"
        matrices, rows, cols = self.dims
        return f"{matrices} of {rows} x {cols}" if self.view.batch else f"{rows} x {cols}"


def tensor_plan(
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype | str,
    hyper: Hyper,
    view: View | None,
    split: tuple[int | None, ...] = (),
) -> TensorPlan:
    """The plan of one parameter whose view has been chosen (by `choose_view`), split over a mesh as `Part.split` says.

    Raises:
        ValueError: for a float16 parameter where `weight_bits` is set; wider ones have those bits already.
    """
    shape, dtype = tuple(shape), dtype_name(dtype)
    if hyper.weight_bits and dtype == "float16":
        raise ValueError(
            f"weight_bits={hyper.weight_bits} keeps the missing bits of bfloat16 weights, and parameter {name!r} is "
            "float16; convert it to bfloat16, or put it into a group with weight_bits=None"
        )
    compute, every = dtype_name(_compute_dtype(dtype)), tuple(range(len(shape)))
    state = [TensorSpec("step", (), "float32")]
    if view is None:
        state.append(TensorSpec("exp_avg_sq", shape, compute, every))
    else:
        for stat, averaged in (("exp_avg_sq_row", view.cols), ("exp_avg_sq_col", view.rows)):
            axes = tuple(axis for axis in every if axis not in averaged)
            state.append(TensorSpec(stat, tuple(shape[axis] for axis in axes), compute, axes))
    if hyper.momentum:
        kept = hyper.momentum_dtype
        if kept == "int8" and view is not None and any(axis in view.cols for axis in split):
            kept = "bfloat16"  # blocks that share a scale would lie across devices
        if kept == "float32" or (kept == "int8" and view is None):
            kept = compute  # one byte needs rows to share scales along
        if kept == "int8" and view is not None:
            axes = state[1].axes
            blocks = -(-math.prod(shape[axis] for axis in view.cols) // MOMENTUM_BLOCK)
            # Not "exp_avg": who reads a checkpoint by name alone would take codes for values.
            state.append(TensorSpec("exp_avg_code", shape, kept, every))
            state.append(TensorSpec("exp_avg_scale", (*state[1].shape, blocks), "float32", axes))
        else:
            state.append(TensorSpec("exp_avg", shape, kept, every))
    planes = PLANES[hyper.weight_bits] if hyper.weight_bits and dtype == "bfloat16" else ()
    state += [TensorSpec(plane, shape, "uint8", every) for plane in planes]
    return TensorPlan(
        name=name,
        shape=shape,
        dtype=dtype,
        view=view,
        state=tuple(state),
        sums=_sums(_dims(shape, view), compute, hyper.scale_parameter, view is not None),
        shared_rms=hyper.rms_scope == "tensor",
        planes=planes,
        row_stat="exp_avg_sq_row",
        col_stat="exp_avg_sq_col",
        whole=shape,
        offset=(0,) * len(shape),
        crossings=(),
    )


def piece_of(plan: TensorPlan, part: Part) -> TensorPlan:
    """The plan of the piece that one process holds.

    A sweep adds up columns across rows that may be elsewhere, but has to see rows in one piece. So where columns are
    split, the view's rows and columns change roles; where both are, the sums over rows cross first.
    """
    view, scaled = plan.view, any(spec.name == "param_sq" for spec in plan.sums)
    first = next((axis for axis in part.split if view and axis is not None and axis not in view.batch), None)
    swaps = view is not None and first in view.cols
    if view is not None and swaps:
        view = view.swapped
    dims, compute = _dims(part.shape, view), dtype_name(plan.compute_dtype)
    sums = list(_sums(dims, compute, scaled, view is not None))
    names = tuple(spec.name for spec in sums)
    if view is None:
        crossings = [Crossing(SUMS, names, part.dims(tuple(range(len(part.shape)))))]
    else:
        matrices, rows, _ = dims
        by_row, by_col, by_matrix = part.dims(view.rows), part.dims(view.cols), part.dims(view.batch)
        means = by_col + by_matrix * plan.shared_rms
        crossings = [
            Crossing(ROWS, ("row_sq",), by_col),
            Crossing(SUMS, names, by_row),
            Crossing(SUMS, ("finite",), by_row + by_col + by_matrix if by_col + by_matrix else ()),
            Crossing(MEANS, ("means",), means),
        ]
        if by_col + by_matrix:
            sums.append(TensorSpec("finite", (1,), compute))
        if by_col:
            sums.append(TensorSpec("row_sq", (matrices, rows), compute))
        if means:
            sums.append(TensorSpec("means", (2, 1 if plan.shared_rms else matrices), compute))
    return replace(
        plan,
        shape=part.shape,
        view=view,
        state=tuple(
            replace(spec, shape=(*(part.shape[axis] for axis in spec.axes), *spec.shape[len(spec.axes) :]))
            for spec in plan.state
        ),
        sums=tuple(sums),
        row_stat=plan.col_stat if swaps else plan.row_stat,
        col_stat=plan.row_stat if swaps else plan.col_stat,
        offset=part.offset,
        crossings=tuple(crossing for crossing in crossings if crossing.dims),
    )


def _sums(dims: tuple[int, int, int], compute: str, scaled: bool, factored: bool) -> tuple[TensorSpec, ...]:
    matrices, _, cols = dims
    if factored:
        sums = {"grad_sq": (matrices,), "row_sum": (matrices,), "param_sq": (matrices,)}
        sums |= {"col_sq": (matrices, cols), "col_ratio": (matrices, cols)}
    else:
        sums = {"grad_sq": (1,), "update_sq": (1,), "param_sq": (1,)}
    if not scaled:
        del sums["param_sq"]
    return tuple(TensorSpec(key, size, compute) for key, size in sums.items())


def _dims(shape: Shape, view: View | None) -> tuple[int, int, int]:
    if view is None:
        return 1, 1, math.prod(shape)
    return tuple(math.prod(shape[axis] for axis in axes) for axes in view)  # type: ignore[return-value]


def choose_view(shape: Sequence[int], rule: str, minimum: int) -> View | None:
    """The factoring rule: which matrices a tensor is seen as, or None where it keeps the full V.

    Both sides of a matrix must reach `minimum`. Rules:
        "auto": a 3-D tensor whose last two dims both reach the minimum is a stack of matrices; any other tensor of two
            or more dims is one matrix, split where the state is least.
        "last2": the last two axes; all others are a stack.
        "first2": the first two axes of a tensor of three or more dims (timm's convolutions), else the last two.
        "largest2": the two largest axes, the larger one as columns (ties: the later axes).
        "none": never.
    """
    shape, ndim = tuple(shape), len(shape)
    if ndim < 2 or rule == "none" or 0 in shape:
        return None
    if rule == "auto" and (ndim != 3 or min(shape[-2:]) < minimum):
        splits = [(math.prod(shape[:k]), math.prod(shape[k:]), k) for k in range(1, ndim)]
        k = min(((n + m, k) for n, m, k in splits if min(n, m) >= minimum), default=(0, 0))[1]
        return View((), tuple(range(k)), tuple(range(k, ndim))) if k else None
    if rule == "first2" and ndim > 2 and min(shape[:2]) >= minimum:
        rows, cols = 0, 1
    elif rule == "largest2":
        rows, cols = sorted(range(ndim), key=shape.__getitem__)[-2:]
    else:
        rows, cols = ndim - 2, ndim - 1
    if min(shape[rows], shape[cols]) < minimum:
        return None
    return View(tuple(axis for axis in range(ndim) if axis not in (rows, cols)), (rows,), (cols,))


def resolve_factor(factor: Callable[[str, Shape], Any], params: Iterable[tuple[str, Shape]]) -> str:
    """The views that a function of (name, shape) chooses, as JSON: param groups, and so checkpoints, hold a string."""
    return json.dumps([_checked_view(factor(name, shape), name, shape) for name, shape in params])


def view_of(factor: str, index: int, name: str, shape: Shape, minimum: int) -> View | None:
    """The view of the `index`-th parameter of a group whose `factor` is resolved.

    Raises:
        ValueError: if the views that a function chose, or a checkpoint brought, are not those of this parameter.
    """
    if not factor.startswith("["):
        return choose_view(shape, factor, minimum)
    views = _parsed(factor)
    if index >= len(views):
        raise ValueError(f"factor was a function when its group was made and has no view for {name!r}; set it anew")
    return _checked_view(views[index], name, shape)


@lru_cache
def _parsed(views: str) -> list[Any]:
    return json.loads(views)


def check_parameter(name: str, dtype: torch.dtype | str) -> None:
    if dtype_name(dtype) not in PARAMETER_DTYPES:
        raise ValueError(
            f"parameter {name!r} has dtype {dtype_name(dtype)}; Adafactor takes {', '.join(PARAMETER_DTYPES)}"
            + ("; torch.view_as_real gives a real view of a complex one" if "complex" in dtype_name(dtype) else "")
        )


def plan(model_or_shapes: Any, *, ranks: int = 1, **kwargs: Any) -> list[TensorPlan]:
    """How `Adafactor(params, **kwargs)` would treat each parameter, without allocating anything.

    Args:
        model_or_shapes: a module (on any device, "meta" included), an iterable of tensors or of (name, tensor) pairs,
            or a mapping from names to shapes or tensors. Bare shapes are float32. Frozen parameters have no state and
            are left out.
        ranks: over how many ranks FSDP2 shards every parameter, along its first axis; the plans are then those of the
            first rank's pieces, which are the largest (default: 1)
        **kwargs: the arguments of `Adafactor`.

    Returns:
        One `TensorPlan` per parameter, in order; the sum of `.nbytes` is what the optimizer allocates, on each rank,
        and that of `.crossing_bytes` what a step adds up across ranks.

    Example:
        >>> [matrix] = plan({"weight": (32128, 768)})
        >>> matrix.describe_view(), matrix.nbytes
        ('32128 x 768', 131588)
    """
    if unknown := kwargs.keys() - DEFAULTS.keys() - {"backend"}:
        raise TypeError(f"Adafactor has no argument {', '.join(sorted(unknown))}; it has {', '.join(DEFAULTS)}")
    check_backend(kwargs.get("backend", "auto"))
    group = {**DEFAULTS, **kwargs}
    params = named_shapes(model_or_shapes)
    if callable(group["factor"]):
        group["factor"] = resolve_factor(group["factor"], [(name, shape) for name, shape, _ in params])
    resolve(group)
    hyper = Hyper.of(group)
    views = (
        view_of(hyper.factor, index, name, shape, hyper.min_dim_size_to_factor)
        for index, (name, shape, _) in enumerate(params)
    )
    if ranks == 1:
        return [tensor_plan(*param, hyper, view) for param, view in zip(params, views, strict=True)]
    if not isinstance(ranks, int) or ranks < 1:
        raise ValueError(f"ranks must be an integer >= 1, got {ranks!r}")
    pieces = []
    for (name, shape, dtype), view in zip(params, views, strict=True):
        split = (0,) if shape else (None,)  # FSDP2 leaves no scalar to be split
        part = Part(first_piece(shape, ranks), (0,) * len(shape), split)
        pieces.append(piece_of(tensor_plan(name, shape, dtype, hyper, view, split), part))
    return pieces


def first_piece(shape: Shape, ranks: int) -> Shape:
    """What the first of so many ranks holds of a parameter, split along its first axis as torch.chunk does."""
    return (-(-shape[0] // ranks), *shape[1:]) if shape else shape


def named_shapes(model_or_shapes: Any, *, frozen: bool = False) -> list[tuple[str, Shape, str]]:
    """(name, shape, dtype) of everything `plan` takes; of frozen parameters, which have no state, only if asked."""
    if isinstance(model_or_shapes, torch.nn.Module):
        model_or_shapes = model_or_shapes.named_parameters()
    elif isinstance(model_or_shapes, Mapping):
        model_or_shapes = model_or_shapes.items()
    elif isinstance(model_or_shapes, (str, torch.Tensor)) or not isinstance(model_or_shapes, Iterable):
        raise ValueError(f"plan takes a module, tensors, or names with shapes, got {model_or_shapes!r}")
    named = []
    for ordinal, entry in enumerate(model_or_shapes):
        pair = isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)
        name, value = entry if pair else (f"param {ordinal}", entry)
        if isinstance(value, torch.nn.Parameter) and not value.requires_grad and not frozen:
            continue
        if isinstance(value, torch.Tensor) and is_lazy(value):
            raise ValueError(f"parameter {name!r} has no shape yet; run the model once first")
        shape, dtype = (value.shape, value.dtype) if isinstance(value, torch.Tensor) else (value, torch.float32)
        if not isinstance(shape, (tuple, list)) or not all(isinstance(size, int) and size >= 0 for size in shape):
            raise ValueError(f"parameter {name!r} must be a tensor or a shape, a tuple of sizes >= 0, got {value!r}")
        check_parameter(name, dtype)
        named.append((name, tuple(shape), dtype_name(dtype)))
    return named


def _compute_dtype(dtype: str) -> torch.dtype:
    return torch.float64 if dtype == "float64" else torch.float32


def _checked_view(view: Any, name: str, shape: Shape) -> View | None:
    if view is None or 0 in shape:
        return None
    listed = isinstance(view, (tuple, list)) and all(isinstance(group, (tuple, list)) for group in view)
    if listed and len(view) == 3 and all(isinstance(axis, int) for group in view for axis in group):
        checked = View(*(tuple(axis + len(shape) * (axis < 0) for axis in group) for group in view))
        if sorted(checked.order) == list(range(len(shape))) and checked.rows and checked.cols:
            return checked
    raise ValueError(
        f"factor gave {view!r} for parameter {name!r} of shape {shape}; it must give (batch axes, row axes, column "
        "axes) that name every axis once, with at least one row and one column axis, or None for the full V"
    )
