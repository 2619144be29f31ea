"""Other implementations' arguments -> ours: `Adafactor(params, **compat.transformers(lr=1e-3, relative_step=False))`.

Each function has the signature of the constructor it stands for, and returns keyword arguments with which `Adafactor`
takes the same steps, to rounding, for every shape. Weights in 16 bits are still rounded stochastically here; add
`rounding="nearest"` for the others' rounding. What another implementation has and Adafactor refuses raises by name.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch as _torch

from adafactor._hyper import caller_level
from adafactor._optimizer import Adafactor

_WHOLE_TENSOR = {"rms_scope": "tensor"}  # none of them treats stacked matrices as independent


def transformers(
    lr: Any = None,
    eps: tuple[float, float] = (1e-30, 1e-3),
    clip_threshold: float = 1.0,
    decay_rate: float = -0.8,
    beta1: float | None = None,
    weight_decay: float = 0.0,
    scale_parameter: bool = True,
    relative_step: bool = True,
    warmup_init: bool = False,
) -> dict[str, Any]:
    """`transformers.Adafactor`; also fairseq's, and the copies in kohya's and OneTrainer's trainers."""
    if lr is not None and relative_step:
        raise ValueError("transformers refuses lr with relative_step=True; say relative_step=False to use the lr")
    if warmup_init and not relative_step:
        raise ValueError("transformers refuses warmup_init=True with relative_step=False")
    if lr is None and not relative_step:
        raise ValueError("relative_step=False needs an lr")
    return {
        "lr": lr,
        "eps": eps,
        "clip_threshold": clip_threshold,
        "decay_rate": decay_rate,
        "beta1": beta1,
        "weight_decay": weight_decay,
        "weight_decay_mode": "scaled_lr",
        "scale_parameter": scale_parameter,
        "relative_step": relative_step,
        "warmup_init": warmup_init,
        "factor": "last2",
        "min_dim_size_to_factor": 0,
    } | _WHOLE_TENSOR


def torch(
    lr: Any = 1e-2,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: float = 0.0,
    *,
    foreach: bool | None = None,
    maximize: bool = False,
) -> dict[str, Any]:
    """`torch.optim.Adafactor`, while its clamps are idle: it clamps V at eps1^2 where the paper adds eps1 to g^2.

    Its eps1 (by default the dtype's epsilon: 8e-3 for bfloat16) makes small gradients take small steps there; it is not
    carried over. `foreach` chooses between equal results and is ignored.
    """
    del foreach
    return {
        "lr": lr,
        "relative_step": True,
        "scale_parameter": True,
        "decay_rate": beta2_decay,
        "eps": (1e-30, eps[1]),
        "clip_threshold": d,
        "weight_decay": weight_decay,
        "weight_decay_mode": "lr",
        "maximize": maximize,
        "factor": "last2",
        "min_dim_size_to_factor": 0,
    } | _WHOLE_TENSOR


def timm(
    lr: Any = None,
    eps: float = 1e-30,
    eps_scale: float = 1e-3,
    clip_threshold: float = 1.0,
    decay_rate: float = -0.8,
    betas: tuple[float, float] | None = None,
    weight_decay: float = 0.0,
    scale_parameter: bool = True,
    warmup_init: bool = False,
    min_dim_size_to_factor: int = 16,
    caution: bool = False,
) -> dict[str, Any]:
    """`timm.optim.adafactor.Adafactor`: the step is relative, and scaled, only without an lr."""
    _refuse("timm", caution=caution)
    if warmup_init and lr is not None:
        raise ValueError("timm refuses warmup_init=True with an lr")
    return {
        "lr": lr,
        "eps": (eps, eps_scale),
        "clip_threshold": clip_threshold,
        "decay_rate": decay_rate,
        "beta1": None if betas is None else betas[0],
        "weight_decay": weight_decay,
        "weight_decay_mode": "scaled_lr",
        "scale_parameter": scale_parameter and lr is None,
        "relative_step": lr is None,
        "warmup_init": warmup_init,
        "factor": "first2",
        "min_dim_size_to_factor": min_dim_size_to_factor + 1,  # both sides must exceed it there
    } | _WHOLE_TENSOR


def timm_bv(
    lr: Any = 1.0,
    min_dim_size_to_factor: int = 16,
    decay_rate: float = 0.8,
    decay_offset: int = 0,
    beta2_cap: float = 0.999,
    momentum: float | None = 0.9,
    momentum_dtype: Any = _torch.bfloat16,
    eps: float | None = None,
    weight_decay: float = 0.0,
    clipping_threshold: float | None = None,
    unscaled_wd: bool = False,
    caution: bool = False,
    corrected_weight_decay: bool = False,
    *,
    foreach: bool | None = False,
) -> dict[str, Any]:
    """`timm.optim.adafactor_bv.AdafactorBigVision`; its eps of 1e-7 for float16 is not carried over."""
    del foreach
    _refuse("timm_bv", decay_offset=decay_offset, caution=caution, corrected_weight_decay=corrected_weight_decay)
    return {
        "lr": lr,
        "eps": (1e-30 if eps is None else eps, 1e-3),
        "clip_threshold": clipping_threshold,
        "decay_rate": -decay_rate,
        "beta2_cap": beta2_cap,
        "beta1": momentum,
        "momentum_mode": "unscaled",
        "momentum_dtype": momentum_dtype,
        "weight_decay": weight_decay,
        "weight_decay_mode": "independent" if unscaled_wd else "lr",
        "factor": "largest2",
        "min_dim_size_to_factor": min_dim_size_to_factor,
    } | _WHOLE_TENSOR


