"""Parameters and gradients that are refused, and settings that are warned of, before anything is written."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from adafactor._distributed import local
from adafactor._hyper import Hyper, caller_level
from adafactor._plan import TensorPlan


def refuse_sparse(name: str) -> None:
    raise ValueError(
        f"the gradient of parameter {name!r} is sparse and the parameter sharded, which Adafactor does not take "
        "together; build the embedding with sparse=False"
    )


def refuse_shared(name: str, p: Tensor, places: dict[tuple, str]) -> None:
    """`places` gathers whose memory has been seen where."""
    p = local(p)
    if p.numel() and p.data_ptr():
        first = places.setdefault((p.device, p.data_ptr(), p.shape, p.stride()), name)
        if first != name:
            raise ValueError(
                f"parameter {name!r} shares its memory with {first!r}, so both would step it; tie weights by using one "
                "Parameter object in both places"
            )


def refuse_flattened(name: str, p: Tensor) -> None:
    if hasattr(p, "_fsdp_flattened") or getattr(p, "_is_flat_param", False):
        raise ValueError(
            f"parameter {name!r} was flattened by FSDP1, which hides the matrices that Adafactor factors; "
            "use torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    if hasattr(p, "ds_id"):  # on all that ZeRO stage 3 partitions, and on its flat tensors
        raise ValueError(
            f"parameter {name!r} was partitioned by DeepSpeed ZeRO, which hides the matrices that Adafactor factors; "
            "use torch.distributed.fsdp.fully_shard (FSDP2)"
        )


def refuse_replaced(groups: Iterable[Mapping[str, Any]], known: Collection[Tensor]) -> None:
    """`known` are the parameters as they were.

    The flat tensors of ZeRO's stages 1 and 2 carry no mark, but they are no `Parameter`s and have shapes of their own;
    the float32 copies that ZeRO's stage 0 puts in the parameters' place keep the shapes. A group of a single vector
    keeps its shape in any stage: what is left then is the mark on the parameters that went.
    """
    now = {p for group in groups for p in group["params"]}
    gone = [p for p in known if p not in now]
    new = [p for p in now if p not in known]
    if not gone or not new:
        return
    shapes = {p.shape for p in gone}
    flat = all(p.ndim == 1 and not isinstance(p, Parameter) for p in new) and any(p.shape not in shapes for p in new)
    if (flat and any(isinstance(p, Parameter) for p in gone)) or any(hasattr(p, "_hp_mapping") for p in gone):
        raise ValueError(
            f"the optimizer's parameters were replaced by flat tensors (one of shape {tuple(new[0].shape)}), as "
            "DeepSpeed ZeRO does, which hides the matrices that Adafactor factors; "
            "use torch.distributed.fsdp.fully_shard (FSDP2)"
        )


def warn_of_lost_updates(group: Mapping[str, Any], plans: Mapping[Tensor, TensorPlan]) -> None:
    """Where rounding to nearest loses nearly every update: one of lr is below half a spacing of most weights."""
    lr, hyper = group["lr"], Hyper.of(group)
    if hyper.rounding != "nearest" or hyper.scale_parameter or isinstance(lr, Tensor) or not lr:
        return
    lost = seen = 0
    for p in group["params"]:
        if p in plans and p.dtype in (torch.bfloat16, torch.float16) and not plans[p].planes:
            some = local(p).detach().reshape(-1)
            some = some[:: max(1, some.numel() // 1000)].double().abs()
            some = some[some.isfinite()]
            spacing = 2.0 ** some.log2().floor() * torch.finfo(p.dtype).eps
            lost += int((lr < spacing / 2).sum())
            seen += len(some)
    if lost > seen / 2:
        warnings.warn(
            f"rounding='nearest' loses updates of lr={lr:g}: {100 * lost / seen:.0f} % of the 16-bit weights are "
            "spaced by more than twice that; use rounding='stochastic' (the default) or weight_bits=24",
            stacklevel=caller_level(),
        )
