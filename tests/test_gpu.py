"""What only a GPU can show: no waiting, streams, CUDA graphs, compiled training loops, memory. Skipped without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from _cases import assert_same_bits, problem, snapshot
from adafactor import Adafactor
from adafactor.memory import peak_allocated

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

SHAPES = [(640, 768), (31,), (3, 64, 128), (1024,), (1024,), (3, 64, 128), (320, 9000)]  # some alike, for waves


def model(dtype: torch.dtype = torch.bfloat16) -> tuple[list[torch.nn.Parameter], list[list[torch.Tensor]]]:
    drawn = [problem(shape, steps=4, dtype=dtype) for shape in SHAPES]
    params = [torch.nn.Parameter(p0.cuda()) for p0, _ in drawn]
    return params, [[g.cuda() for g in grads] for _, grads in drawn]


def give(params: list[torch.nn.Parameter], grads: list[list[torch.Tensor]], t: int) -> None:
    for p, of_p in zip(params, grads, strict=True):
        p.grad = of_p[t].clone()


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("kwargs", [{}, {"lr": 0.01, "beta1": 0.9}], ids=["paper", "momentum"])
def test_a_step_never_waits_for_the_device(backend: str, kwargs: dict):
    params, grads = model()
    optimizer = Adafactor(params, backend=backend, **kwargs)
    for t in range(4):
        give(params, grads, t)
        with no_waiting():
            optimizer.step()


def test_a_step_in_a_side_stream_has_the_same_bits():
    taken = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        params, grads = model()
        optimizer = Adafactor(params)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for t in range(4):
                give(params, grads, t)
                optimizer.step()
        torch.cuda.synchronize()
        taken.append([snapshot(optimizer, p) for p in params])
    for one, other in zip(*taken, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("kwargs", [{}, {"beta1": 0.9, "momentum_dtype": torch.bfloat16}], ids=["plain", "momentum"])
def test_a_captured_step_counts_on_and_reads_lr_anew(kwargs: dict):
    """Two steps to warm up, one captured, and replayed with other gradients and another lr."""
    taken = []
    for captured in (False, True):
        params, grads = model()
        lr = torch.tensor(0.01, device="cuda")
        optimizer = Adafactor(params, lr=lr, **kwargs)
        for t in range(2):
            give(params, grads, t)
            optimizer.step()
        graph = torch.cuda.CUDAGraph()
        if captured:
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                optimizer.step()
        for t, now in ((2, 0.02), (3, 0.005)):
            lr.fill_(now)
            for p, of_p in zip(params, grads, strict=True):
                assert p.grad is not None
                p.grad.copy_(of_p[t])
            graph.replay() if captured else optimizer.step()
        torch.cuda.synchronize()
        taken.append([snapshot(optimizer, p) for p in params])
    for plain, replayed in zip(*taken, strict=True):
        assert_same_bits(replayed, plain)


def test_a_compiled_training_loop_does_not_compile_again():
    net = torch.nn.Linear(256, 256, device="cuda", dtype=torch.bfloat16)
    optimizer = Adafactor(net.parameters(), lr=0.01)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(net)
    for t in range(20):
        optimizer.param_groups[0]["lr"] = 0.01 / (t + 1)
        compiled(torch.ones(8, 256, device="cuda", dtype=torch.bfloat16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_temporaries_stay_within_the_bound():
    p = torch.nn.Parameter(torch.ones(16_384, 4096, device="cuda", dtype=torch.bfloat16))
    optimizer = Adafactor([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert peak_allocated(optimizer.step, "cuda") <= (16 << 20) + 20 * (16_384 + 4096) + (1 << 20)
