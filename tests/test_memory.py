"""``memory.report``: what it computes is what a training step takes, by the allocator's own records."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from adafactor import Adafactor, memory
from adafactor._distributed import local
from adafactor.cli import _bench_memory
from adafactor.cli._baselines import Lion, MixedPrecisionAdamW
from adafactor.cli._bench_memory_trace import Peaks, peaks
from adafactor.cli._plan_modes import MODES, Mode

BY_NAME = {mode.name: mode for mode in MODES}
MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": lambda named: torch.optim.AdamW(named, 1e-3, fused=True),
    "AdamW, mixed precision": lambda named: MixedPrecisionAdamW(named, 1e-3),
    "Lion": lambda named: Lion(named, 1e-3),
}


class Net(nn.Module):
    """A residual stack over an embedding, which may be the output layer's too, and a second stack's before it."""

    def __init__(self, rows: int, width: int, depth: int, *, tied: bool, encoder: bool = False) -> None:
        super().__init__()
        self.shared = nn.Embedding(rows, width)
        self.front = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth * encoder))
        if encoder:
            self.embed = nn.Embedding(rows, width)
            self.embed.weight = self.shared.weight
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, rows, bias=False)
        if tied:
            self.head.weight = self.shared.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.shared(tokens)
        for block in self.front:
            x = x + block(x)[..., : x.shape[-1]]
        if self.front:
            x = self.embed(tokens + 1) + x
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x)).float().square().mean()


class TwoHeads(nn.Module):
    """Two output layers that are the embedding, with layers between all three."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(700, 64)
        self.front = nn.Sequential(nn.Linear(64, 800), nn.Linear(800, 64))
        self.early = nn.Linear(64, 700, bias=False)
        self.stack = nn.Sequential(nn.Linear(64, 800), nn.Linear(800, 64))
        self.late = nn.Linear(64, 700, bias=False)
        self.early.weight = self.late.weight = self.shared.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.front(self.shared(tokens))
        early = self.early(x).float().square().mean()
        return self.late(self.stack(x)).float().square().mean() + early


NETS: dict[str, Callable[[], nn.Module]] = {
    "tied": lambda: Net(700, 64, 3, tied=True),
    "tied twice": lambda: Net(700, 64, 9, tied=True, encoder=True),
    "two embeddings": lambda: Net(700, 64, 3, tied=False, encoder=True),
    "two heads": TwoHeads,
    "free": lambda: Net(700, 64, 3, tied=False),
}


def build(mode: Mode, named: Any) -> torch.optim.Optimizer:
    return Adafactor(named, **mode.config) if mode.ours else MAKERS[mode.optimizer](named)


def planned(model: nn.Module, mode: Mode, ranks: int = 1) -> memory.Bytes:
    rows = memory.report(model, ranks=ranks, in_backward=mode.in_backward, **mode.config).rows
    return next(row for row in rows if row.optimizer == mode.optimizer)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(local(v).nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))


def trained(make: Callable[[], nn.Module], mode: Mode) -> tuple[memory.Bytes, Peaks, int]:
    """What is planned, what a step takes, and the optimizer's state."""
    found: list[Any] = []

    def train() -> None:
        torch.manual_seed(0)
        net = make()
        for p in net.parameters():
            p.data = p.data.to(mode.dtype)
            p.register_post_accumulate_grad_hook(_bench_memory._mark_gradient)
        found.append(planned(net, mode))
        optimizer = build(mode, list(net.named_parameters()))
        tokens = torch.tensor([1, 2])
        with optimizer.step_in_backward() if mode.in_backward else contextlib.nullcontext():  # type: ignore[union-attr]
            _bench_memory._step(net, optimizer, tokens, traced=False)
            _bench_memory._step(net, optimizer, tokens, traced=True)
        found.append(state_bytes(optimizer))

    measured = peaks(train)
    return found[0], measured, found[1]


# --- one device ---------------------------------------------------------------------------------------------------

