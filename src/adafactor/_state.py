"""State tensors: allocated from a plan, carried over when a parameter changes, loaded from any known layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from adafactor._distributed import is_elsewhere, whole
from adafactor._hyper import dtype_of
from adafactor._plan import Shape, TensorPlan, TensorSpec, View, choose_view
from adafactor._rounding import PLANES, dequantize, quantize

State = dict[str, Tensor]


class Home(Protocol):
    """Where a parameter's state lies: on its device, or spread over its mesh."""

    def zeros(self, spec: TensorSpec) -> Tensor: ...

    def place(self, spec: TensorSpec, value: Any, *, copy: bool = False) -> Tensor:
        """A state tensor as it belongs here, in the dtype of the plan."""
        ...


@dataclass(frozen=True)
class OnDevice:
    device: torch.device

    def zeros(self, spec: TensorSpec) -> Tensor:
        return torch.zeros(spec.shape, dtype=dtype_of(spec.dtype), device=self.device)

    def place(self, spec: TensorSpec, value: Any, *, copy: bool = False) -> Tensor:
        placed = whole(value).to(self.device, dtype_of(spec.dtype), copy=copy)
        return placed.detach().contiguous() if copy else placed


def allocate(plan: TensorPlan, home: Home) -> State:
    """The state of a parameter that has not been updated yet."""
    return {spec.name: home.zeros(spec) for spec in plan.state}


def has_data(p: Tensor) -> bool:
    """Whether a parameter is there to be optimized: not on "meta", not lazy, not on other ranks alone."""
    return not (p.is_meta or is_lazy(p) or is_elsewhere(p))


def carry_over(plan: TensorPlan, state: Mapping[str, Any], home: Home) -> dict[str, Any]:
    """The same state after its parameter moved, changed its dtype, or its group switched momentum on or off.

    What others keep there under names of their own stays.
    """
    carried = _foreign_entries(state)
    state = _requantized(plan, state)
    for spec in plan.state:
        value = state.get(spec.name)
        if value is None and spec.name in _STARTS_AT_ZERO:
            value = home.zeros(spec)
        if value is None or tuple(value.shape) != spec.shape:
            raise ValueError(
                f"parameter {plan.name!r} now has shape {plan.shape}, seen as {plan.describe_view()}, which its state "
                f"does not fit ({spec.name!r}); `del optimizer.state[parameter]` starts its statistics anew"
            )
        carried[spec.name] = home.place(spec, value)
    return carried


def load(plan: TensorPlan, saved: Mapping[str, Any], home: Home, momentum_mode: str, source: Source) -> dict[str, Any]:
    """The state of one parameter from a checkpoint, in the dtypes of the plan.

    Raises:
        ValueError: if the checkpoint keeps other statistics than the plan; the message says what to do.
    """
    layout = source.layout
    loaded = _foreign_entries(saved) if layout.own else {}
    saved = {ours: saved[theirs] for theirs, ours in layout.names.items() if theirs in saved}
    if not layout.own:
        saved = _as_planned(plan, saved, momentum_mode, source)
    planned = {spec.name: spec for spec in plan.state}
    if (_MOMENTUM & saved.keys() == set()) != (_MOMENTUM & planned.keys() == set()):
        has, lacks, fix = ("the checkpoint", "this optimizer", "beta1=0.9, say,")
        if _MOMENTUM & planned.keys():
            has, lacks, fix = ("this optimizer", "the checkpoint", "beta1=None")
        raise ValueError(
            f"{has} has momentum for parameter {plan.name!r} and {lacks} has none; "
            f"build the optimizer with {fix} to load it"
        )
    saved = _requantized(plan, saved)
    for name, spec in planned.items():
        if name not in saved and name in plan.planes:
            loaded[name] = home.zeros(spec)
            continue
        if name not in saved:
            raise ValueError(f"the checkpoint has no {name!r} for parameter {plan.name!r}; {layout.remedy}")
        value = torch.as_tensor(saved[name])
        if tuple(value.shape) != spec.shape:
            raise ValueError(
                f"{name!r} of parameter {plan.name!r} has shape {tuple(value.shape)} in the checkpoint, "
                f"not {spec.shape}; {layout.remedy}"
            )
        loaded[name] = home.place(spec, value, copy=True)
    return loaded


