"""Checkpoints of sharded optimizers: saved on some ranks, loaded on others, in every way that torch has."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from _ranks import good, run_on_ranks
from _sharded import distance, mesh, net, whole
from adafactor import Adafactor

MODES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float64": (torch.float64, {"lr": 1e-2, "beta1": 0.9, "weight_decay": 0.1}),
    "paper": (torch.float32, {}),
    "one byte": (torch.float32, {"lr": 1e-2, "beta1": 0.9, "momentum_dtype": torch.int8}),
    "24 bits": (torch.bfloat16, {"lr": 1e-2, "beta1": 0.9, "momentum_dtype": "int8", "weight_bits": 24}),
    "32 bits": (torch.bfloat16, {"lr": 1e-2, "beta1": 0.9, "momentum_dtype": "bfloat16", "weight_bits": 32}),
}
WAYS = {
    "nested": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
}

RANKS = [(4, 1), (4, 2), (4, 3), (4, 4), (1, 4)]  # that saved, that loaded
LOADS = [(mode, "nested") for mode in MODES] + [("24 bits", "flattened"), ("24 bits", "whole")]


def built(mode: str, seed: int, **changes: Any) -> tuple[nn.Module, Adafactor]:
    dtype, arguments = MODES[mode]
    model = net(dtype)
    if seed:
        torch.manual_seed(seed)
        for p in model.parameters():
            nn.init.normal_(p)
    if dist.get_world_size() > 1:
        fully_shard(model.up, mesh=mesh(dist.get_world_size()))
        fully_shard(model, mesh=mesh(dist.get_world_size()))
    return model, Adafactor(model.named_parameters(), **{**arguments, **changes})


def train(model: nn.Module, optimizer: Adafactor, steps: range) -> list[float]:
    """The losses of the whole batch, whose rows the ranks share."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    dtype = next(model.parameters()).dtype
    losses = []
    for step in steps:
        torch.manual_seed(100 + step)
        x, y = torch.randn(2, 12, 33, dtype=torch.float64).to(dtype).chunk(ranks, 1)[rank]
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach().double()
        dist.all_reduce(loss)
        losses.append(loss.item() / ranks)
    return losses


def contents(model: nn.Module, optimizer: Adafactor) -> dict[str, Tensor]:
    """Every weight and every state tensor, whole."""
    found = {}
    for name, p in model.named_parameters():
        found[name] = whole(p.detach()).clone()
        for key in sorted(optimizer.state[p]):
            found[f"{name} {key}"] = whole(optimizer.state[p][key]).clone()
    return found


