"""Named training recipes, as keyword arguments: `Adafactor(params, **recipes.adamw_like())`.

Each takes overrides for any argument of `Adafactor`, which win. `docs/recipes.md` has the sources and measurements.
"""

from __future__ import annotations

from typing import Any


def paper(**overrides: Any) -> dict[str, Any]:
    """The paper's defaults: no learning rate to choose, the step is min(1e-2, 1/sqrt(t)) scaled by RMS(p)."""
    return {"lr": None} | overrides


def adamw_like(lr: Any = 1e-3, **overrides: Any) -> dict[str, Any]:
    """Takes AdamW's learning rate and schedule: Nesterov momentum 0.9, beta2 capped at 0.999, clipping at 1."""
    return {"lr": lr, "beta1": 0.9, "nesterov": True, "beta2_cap": 0.999} | overrides


def t5_pretrain(**overrides: Any) -> dict[str, Any]:
    """T5 pretraining (T5X `pretrain.gin`): the step 1/sqrt(max(t, 10^4)), scaled by RMS(p), no momentum."""
    return {"lr": None, "min_dim_size_to_factor": 128} | overrides


def t5_finetune(lr: Any = 1e-3, **overrides: Any) -> dict[str, Any]:
    """T5 fine-tuning (T5X `finetune.gin`): a constant 1e-3 after 1,000 steps of warm-up, scaled by RMS(p)."""
    return {"lr": lr, "scale_parameter": True, "min_dim_size_to_factor": 128} | overrides


def palm(lr: Any = 1e-2, **overrides: Any) -> dict[str, Any]:
    """PaLM (section 5): no factoring, momentum 0.9, scaled by RMS(p), weight decay lr^2; clip the global norm at 1.

    Schedule: 1e-2 for 10,000 steps, then 1/sqrt(t).
    """
    recipe = {"lr": lr, "beta1": 0.9, "scale_parameter": True, "factor": "none", "clip_threshold": None}
    return recipe | {"weight_decay": 1.0, "weight_decay_mode": "lr_squared"} | overrides


def big_vision(lr: Any = 1e-3, **overrides: Any) -> dict[str, Any]:
    """Scaling ViT (big_vision's `scale_by_adafactor`): momentum 0.9 of U in bfloat16, beta2 capped at 0.999.

    Weight decay there is multiplied by the schedule but not by the base lr; `weight_decay_mode="independent"` is the
    constant-schedule case.
    """
    recipe = {"lr": lr, "beta1": 0.9, "momentum_mode": "unscaled", "momentum_dtype": "bfloat16", "beta2_cap": 0.999}
    shape = {"clip_threshold": None, "factor": "largest2", "min_dim_size_to_factor": 32, "rms_scope": "tensor"}
    return recipe | shape | {"weight_decay_mode": "independent"} | overrides


def diffusion_finetune(lr: Any = 1e-5, **overrides: Any) -> dict[str, Any]:
    """What image and video trainers use on 24 GB (kohya, musubi, OneTrainer): a small absolute lr, no momentum.

    Every matrix is factored, as there: LoRA's of rank 16 would else keep sixteen times the state.
    """
    recipe = {"lr": lr, "scale_parameter": False, "relative_step": False, "weight_decay": 0.0}
    return recipe | {"min_dim_size_to_factor": 2} | overrides
