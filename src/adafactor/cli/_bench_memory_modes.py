"""What ``adafactor bench --memory`` measures: ways to train one transformer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from adafactor import Adafactor
from adafactor.cli._baselines import MixedPrecisionAdamW
from adafactor.cli._bench_entries import ADAMW, LR, OURS, Named
from adafactor.cli._model import VOCABULARY

LARGE_VOCABULARY = 32_768
EAGER, BLOCKS, WHOLE, DDP, DDP_VIEWS = "eager", "compiled by block", "compiled whole", "DDP", "DDP, views"


@dataclass(frozen=True)
class Mode:
    """One row of the table.

    Args:
        name: what results.json calls it.
        title: what the table and the picture call it.
        description: how it was set up.
        expected: bytes per parameter of weights, gradients and state at their peak, without the gradients that come
            ``gradients_on_top``. None where the row is there to find out.
        config: the arguments of ``Adafactor``; empty where it is not ours.
        make: builds what is not ours from named parameters.
        dtype: of the weights and gradients.
        in_backward: ours with ``step_in_backward``.
        run_as: how the model runs.
        vocabulary: of the embedding, which is the output layer too.
    """

    name: str
    title: str
    description: str
    expected: float | None
    config: dict[str, Any] = field(default_factory=dict, hash=False)
    make: Callable[[Named], torch.optim.Optimizer] | None = None
    dtype: torch.dtype = torch.bfloat16
    in_backward: bool = False
    run_as: str = EAGER
    vocabulary: int = VOCABULARY

    @property
    def gradients_on_top(self) -> bool:
        """Gradients come and go in backward; how many are alive at once is what is measured."""
        return self.in_backward or self.run_as == DDP_VIEWS

    def build(self, named: Named, backend: str) -> torch.optim.Optimizer:
        return self.make(named) if self.make else Adafactor(named, **self.config, backend=backend)


def _adamw(named: Named) -> torch.optim.Optimizer:
    return ADAMW.build(named, "auto")


def _mixed(named: Named) -> torch.optim.Optimizer:
    return MixedPrecisionAdamW(named, LR)


_BITS = OURS | {"weight_bits": 24}
_INT8 = OURS | {"beta1": 0.9, "momentum_dtype": "int8"}
_BACKWARD = "each parameter is stepped, and its gradient freed, in backward"

PLAIN = Mode("bfloat16", "bfloat16", "stochastic rounding; gradients kept until step()", 4.0, OURS)
IN_BACKWARD = Mode(
    "bfloat16-in-backward", "bfloat16, in backward", f"stochastic rounding; {_BACKWARD}", 2.0, OURS, in_backward=True
)
OPTIMIZERS = (
    Mode("adamw-float32", "AdamW, float32", ADAMW.description, 16.0, make=_adamw, dtype=torch.float32),
    Mode(
        "adamw-mixed",
        "AdamW, mixed precision",
        "bfloat16 weights and gradients, float32 master weights and moments; torch's fused kernel, tensor by tensor",
        16.0,
        make=_mixed,
    ),
    Mode("adamw-bfloat16", "AdamW, bfloat16", f"{ADAMW.description}; moments in bfloat16", 8.0, make=_adamw),
    Mode("int8-momentum", "int8 momentum", "beta1=0.9, momentum_dtype=int8; gradients kept until step()", 5.03, _INT8),
    Mode("24-bit", "24-bit weights", "weight_bits=24; gradients kept until step()", 5.0, _BITS),
    PLAIN,
    Mode(
        "int8-momentum-in-backward",
        "int8 momentum, in backward",
        f"beta1=0.9, momentum_dtype=int8; {_BACKWARD}",
        3.03,
        _INT8,
        in_backward=True,
    ),
    Mode("24-bit-in-backward", "24-bit, in backward", f"weight_bits=24; {_BACKWARD}", 3.0, _BITS, in_backward=True),
    IN_BACKWARD,
)
LIFETIMES = (
    replace(
        IN_BACKWARD,
        name="compiled-blocks",
        title="compiled by block",
        description=f"torch.compile of each block; {_BACKWARD}",
        run_as=BLOCKS,
    ),
    replace(
        IN_BACKWARD,
        name="compiled-whole",
        title="compiled whole",
        description="torch.compile of the whole model: its backward is one function, which returns all gradients",
        expected=None,
        run_as=WHOLE,
    ),
    replace(
        IN_BACKWARD,
        name="tied-embedding",
        title=f"tied, {LARGE_VOCABULARY:,} tokens",
        description="an embedding that is the output layer too: its gradient begins first and is complete last",
        expected=None,
        vocabulary=LARGE_VOCABULARY,
    ),
    replace(
        PLAIN,
        name="ddp",
        title="DDP",
        description="DistributedDataParallel, one process, gloo; gradients kept, and the buckets beside them",
        expected=None,
        run_as=DDP,
    ),
    replace(
        PLAIN,
        name="ddp-views",
        title="DDP, gradients as views",
        description="with gradient_as_bucket_view=True: gradients lie in the buckets, which stay",
        run_as=DDP_VIEWS,
    ),
    replace(
        IN_BACKWARD,
        name="ddp-in-backward",
        title="DDP, in backward",
        description="step_in_backward(): stepped from the buckets, which are freed; the largest stays",
        run_as=DDP,
    ),
)