def save(folder: str, mode: str) -> dict[str, Any]:
    """Train, save in every way, train on."""
    model, optimizer = built(mode, 0)
    train(model, optimizer, range(5))
    for way in [way for name, way in LOADS if name == mode and way in WAYS]:
        weights, state = get_state_dict(model, optimizer, options=WAYS[way])
        save_checkpoint({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/{way}")
    whole_options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, state = get_state_dict(model, optimizer, options=whole_options)
    if dist.get_rank() == 0:
        torch.save({"model": weights, "optimizer": state}, f"{folder}/whole.pt")
    saved = contents(model, optimizer)
    dist.barrier()
    return {"saved": saved, "losses": train(model, optimizer, range(5, 10)), "end": contents(model, optimizer)}


def load(folder: str, mode: str, way: str) -> dict[str, Any]:
    """Load into another model, and train on."""
    model, optimizer = built(mode, 7)
    if way == "whole":
        both = torch.load(f"{folder}/whole.pt", weights_only=True) if dist.get_rank() == 0 else {}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        weights, state = both.get("model", {}), both.get("optimizer", {})
    else:
        options = WAYS[way]
        weights, state = get_state_dict(model, optimizer, options=options)
        load_checkpoint({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/{way}")
    set_model_state_dict(model, weights, options=options)
    set_optimizer_state_dict(model, optimizer, state, options=options)
    loaded = contents(model, optimizer)
    return {"saved": loaded, "losses": train(model, optimizer, range(5, 10)), "end": contents(model, optimizer)}


def fresh(way: str) -> bool:
    """Asking for the state before the first step takes none, and gives a complete one."""
    model, optimizer = built("24 bits", 0)
    before = contents(model, optimizer)
    options = WAYS.get(way) or StateDictOptions(full_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    set_optimizer_state_dict(model, optimizer, state, options=options)
    after = contents(model, optimizer)
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def cut_off(folder: str, what: str) -> str:
    """What loading says of a checkpoint that lacks its end."""
    model, optimizer = built("float64", 7)
    weights, state = get_state_dict(model, optimizer)
    try:
        load_checkpoint({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/{what}")
    except CheckpointException as error:
        return type(error).__name__
    return "no error"


def momentum_across_columns() -> dict[str, Any]:
    """One-byte momentum, loaded where columns are split and it is kept in bfloat16; and by name alone, through DCP."""
    ranks = dist.get_world_size()
    torch.manual_seed(0)
    value = torch.randn(64, 300)

    def optimizer_of(*placements: Shard) -> tuple[nn.Parameter, Adafactor]:
        p = nn.Parameter(distribute_tensor(value.clone(), mesh(ranks), placements, src_data_rank=None))
        return p, Adafactor([("w", p)], lr=1e-2, beta1=0.9, momentum_dtype=torch.int8)

    p, optimizer = optimizer_of(Shard(0))
    p.grad = distribute_tensor(torch.randn(64, 300), mesh(ranks), [Shard(0)], src_data_rank=None)
    optimizer.step()
    q, other = optimizer_of(Shard(1))
    other.load_state_dict(optimizer.state_dict())
    kept = whole(other.state[q]["exp_avg"])
    r, back = optimizer_of(Shard(0))
    back.load_state_dict(other.state_dict())
    from adafactor._rounding import dequantize

    codes, scales = (whole(optimizer.state[p][name]) for name in ("exp_avg_code", "exp_avg_scale"))
    right = dequantize(codes, scales)
    again = dequantize(*(whole(back.state[r][name]) for name in ("exp_avg_code", "exp_avg_scale")))
    names = ("step", "exp_avg_sq_row", "exp_avg_sq_col")
    stats = [distance(whole(other.state[q][name]), whole(optimizer.state[p][name])) for name in names]
    return {"dtype": kept.dtype, "error": distance(kept, right), "back": distance(again, right), "statistics": stats}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What every case returned on its ranks: "1/mode" and "4/mode" saved, "4 to 2/mode/way" loaded."""
    folders = {ranks: tmp_path_factory.mktemp(f"from{ranks}") for ranks in (1, 4)}

    def saves(ranks: int) -> dict[str, Any]:
        for mode in MODES:
            (folders[ranks] / mode).mkdir()
        return {f"{ranks}/{mode}": partial(save, str(folders[ranks] / mode), mode) for mode in MODES}

    def loads(origin: int, ranks: int) -> dict[str, Any]:
        return {
            f"{origin} to {ranks}/{mode}/{way}": partial(load, str(folders[origin] / mode), mode, way)
            for mode, way in LOADS
        }

    found = run_on_ranks(1, saves(1))
    found |= run_on_ranks(4, saves(4) | loads(4, 4) | loads(1, 4))
    cut = folders[4] / "float64"
    for name, lacks in (("incomplete", ".metadata"), ("short", "__2_0.distcp")):
        (cut / name).mkdir()
        for file in (cut / "nested").iterdir():
            data = file.read_bytes()
            if file.name != lacks:
                (cut / name / file.name).write_bytes(data)
            elif name == "short":
                (cut / name / file.name).write_bytes(data[: len(data) // 2])
    more: dict[str, Any] = {f"fresh/{way}": partial(fresh, way) for way in (*WAYS, "whole")}
    more |= {f"cut/{what}": partial(cut_off, str(cut), what) for what in ("incomplete", "short")}
    more["columns"] = momentum_across_columns
    for ranks in (1, 2, 3):
        found |= run_on_ranks(ranks, loads(4, ranks) | (more if ranks == 2 else {}))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "way"), LOADS)
@pytest.mark.parametrize("ranks", RANKS, ids=lambda ranks: f"{ranks[0]} to {ranks[1]}")
def test_training_goes_on_from_a_checkpoint(runs: dict[str, list[Any]], ranks: tuple[int, int], mode: str, way: str):
    before = good(runs[f"{ranks[0]}/{mode}"])[0]
    for after in good(runs[f"{ranks[0]} to {ranks[1]}/{mode}/{way}"]):
        assert after["saved"].keys() == before["saved"].keys()
        for name, value in before["saved"].items():
            assert after["saved"][name].dtype == value.dtype
            assert torch.equal(after["saved"][name], value), name
        if ranks[0] == ranks[1]:
            assert after["losses"] == before["losses"]
            assert all(torch.equal(after["end"][name], value) for name, value in before["end"].items())
        bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[MODES[mode][0]]
        assert after["losses"] == pytest.approx(before["losses"], rel=bound)


@pytest.mark.slow
@pytest.mark.parametrize("way", [*WAYS, "whole"])
def test_a_checkpoint_before_the_first_step_is_complete_and_takes_no_step(runs: dict[str, list[Any]], way: str):
    assert all(good(runs[f"fresh/{way}"]))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["incomplete", "short"])
def test_a_checkpoint_that_was_cut_off_is_refused(runs: dict[str, list[Any]], what: str):
    assert "no error" not in good(runs[f"cut/{what}"])


@pytest.mark.slow
def test_one_byte_momentum_is_converted_where_columns_are_split(runs: dict[str, list[Any]]):
    found = good(runs["columns"])[0]
    assert found["dtype"] == torch.bfloat16
    assert found["error"] <= 2**-8
    assert found["back"] <= 0.01
    assert found["statistics"] == [0, 0, 0]
