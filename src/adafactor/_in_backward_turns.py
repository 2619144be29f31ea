"""The order of steps in a backward pass whose gradients are reduced over processes, several parameters at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.autograd import Variable


class Receiver(Protocol):
    """What a handle does with reduced gradients."""

    def due(self, params: Sequence[Tensor]) -> list[Tensor]: ...

    def step(self, params: Sequence[Tensor]) -> None: ...


Chosen = list[tuple[Receiver, list[Tensor]]]


class Item(Protocol):
    """Parameters whose gradients are being reduced."""

    def step(self) -> None: ...


class Turns:
    """One run of the engine: what it reduces is stepped when the next reduction has begun, the last at the end.

    An error waits for the end: neither torch's wrappers nor the other processes recover from half a pass.
    """

    def __init__(self, run: int) -> None:
        self.run = run
        self._waiting: Item | None = None
        self._error: Exception | None = None
        Variable._execution_engine.queue_callback(self.end)

    def choose(self, receivers: Iterable[Receiver], params: Sequence[Tensor]) -> Chosen:
        """Who steps which of the parameters; nobody after an error."""
        try:
            if self._error is None:
                return [(receiver, due) for receiver in receivers if (due := receiver.due(params))]
        except Exception as error:
            self._error = error
        return []

    def take(self, item: Any) -> None:
        """Step what has waited, and let this wait."""
        self.step()
        self._waiting = item

    def step(self) -> None:
        item, self._waiting = self._waiting, None
        try:
            if item is not None and self._error is None:
                item.step()
        except Exception as error:
            self._error = error

    def end(self) -> None:
        self.step()
        self.check()

    def check(self) -> None:
        if self._error is not None:
            raise self._error
