"""The plan: from shape, dtype and hyperparameters alone, how one parameter is treated.

Everything else asks the plan: the optimizer allocates from it, backends index by it, checkpoints are checked
against it, the memory planner adds it up. It is plain data and needs no tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of one tensor."""

    name: str
    shape: Shape
    dtype: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * dtype_of(self.dtype).itemsize


@dataclass(frozen=True)
class TensorPlan:
    """How one parameter is treated.

    Attributes:
        name: the parameter's name, or "param 3" where the optimizer does not know it.
        shape, dtype: the parameter's own.
        view: the matrix view, or None where the full second moment V is kept.
        state: the state tensors. A row statistic has the parameter's shape without the column axes, a column
            statistic the shape without the row axes, so that each keeps the parameter's own sharding.
        sums: the partial sums that one sweep over the gradient leaves behind, `[matrices]` or
            `[matrices, columns]` each. Where a matrix is split over devices, these are what crosses the mesh.
        shared_rms: RMS(U) and RMS(p) are taken over the whole tensor, not matrix by matrix.
        planes: the state tensors that keep the missing bits of the weights, of which there may be none.
    """

    name: str
    shape: Shape
    dtype: str
    view: View | None
    state: tuple[TensorSpec, ...]
    sums: tuple[TensorSpec, ...]
    shared_rms: bool
    planes: tuple[str, ...]

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
        if self.view is None:
            return 1, 1, math.prod(self.shape)
        return tuple(math.prod(self.shape[axis] for axis in axes) for axes in self.view)  # type: ignore[return-value]

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

    def describe_view(self) -> str:
        """`"32128 x 768"`, `"8 of 512 x 2048"` for a stack, `"full"`."""
        if self.view is None:
            return "full"
        matrices, rows, cols = self.dims
        return f"{matrices} of {rows} x {cols}" if self.view.batch else f"{rows} x {cols}"


def tensor_plan(
    name: str, shape: Sequence[int], dtype: torch.dtype | str, hyper: Hyper, view: View | None
) -> TensorPlan:
    """The plan of one parameter whose view has been chosen (by `choose_view`).

    Raises:
        ValueError: for a float16 parameter where `weight_bits` is set; wider ones have those bits already.
    """
    shape, dtype = tuple(shape), dtype_name(dtype)
    if hyper.weight_bits and dtype == "float16":
        raise ValueError(
            f"weight_bits={hyper.weight_bits} keeps the missing bits of bfloat16 weights, and parameter {name!r} is "
            "float16; convert it to bfloat16, or put it into a group with weight_bits=None"
        )
    compute = dtype_name(_compute_dtype(dtype))
    state = [TensorSpec("step", (), "float32")]
    if view is None:
        state.append(TensorSpec("exp_avg_sq", shape, compute))
        sums = {"grad_sq": (1,), "update_sq": (1,), "param_sq": (1,)}
    else:
        state.append(TensorSpec("exp_avg_sq_row", _without(shape, view.cols), compute))
        state.append(TensorSpec("exp_avg_sq_col", _without(shape, view.rows), compute))
        matrices, cols = (math.prod(shape[axis] for axis in axes) for axes in (view.batch, view.cols))
        sums = {"grad_sq": (matrices,), "row_sum": (matrices,), "param_sq": (matrices,)}
        sums |= {"col_sq": (matrices, cols), "col_ratio": (matrices, cols)}
    if hyper.momentum:
        kept = hyper.momentum_dtype
        if kept == "float32" or (kept == "int8" and view is None):
            kept = compute  # one byte needs rows to share scales along
        state.append(TensorSpec("exp_avg", shape, kept))
        if kept == "int8" and view is not None:
            blocks = -(-math.prod(shape[axis] for axis in view.cols) // MOMENTUM_BLOCK)
            state.append(TensorSpec("exp_avg_scale", (*_without(shape, view.cols), blocks), "float32"))
    planes = PLANES[hyper.weight_bits] if hyper.weight_bits and dtype == "bfloat16" else ()
    state += [TensorSpec(plane, shape, "uint8") for plane in planes]
    if not hyper.scale_parameter:
        del sums["param_sq"]
    return TensorPlan(
        name=name,
        shape=shape,
        dtype=dtype,
        view=view,
        state=tuple(state),
        sums=tuple(TensorSpec(key, size, compute) for key, size in sums.items()),
        shared_rms=hyper.rms_scope == "tensor",
        planes=planes,
    )


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


def plan(model_or_shapes: Any, **kwargs: Any) -> list[TensorPlan]:
    """How `Adafactor(params, **kwargs)` would treat each parameter, without allocating anything.

    Args:
        model_or_shapes: a module (on any device, "meta" included), an iterable of tensors or of (name, tensor) pairs,
            or a mapping from names to shapes or tensors. Bare shapes are float32. Frozen parameters have no state and
            are left out.
        **kwargs: the arguments of `Adafactor`.

    Returns:
        One `TensorPlan` per parameter, in order; the sum of `.nbytes` is what the optimizer allocates.

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
    return [tensor_plan(*param, hyper, view) for param, view in zip(params, views, strict=True)]


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


def _without(shape: Shape, axes: Axes) -> Shape:
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


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