@dataclass(frozen=True)
class Layout:
    """How one package lays out an Adafactor checkpoint.

    Attributes:
        package: whose it is, as in `adafactor.compat`; "" is ours.
        marks: param group keys that no other package here has together.
        names: their state names -> ours.
        view: (shape, their param group) -> the view their statistics belong to.
        momentum_mode: what their `exp_avg` is an average of.
    """

    package: str
    marks: frozenset[str]
    names: Mapping[str, str]
    view: Callable[[Shape, Mapping[str, Any]], View | None] = lambda shape, group: None
    momentum_mode: str = "scaled"

    @property
    def own(self) -> bool:
        return not self.package

    @property
    def remedy(self) -> str:
        if self.own:
            return "build the optimizer with the arguments it was saved with"
        return f"build the optimizer with Adafactor(params, **adafactor.compat.{self.package}(...)) to load it"


_SAME = {name: name for name in ("step", "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq", "exp_avg")}
_OURS = _SAME | {name: name for name in ("exp_avg_code", "exp_avg_scale", *PLANES[32])}
_MOMENTUM = {"exp_avg", "exp_avg_code"}
_STARTS_AT_ZERO = {*_MOMENTUM, "exp_avg_scale", *PLANES[32]}

# The first layout whose marks a param group carries is taken.
LAYOUTS = (
    Layout("", frozenset({"weight_decay_mode", "rms_scope"}), _OURS),
    Layout(
        "timm",
        frozenset({"eps_scale", "clip_threshold"}),
        _SAME,
        lambda shape, group: choose_view(shape, "first2", group.get("min_dim_size_to_factor", 16) + 1),
    ),
    Layout(
        "transformers",
        frozenset({"clip_threshold", "decay_rate", "warmup_init"}),
        _SAME,
        lambda shape, group: choose_view(shape, "last2", 0),
    ),
    Layout(
        "torch",
        frozenset({"beta2_decay", "d"}),
        {"step": "step", "row_var": "exp_avg_sq_row", "col_var": "exp_avg_sq_col", "variance": "exp_avg_sq"},
        lambda shape, group: choose_view(shape, "last2", 0),
    ),
    Layout(
        "timm_bv",
        frozenset({"clipping_threshold", "beta2_cap"}),
        {
            "step": "step",
            "exp_avg_sq_r": "exp_avg_sq_row",
            "exp_avg_sq_c": "exp_avg_sq_col",
            "exp_avg_sq": "exp_avg_sq",
            "exp_avg": "exp_avg",
        },
        lambda shape, group: choose_view(shape, "largest2", group.get("min_dim_size_to_factor", 16)),
        momentum_mode="unscaled",
    ),
)


@dataclass(frozen=True)
class Source:
    """A checkpoint's layout, and the param group that one of its parameters was in."""

    layout: Layout
    group: Mapping[str, Any]


def layout_of(groups: list[Mapping[str, Any]]) -> Layout:
    """Whose checkpoint this is, read off the keys of its param groups."""
    for layout in LAYOUTS:
        if all(layout.marks <= group.keys() for group in groups):
            return layout
    known = ", ".join(layout.package for layout in LAYOUTS if not layout.own)
    keys = sorted(groups[0].keys() - {"params"}) if groups else []
    raise ValueError(f"not an Adafactor's checkpoint: its param groups have {keys}; ours and those of {known} load")


@dataclass(frozen=True)
class Shielded:
    """A saved state on its way through the base class, which would cast its tensors to the parameter's dtype."""

    saved: dict[str, Any]
    source: Source