def optax(
    learning_rate: Any = None,
    min_dim_size_to_factor: int = 128,
    decay_rate: float = 0.8,
    decay_offset: int = 0,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: float | None = 1.0,
    momentum: float | None = None,
    dtype_momentum: Any = _torch.float32,
    weight_decay_rate: float | None = None,
    eps: float = 1e-30,
    factored: bool = True,
    weight_decay_mask: Any = None,
) -> dict[str, Any]:
    """`optax.adafactor`, with beta2 in float64 where optax computes it in float32 (1e-7 apart).

    `dtype_momentum` is a torch dtype or a dtype's name. `learning_rate` is a number or a tensor: drive it with a torch
    scheduler where optax takes a schedule.
    """
    _refuse("optax", decay_offset=decay_offset, weight_decay_mask=weight_decay_mask)
    if callable(learning_rate):
        raise ValueError("learning_rate is a schedule; give its peak here and a torch.optim.lr_scheduler beside")
    return {
        "lr": 1.0 if learning_rate is None else learning_rate,
        "eps": (eps, 1e-3),
        "clip_threshold": clipping_threshold,
        "decay_rate": -decay_rate,
        "beta1": momentum,
        "momentum_dtype": dtype_momentum,
        "weight_decay": weight_decay_rate or 0.0,
        "weight_decay_mode": "independent",
        "scale_parameter": multiply_by_parameter_scale,
        "factor": "largest2" if factored else "none",
        "min_dim_size_to_factor": min_dim_size_to_factor,
    } | _WHOLE_TENSOR


def pytorch_optimizer(
    lr: Any = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    decay_rate: float = -0.8,
    weight_decay: float = 0.0,
    weight_decouple: bool = True,
    fixed_decay: bool = False,
    clip_threshold: float = 1.0,
    ams_bound: bool = False,
    scale_parameter: bool = True,
    relative_step: bool = True,
    warmup_init: bool = False,
    eps1: float = 1e-30,
    eps2: float = 1e-3,
    momentum_dtype: Any = _torch.bfloat16,
    foreach: bool | None = None,
    *,
    maximize: bool = False,
) -> dict[str, Any]:
    """`pytorch_optimizer.AdaFactor`, which ignores `lr` while `relative_step` is on, as it is by default."""
    del foreach
    _refuse("pytorch_optimizer", ams_bound=ams_bound)
    if weight_decay and not weight_decouple:
        raise ValueError("weight_decouple=False adds the decay to the gradient, which Adafactor does not do")
    return {
        "lr": None if relative_step else lr,
        "eps": (eps1, eps2),
        "clip_threshold": clip_threshold,
        "decay_rate": decay_rate,
        "beta2_cap": betas[1],
        "beta1": betas[0],
        "momentum_dtype": momentum_dtype,
        "weight_decay": weight_decay,
        "weight_decay_mode": "independent" if fixed_decay else "scaled_lr",
        "scale_parameter": scale_parameter,
        "relative_step": relative_step,
        "warmup_init": warmup_init,
        "maximize": maximize,
        "factor": "last2",
        "min_dim_size_to_factor": 0,
    } | _WHOLE_TENSOR


class TransformersAdafactor(Adafactor):
    """`Adafactor` with the constructor of `transformers.Adafactor`: an existing script only changes its import.

    Args:
        ours: any argument of `Adafactor` by name, such as `weight_bits`, `rounding` and `seed`; it wins

    Example:
        >>> import torch
        >>> from adafactor.compat import TransformersAdafactor as Adafactor
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = Adafactor(model.parameters(), scale_parameter=False, relative_step=False, lr=1e-3)
    """

    def __init__(
        self,
        params: Any,
        lr: Any = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        **ours: Any,
    ) -> None:
        theirs = (eps, clip_threshold, decay_rate, beta1, weight_decay, scale_parameter, relative_step, warmup_init)
        super().__init__(params, **transformers(lr, *theirs) | ours)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `Adafactor`'s; a group's lr beside a relative step, which transformers ignores, is ignored aloud."""
        relative = param_group.get("relative_step", self.defaults["relative_step"])
        if relative and param_group.get("lr") is not None:
            warnings.warn(
                f"lr={param_group['lr']} of a param group is ignored, as transformers does while relative_step is on; "
                "say relative_step=False to use it",
                stacklevel=caller_level(),
            )
            param_group = {**param_group, "lr": None}
        super().add_param_group(param_group)


def _refuse(package: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        if value:
            raise ValueError(f"{package}'s {name}={value!r} has no counterpart here; leave it out")
