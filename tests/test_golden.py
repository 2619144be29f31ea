"""The trajectories recorded from seven packages, reproduced through `compat` and `recipes`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from adafactor import Adafactor, compat, recipes

DATA = Path(__file__).parent / "data"
SHAPES = json.loads((DATA / "golden_index.json").read_text())["shapes"]

FLOAT64 = {"momentum_dtype": torch.float32}  # the widest momentum: float64 for float64 parameters
CONFIGURATIONS = {
    "torch/default": compat.torch(),
    "torch/lr.3_wd.1": compat.torch(lr=0.3, weight_decay=0.1),
    "torch/lr.3_d2_decay-1": compat.torch(lr=0.3, d=2.0, beta2_decay=-1.0),
    "hf/default": compat.transformers(),
    "hf/warmup_init": compat.transformers(warmup_init=True),
    "hf/lr1e-2_noscale": compat.transformers(lr=1e-2, relative_step=False, scale_parameter=False),
    "hf/lr1e-2_scale_b.9_wd.3": compat.transformers(
        lr=1e-2, relative_step=False, scale_parameter=True, beta1=0.9, weight_decay=0.3
    ),
    "timm/default": compat.timm(),
    "timm/lr1e-2_b.9_wd.3": compat.timm(lr=1e-2, betas=(0.9, 0.999), weight_decay=0.3),
    "timm_bv/lr1e-2": compat.timm_bv(lr=1e-2, **FLOAT64),
    "timm_bv/lr1e-2_clip1_wd.1": compat.timm_bv(lr=1e-2, clipping_threshold=1.0, weight_decay=0.1, **FLOAT64),
    "optax/adafactor1e-2_min16(f32 decay)": compat.optax(1e-2, min_dim_size_to_factor=16),
    "optax/chain_f64_lr1e-2_min16": compat.optax(1e-2, min_dim_size_to_factor=16),
    "optax/chain_f64_mom.9_wd1e-3": compat.optax(1e-2, min_dim_size_to_factor=16, momentum=0.9, weight_decay_rate=1e-3),
    "big_vision/chain_f64_lr1e-2_wd1e-3": recipes.big_vision(
        1e-2, weight_decay=1e-3, min_dim_size_to_factor=16, **FLOAT64
    ),
    "palm/chain_f64_unfactored_mom.9_wd_lr2": recipes.palm(1e-2),
    "pytorch_optimizer/default_f64mom": compat.pytorch_optimizer(**FLOAT64),
}
# optax computes beta2_t in float32, whose spacing near 1 is 6e-8.
TOLERANCE = {"optax/adafactor1e-2_min16(f32 decay)": 1e-7}


@pytest.fixture(scope="module")
def golden():
    with np.load(DATA / "golden_f64.npz") as file:
        return {key: torch.from_numpy(np.asarray(value)) for key, value in file.items()}


def test_every_recorded_configuration_is_reproduced_here():
    assert CONFIGURATIONS.keys() == set(json.loads((DATA / "golden_index.json").read_text())["configs"])
    assert len(CONFIGURATIONS) == 17
    assert len(SHAPES) == 6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_recorded_trajectory(golden, configuration, shape):
    start = golden[f"p0/{shape}"]
    p = torch.nn.Parameter(start.clone())
    optimizer = Adafactor([p], **CONFIGURATIONS[configuration])
    expected = golden[f"y/{configuration}/{shape}"]
    displacement = (expected - start).abs().max()
    assert displacement > 0
    for gradient, theirs in zip(golden[f"g/{shape}"], expected, strict=True):
        p.grad = gradient.clone()
        optimizer.step()
        worst = (p.detach() - theirs).abs().max()
        assert worst <= TOLERANCE.get(configuration, 1e-12) * displacement, f"{worst / displacement:.1e}"