def shield(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Runs last of the hooks before loading: finds the layout and puts every state beyond the base class's reach."""
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(f"an optimizer's checkpoint has 'state' and 'param_groups', this has {sorted(state_dict)}")
    theirs, ours = state_dict["param_groups"], optimizer.param_groups
    if [len(group["params"]) for group in theirs] != [len(group["params"]) for group in ours]:
        return state_dict  # the base class says so
    layout = layout_of(theirs)
    indices = {index for group in theirs for index in group["params"]}
    state = {key: value for key, value in state_dict["state"].items() if layout.own and key not in indices}
    for group, own_group in zip(theirs, ours, strict=True):
        for index, p in zip(group["params"], own_group["params"], strict=True):
            saved = state_dict["state"].get(index)
            if saved and not has_data(p):
                raise ValueError(f"parameter {index} has no data yet (meta or lazy); materialize the model, then load")
            if saved:
                state[index] = Shielded(dict(saved), Source(layout, group))
            elif layout.own and has_data(p) and p.requires_grad:
                raise ValueError(
                    f"the checkpoint has no state for parameter {index}, which is trainable: the checkpoint is not "
                    "complete, or that parameter was frozen when it was saved; freeze it to load the rest"
                )
    if layout.own:
        groups = [{**own_group, **group} for group, own_group in zip(theirs, ours, strict=True)]
    else:
        groups = [
            {**own_group, **_moved_lr(own_group, group), "params": group["params"]}
            for group, own_group in zip(theirs, ours, strict=True)
        ]
    return {**state_dict, "state": state, "param_groups": groups}


def _moved_lr(own: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Where a scheduler had moved it, and one goes on here: schedulers keep the lr of the next step in the group."""
    driven = "initial_lr" in own and "initial_lr" in theirs and own["rho"] is None and theirs["lr"] is not None
    return {"lr": theirs["lr"]} if driven else {}


def _as_planned(plan: TensorPlan, saved: dict[str, Any], momentum_mode: str, source: Source) -> dict[str, Any]:
    """Another package's statistics as the plan wants them."""
    layout = source.layout
    theirs = layout.view(plan.shape, source.group)
    if theirs is not None and theirs != plan.view:
        raise ValueError(
            f"{layout.package} keeps parameter {plan.name!r} of shape {plan.shape} as the view {tuple(theirs)}, this "
            f"optimizer as {tuple(plan.view) if plan.view else 'the full V'}; {layout.remedy}"
        )
    if "exp_avg" in saved and momentum_mode != layout.momentum_mode:
        raise ValueError(
            f"the checkpoint's momentum of parameter {plan.name!r} is {layout.momentum_mode!r}, not {momentum_mode!r}; "
            + layout.remedy
        )
    if theirs is not None:  # some keep the averaged axes, with size 1
        for name, averaged in (("exp_avg_sq_row", theirs.cols), ("exp_avg_sq_col", theirs.rows)):
            kept = tuple(1 if axis in averaged else size for axis, size in enumerate(plan.shape))
            if name in saved and tuple(saved[name].shape) == kept:
                saved[name] = saved[name].squeeze(averaged)
    if theirs is None and plan.view is not None and "exp_avg_sq" in saved:
        # The averages of V over columns and rows are what R and C would have been: averaging commutes with the decay.
        full = whole(saved.pop("exp_avg_sq")).to(plan.compute_dtype)
        saved["exp_avg_sq_row"], saved["exp_avg_sq_col"] = full.mean(plan.view.cols), full.mean(plan.view.rows)
    return saved


def _foreign_entries(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name not in _OURS}


def _requantized(plan: TensorPlan, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state with its momentum in one byte exactly where the plan wants it so, whatever it was kept in."""
    state = dict(state)
    planned = {spec.name: spec for spec in plan.state}
    is_byte, wants_byte = "exp_avg_code" in state, "exp_avg_code" in planned
    kept = "exp_avg_code" if is_byte else "exp_avg"
    if kept not in state or is_byte == wants_byte:
        return state
    if plan.view is None or tuple(state[kept].shape) != plan.shape:
        return state  # it does not fit, and who asked will say so
    M = whole(state.pop(kept)).permute(plan.order)
    sizes, rows = M.shape, M.reshape(-1, plan.dims[2])
    row_sizes, row_axes = [plan.shape[axis] for axis in plan.row_axes], sorted(plan.row_axes)
    to_kept = [plan.row_axes.index(axis) for axis in row_axes]
    if is_byte:
        scale = whole(state.pop("exp_avg_scale")).permute([row_axes.index(axis) for axis in plan.row_axes] + [-1])
        M = dequantize(rows, scale.reshape(len(rows), -1))
    else:
        M, scale = quantize(rows.float(), None)
        state["exp_avg_scale"] = scale.view(*row_sizes, -1).permute([*to_kept, -1]).contiguous()
    back = [plan.order.index(axis) for axis in range(len(plan.shape))]
    state["exp_avg_code" if wants_byte else "exp_avg"] = M.view(sizes).permute(back).contiguous()
    return state
