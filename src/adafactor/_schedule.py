"""beta2_t and rho_t: one formula each, for Python numbers and for tensors on a device."""

from __future__ import annotations

from typing import Any

import torch

from adafactor._hyper import RELATIVE_STEP_CAP, Hyper

Scalar = Any  # a float, or a 0-d tensor where reading its value would wait for the device


def beta2_at(hyper: Hyper, t: Scalar) -> Scalar:
    """The decay of the second moment at update t = 1, 2, ...: `1 - t^decay_rate`, capped, or Adam's fixed beta2.

    A fixed beta2 is bias-corrected as in Adam: `beta2 (1 - beta2^(t-1)) / (1 - beta2^t)`. Either way the first
    update uses the first gradient alone (beta2_1 = 0).
    """
    if hyper.beta2 is not None:
        return hyper.beta2 * (1 - hyper.beta2 ** (t - 1)) / (1 - hyper.beta2**t)
    beta2 = 1 - t**hyper.decay_rate
    return beta2 if hyper.beta2_cap is None else _least(beta2, hyper.beta2_cap)


def rho_at(hyper: Hyper, lr: Scalar | None, t: Scalar) -> Scalar:
    """The step size before scaling by RMS(p): `lr`, or `min(lr, 1/sqrt t)`, or with warm-up `min(1e-6 t, ...)`.

    `lr=None` stands for the paper's 1e-2.
    """
    if not hyper.relative_step:
        return lr
    rho = _least(t**-0.5, RELATIVE_STEP_CAP if lr is None else lr)
    return _least(1e-6 * t, rho) if hyper.warmup_init else rho


def exact(scalar: torch.Tensor) -> torch.Tensor:
    """A 0-d tensor in the widest float its device has, so that no formula here rounds to a narrower one."""
    device = scalar.device
    narrow = device.type == "mps" or (device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64)
    return scalar.reshape(()).to(torch.float32 if narrow else torch.float64)


def _least(a: Scalar, b: Scalar) -> Scalar:
    if isinstance(a, torch.Tensor):
        return a.clamp(max=b)
    return b.clamp(max=a) if isinstance(b, torch.Tensor) else min(a, b)
