"""Several processes on this machine, as ranks that talk through gloo. Nothing here is itself a test."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Case = Callable[[], Any]


class Failed:
    """A case that raised, on one rank."""

    def __init__(self, text: str) -> None:
        self.text = text


def run_on_ranks(world: int, cases: Mapping[str, Case], folder: Path | None = None) -> dict[str, list[Any]]:
    """What every rank returns for each case: one process per rank runs all of them, in order.

    Cases are pickled by name, so they are functions of a module (or partials of such). One that raises is a `Failed`;
    those after it run if the ranks find together again.
    """
    with tempfile.TemporaryDirectory() as scratch:
        place = folder or Path(scratch)
        mp.spawn(_rank, (world, dict(cases), str(place)), nprocs=world)  # type: ignore[attr-defined]
        by_rank = [torch.load(place / f"rank{rank}.pt", weights_only=False) for rank in range(world)]
    return {name: [results.get(name, Failed("not run")) for results in by_rank] for name in cases}


def _rank(rank: int, world: int, cases: dict[str, Case], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    results: dict[str, Any] = {}
    for name, case in cases.items():
        try:
            results[name] = case()
        except Exception:
            results[name] = Failed(traceback.format_exc())
            print(rank, name, results[name].text[-900:], flush=True)
        torch.save(results, f"{folder}/rank{rank}.pt")
        failures = [None] * world
        dist.all_gather_object(failures, isinstance(results[name], Failed))
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo can outlive their group, and then abort an interpreter that winds down (torch 2.13)


def good(results: list[Any]) -> list[Any]:
    """The ranks' results, or the first failure in words."""
    for rank, result in enumerate(results):
        assert not isinstance(result, Failed), f"on rank {rank}: {result.text}"
    return results
