"""Three optimizers to compare with that torch does not have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class _Baseline(torch.optim.Optimizer):
    """Runs ``_update`` for every parameter that has a gradient."""

    def _update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; ``closure`` is called first when given and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, self.state[p], group)
        return loss


class Lion(_Baseline):
    """Lion (Chen et al. 2023, arXiv 2302.06675): the sign of an average.

    ``p <- p - lr sign(b1 m + (1 - b1) g)``, then ``m <- b2 m + (1 - b2) g``.

    Args:
        params: parameters or named parameters.
        lr: the step's size; about a tenth of AdamW's. Range: >= 0.
        betas: (b1, b2). Range: [0, 1).

    Example:
        >>> p = torch.nn.Parameter(torch.tensor([1.0]))
        >>> p.grad = torch.tensor([0.5])
        >>> Lion([p], lr=0.1).step()
        >>> p.item()
        0.8999999761581421
    """

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    def _update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["exp_avg"] = torch.zeros_like(p)
        m, (b1, b2) = state["exp_avg"], group["betas"]
        p.sub_(torch.lerp(g, m, b1).sign_(), alpha=group["lr"])
        m.lerp_(g, 1 - b2)


class NesterovAdamW(_Baseline):
    """AdamW whose step looks ahead: ``b1 m + (1 - b1) g`` with the new ``m`` takes the place of ``m``.

    ``m <- b1 m + (1 - b1) g``, ``v <- b2 v + (1 - b2) g^2``,
    ``p <- p - lr (b1 m + (1 - b1) g) / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)``. No weight decay.

    Args:
        params: parameters or named parameters.
        lr: the step's size. Range: >= 0.
        betas: (b1, b2). Range: [0, 1).
        eps: keeps the division finite. Range: > 0.

    Example:
        >>> p = torch.nn.Parameter(torch.tensor([1.0]))
        >>> p.grad = torch.tensor([0.5])
        >>> NesterovAdamW([p], lr=0.1).step()  # the first step is 1.9 lr: (0.9 * 0.1 + 0.1) / 0.1
        >>> round(p.item(), 4)
        0.81
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    def _update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
        m, v, t, (b1, b2) = state["exp_avg"], state["exp_avg_sq"], state["step"], group["betas"]
        m.lerp_(g, 1 - b1)
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        look_ahead = torch.lerp(g, m, b1)
        p.addcdiv_(look_ahead, v.sqrt().div_((1 - b2**t) ** 0.5).add_(group["eps"]), value=-group["lr"] / (1 - b1**t))


class MixedPrecisionAdamW(_Baseline):
    """AdamW in torch's arithmetic on float32 master weights, for parameters and gradients in 16 bits.

    A gradient becomes float32 for its own update only, so 2 + 2 bytes of weight and gradient and 3 x 4 bytes of state
    are all that a parameter needs.

    Args:
        params: parameters or named parameters.
        lr: the step's size. Range: >= 0.

    Example:
        >>> p = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.bfloat16))
        >>> p.grad = torch.tensor([0.5], dtype=torch.bfloat16)
        >>> optimizer = MixedPrecisionAdamW([p], lr=1e-4)
        >>> optimizer.step()
        >>> p.item(), round(optimizer.state[p]["master"].item(), 6)
        (1.0, 0.9999)
    """

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def _update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            master = p.detach().to(torch.float32, copy=True)
            state.update(master=master, exp_avg=torch.zeros_like(master), exp_avg_sq=torch.zeros_like(master))
            state["step"] = torch.zeros((), device=p.device)
        averages = [state["exp_avg"]], [state["exp_avg_sq"]], []
        rest = {"beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-8, "amsgrad": False, "maximize": False}
        adamw([state["master"]], [g.float()], *averages, [state["step"]], fused=True, lr=group["lr"], **rest)
        p.copy_(state["master"])