SOME = ("adamw-float32", "bfloat16", "bfloat16-in-backward")


@pytest.mark.parametrize("mode", SOME)
@pytest.mark.parametrize("net", NETS)
def test_the_gradients_alive_at_once_are_counted(net: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its bfloat16 products take scratch from the allocator, by instruction set and threads as much as the gradients.
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    chosen = BY_NAME[mode]
    model = NETS[net]().to(chosen.dtype)
    optimizer = build(chosen, list(model.named_parameters()))
    with optimizer.step_in_backward() if chosen.in_backward else contextlib.nullcontext():  # type: ignore[union-attr]
        model(torch.tensor([1, 2])).backward()
        optimizer.step()
        optimizer.zero_grad()
        alive = memory.peak_allocated(model(torch.tensor([1, 2])).backward)
    assert abs(alive - planned(model, chosen).gradients) <= 64 * (700 + 64)  # a step's temporaries; half an embedding


# Not of two embeddings: marks hold on to a gradient, which then is not added into.
@pytest.mark.parametrize("mode", SOME)
@pytest.mark.parametrize("net", ["tied", "tied twice", "two heads", "free"])
def test_the_gradients_alive_at_once_are_counted_to_the_byte(net: str, mode: str) -> None:
    computed, measured, _ = trained(NETS[net], BY_NAME[mode])
    assert computed.gradients == measured.kept["gradients"]
    assert computed.weights == measured.kept["weights"]


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.name != "adamw-8bit"], ids=lambda mode: mode.name)
def test_the_state_is_counted_to_the_byte(mode: Mode) -> None:
    computed, measured, allocated = trained(NETS["free"], mode)
    assert computed.state == allocated == measured.kept["state"]


def test_eight_bits_are_bitsandbytes() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    params = [nn.Parameter(torch.zeros(shape)) for shape in [(4095,), (4096,), (4097,), (300, 70)]]
    optimizer = bitsandbytes.optim.AdamW8bit(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    maps = {"qmap1", "qmap2"}  # the same two tables of 256 numbers for every tensor
    kept = [v.nbytes for s in optimizer.state.values() for k, v in s.items() if torch.is_tensor(v) and k not in maps]
    assert memory.report(params).rows[3].state == sum(kept)


def test_the_bytes_of_mixed_precision_have_one_gradient_in_float32() -> None:
    computed, measured, _ = trained(NETS["free"], BY_NAME["adamw-mixed"])
    assert computed.temporaries == 4 * 700 * 64
    assert computed.total == pytest.approx(sum(measured.planned.values()), rel=0.02)


def test_frozen_parameters_have_weights_alone_and_buffers_are_weights() -> None:
    net = Net(700, 64, 3, tied=True)
    whole = memory.report(net).rows[0]
    net.register_buffer("mask", torch.ones(1000, dtype=torch.bool))
    net.shared.requires_grad_(False)
    row = memory.report(net).rows[0]
    assert row.weights == whole.weights + 1000
    assert row.gradients == whole.gradients - 3 * 4 * 700 * 64
    with pytest.raises(ValueError, match="ranks must be an integer >= 1"):
        memory.report(net, ranks=0)


def test_names_and_shapes_have_no_ties() -> None:
    shapes = {"a.weight": (100, 50), "b.weight": (50, 40)}
    plain, in_backward = (memory.report(shapes, in_backward=on).rows[0] for on in (False, True))
    assert (plain.gradients, in_backward.gradients) == (4 * 7000, 4 * 5000)
    assert memory.report([torch.zeros(100, 50)]).rows[0].gradients == 4 * 5000
    assert memory.report({}).rows[0].total == memory.WORKSPACE


def _real(name: str) -> Callable[[], nn.Module]:
    """Published sizes, random weights; the input is the target."""
    transformers = pytest.importorskip("transformers")
    kind, config = {
        "t5-small": ("T5ForConditionalGeneration", transformers.T5Config(decoder_start_token_id=0)),
        "bert-base": ("BertForMaskedLM", transformers.BertConfig()),
        "gpt2": ("GPT2LMHeadModel", transformers.GPT2Config()),
        "llama": (
            "LlamaForCausalLM",
            transformers.LlamaConfig(
                vocab_size=16_000, hidden_size=768, intermediate_size=3072, num_hidden_layers=6, num_attention_heads=12
            ),
        ),
    }[name]

    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = getattr(transformers, kind)(config)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.model(input_ids=tokens[None], labels=tokens[None]).loss

    return Trained


FEW = ("adamw-float32", "adamw-mixed", "adamw-bfloat16", "bfloat16", "24-bit-int8-momentum", "bfloat16-in-backward")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model", "mode"),
    [("t5-small", mode.name) for mode in MODES if mode.name not in ("adamw-8bit", "lion")]
    + [(model, mode) for model in ("bert-base", "gpt2", "llama") for mode in FEW],
)
def test_the_peak_of_a_real_model_is_within_two_percent(model: str, mode: str) -> None:
    torch.set_num_threads(2)  # temporaries are planned as a bound; one thread takes far less, of llama's peak 2.3 %
    computed, measured, _ = trained(_real(model), BY_NAME[mode])
    found = sum(nbytes for kind, nbytes in measured.planned.items() if kind != "activations")
    print(f"{model}, {mode}: computed {computed.total:,}, measured {found:,}, {computed.total / found - 1:+.3%}")
    assert computed.total == pytest.approx(found, rel=0.02)
    assert found * (1 - 1e-4) <= computed.total <= found * (1 + 1e-4) + computed.temporaries
    assert computed.gradients == measured.kept["gradients"]


# --- several ranks ------------------------------------------------------------------------------------------------


@pytest.fixture
def ranks_of_one_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Rank 0 of several, whose collectives do nothing: what is allocated is what a rank allocates."""
    ranks = request.param
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    monkeypatch.setattr(dist, "all_reduce", lambda buffer, *_, **__: buffer.mul_(ranks))
    yield ranks
    dist.destroy_process_group()


@pytest.mark.parametrize("mode", SOME)
@pytest.mark.parametrize("shape", [(20_000, 128, 4), (1500, 384, 4)], ids=["large embedding", "large blocks"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "free"])
@pytest.mark.parametrize("ranks_of_one_process", [pytest.param(2, marks=pytest.mark.slow), 8], indirect=True)
def test_what_fsdp_holds_is_counted(
    ranks_of_one_process: int, tied: bool, shape: tuple[int, int, int], mode: str
) -> None:
    chosen = BY_NAME[mode]
    net = Net(*shape, tied=tied).to(chosen.dtype)
    computed = planned(net, chosen, ranks_of_one_process)
    mesh = init_device_mesh("cpu", (ranks_of_one_process,))
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    optimizer = build(chosen, list(net.named_parameters()))

    def step() -> None:
        net(torch.tensor([1, 2])).backward()
        optimizer.step()

    with optimizer.step_in_backward() if chosen.in_backward else contextlib.nullcontext():  # type: ignore[union-attr]
        step()
        optimizer.zero_grad()
        above = memory.peak_allocated(step)
    weights = sum(local(p).nbytes for p in net.parameters())
    assert computed.weights == weights
    assert computed.state == state_bytes(optimizer)
    assert computed.total == pytest.approx(weights + computed.state + above, rel=0.02)


def test_a_model_without_blocks_is_held_whole() -> None:
    model = nn.Linear(1000, 1000, bias=False)
    for ranks in (2, 64):
        row = memory.report(model, ranks=ranks).rows[1]
        assert row.unsharded + row.gradients == 2 * 4 * 1000 * 1000
    assert "unsharded" in str(memory.report(model, ranks=2))
    assert "unsharded" not in str(memory.report(model))
