"""The training loop: one model, one optimizer, one stream of batches, and everything that must survive a restart."""

from __future__ import annotations

import math
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from adafactor._distributed import local
from adafactor.cli import _models, _ranks
from adafactor.cli._contenders import Contender
from adafactor.cli._errors import UserError
from adafactor.cli._model import Loss, ModelConfig
from adafactor.cli._text import Corpus

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
VALIDATION_WINDOWS = 256


@dataclass(frozen=True)
class Setup:
    """Everything besides the optimizer and the text that decides the numbers.

    A model that comes in sizes has its width, depth and heads from there, and its vocabulary unless one is given.

    Raises:
        UserError: a value is out of range, or the device or the package that has the model is not there.
    """

    steps: int = 500
    batch_size: int = 8
    seed: int = 0
    width: int = ModelConfig.width
    depth: int = ModelConfig.depth
    heads: int = ModelConfig.heads
    context: int = ModelConfig.context
    dtype: str = "float32"
    device: str = "auto"
    threads: int = 0
    shard: str | None = None
    ranks: int = 1
    model: str = "gpt"
    size: str | None = None
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        limits = (("steps", 1, 10**9), ("batch_size", 1, 10**6), ("seed", 0, 2**63 - 1), ("threads", 0, 512))
        for name, least, most in limits:
            if not least <= (value := getattr(self, name)) <= most:
                raise UserError(f"--{name.replace('_', '-')} must be from {least} to {most}, got {value}")
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        device = resolved_device(self.device)
        self._resolve_size()
        try:
            self.task()
        except ValueError as error:
            raise UserError(f"--{error}") from error
        if self.batch_size % self.ranks:
            raise UserError(
                f"--batch-size must be a multiple of the {self.ranks} processes, which share it, got {self.batch_size}"
            )
        # Resolved once, so that what a checkpoint holds is what ran.
        object.__setattr__(self, "device", device)
        object.__setattr__(self, "threads", self.threads or min(512, torch.get_num_threads() * self.ranks))

    def _resolve_size(self) -> None:
        sizes = _models.find(self.model).sizes
        if not sizes:
            for name, value in (("size", self.size), ("vocabulary", self.vocabulary)):
                if value is not None:
                    raise UserError(
                        f"--{name} {value} is for {', '.join(_models.SIZED)}; the size of {self.model} is --width, "
                        "--depth and --heads, and it reads bytes"
                    )
            return
        size = next(iter(sizes)) if self.size is None else self.size
        if size not in sizes:
            raise UserError(f"--size must be one of {', '.join(sizes)} for {self.model}, got {size!r}")
        numbers = sizes[size]
        vocabulary = numbers.vocabulary if self.vocabulary is None else self.vocabulary
        if not 256 <= vocabulary <= 2**20:
            raise UserError(f"--vocabulary must be from 256 to {2**20}, got {vocabulary}")
        resolved = {"size": size, "vocabulary": vocabulary}
        for name, value in (resolved | {name: getattr(numbers, name) for name in ("width", "depth", "heads")}).items():
            object.__setattr__(self, name, value)

    def task(self, pieces: int = 256) -> _models.Task:
        """The model and what it learns.

        Args:
            pieces: how many different bytes or tokens the text has; the model's size does not depend on it.
        """
        return _models.find(self.model).task(self, pieces)

    @property
    def tokens_per_step(self) -> int:
        """Bytes or tokens that are read per step."""
        return self.batch_size * self.context

    @property
    def log_every(self) -> int:
        """Steps per line of metrics.jsonl."""
        return max(1, min(10, self.steps // 50))

    def evaluates_at(self, step: int) -> bool:
        """Whether the model is evaluated after ``step``: six times, evenly, the last time at the end."""
        return step * 6 // self.steps != (step - 1) * 6 // self.steps


def resolved_device(device: str) -> str:
    """``cpu`` or ``cuda``, also for ``auto``.

    Raises:
        UserError: it is none of these, or not there.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device must be one of auto, cpu, cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; use --device cpu")
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


class Diverged(Exception):
    """The loss or the weights stopped being numbers."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(f"the training diverged at step {step}: the loss became {loss}")
        self.step = step


class Trainer:
    """Trains; ``state_dict`` holds all that the next step depends on, so a restored trainer continues bit for bit.

    Args:
        setup: sizes, seed, dtype, device, threads.
        contender: the optimizer.
        lr: its peak learning rate; None when it makes its own.
        corpus: the text.

    Raises:
        UserError: the text is too small, differs between processes, or the optimizer refuses the model.
    """

    def __init__(self, setup: Setup, contender: Contender, lr: float | None, corpus: Corpus) -> None:
        torch.set_num_threads(max(1, setup.threads // setup.ranks))
        self.setup, self.contender, self.lr = setup, contender, lr
        self.task = setup.task(corpus.pieces)
        self.corpus = corpus.checked(self.task.window)
        if not _ranks.same(int(corpus.train.sha256[:12], 16)):
            raise UserError("--data: the processes read different texts; give the same on every machine")
        self.device = torch.device(setup.device)
        self.model = self.fresh_model().to(self.device)
        for p in self.model.parameters():
            p.data = p.data.to(DTYPES[setup.dtype])
        self.loss = _ranks.sharded(Loss(self.model), list(cast(Any, self.model).blocks), setup.shard)
        try:
            self.optimizer = contender.make(list(self.model.named_parameters()), lr)
        except ValueError as error:
            raise UserError(f"{contender.name}: {error}") from error
        self.generator = torch.Generator().manual_seed(setup.seed)
        self.steps_done = 0
        self.seconds = 0.0  # spent in steps; evaluation and checkpoints are not counted
        self._window: list[tuple[float, float, float]] = []  # loss, seconds, seconds in the optimizer

    def fresh_model(self) -> nn.Module:
        """What the training starts from, in float32; ``benchmarks/rounding.py`` starts from trained weights."""
        return self.task.build(self.setup.seed)

    def next_batch(self) -> Tensor:
        """Examples of training text, ``[batch_size, n]``, the same on every process."""
        windows = self.corpus.batch(self.setup.batch_size, self.task.window, self.generator)
        return self.task.rows(windows, self.generator)

    def step(self) -> None:
        """One training step.

        Raises:
            Diverged: the loss is not finite.
        """
        started = time.perf_counter()
        step = self.steps_done + 1
        if self.lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * self.contender.schedule.factor(step, self.setup.steps)
        loss = self.backward(self.next_batch())
        value = self._finite(_ranks.mean(loss.item()), step)
        before_update = time.perf_counter()
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.steps_done = step
        self.seconds += now - started
        self._window.append((value, now - started, now - before_update))

    def backward(self, batch: Tensor) -> Tensor:
        """Fresh gradients for one batch, clipped as the contender says; returns the loss of this process's share."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(_ranks.rows(batch).to(self.device))
        loss.backward()
        if self.contender.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.contender.clip_norm)
        return loss.detach()

    @torch.no_grad()
    def evaluate(self) -> float:
        """Nats per prediction over the validation windows, the same ones every time and on every process.

        Raises:
            Diverged: the loss is not finite.
        """
        windows = self.corpus.validation_windows(VALIDATION_WINDOWS, self.task.window)
        rows = self.task.rows(windows, torch.Generator().manual_seed(0))
        self.loss.eval()
        total = sum(self.loss(part.to(self.device)).item() * len(part) for part in rows.split(16))
        self.loss.train()
        _ranks.reshard(self.loss)
        return self._finite(_ranks.mean(total / len(rows)), self.steps_done)

    def _finite(self, loss: float, step: int) -> float:
        if not math.isfinite(loss):
            raise Diverged(step, loss)
        return loss

    def check_weights(self) -> None:
        """Refuse to go on, or to be saved, with weights that are not numbers.

        Raises:
            Diverged: some are not.
        """
        if _ranks.largest(not all(local(p).isfinite().all() for p in self.model.parameters())):
            raise Diverged(self.steps_done, math.nan)

    def metrics(self) -> dict[str, float]:
        """One line of metrics over the steps since the last call."""
        losses, seconds, updates = zip(*self._window, strict=True)
        self._window.clear()
        return {
            "step": self.steps_done,
            "loss": statistics.fmean(losses),
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            "tokens_per_second": round(self.setup.tokens_per_step * len(losses) / sum(seconds), 1),
            "elapsed_s": round(self.seconds, 3),
            "step_ms": round(1e3 * statistics.median(seconds), 3),
            "optimizer_ms": round(1e3 * statistics.median(updates), 3),
        }

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, as one process has them; of sharded tensors only the first process has any."""
        optimizer = self.optimizer.state_dict()
        state = {i: {name: _ranks.whole(v) for name, v in s.items()} for i, s in optimizer["state"].items()}
        return {
            "model": {name: _ranks.whole(p) for name, p in self.model.state_dict().items()},
            "optimizer": optimizer | {"state": state},
            "generator": self.generator.get_state(),
            "steps_done": self.steps_done,
            "seconds": self.seconds,
            "window": list(self._window),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a ``state_dict`` of a trainer with the same setup and optimizer, however it was sharded."""
        own = self.model.state_dict()
        self.model.load_state_dict({k: _ranks.placed_like(own.get(k), v) for k, v in state["model"].items()})
        parameters = dict(enumerate(p for group in self.optimizer.param_groups for p in group["params"]))
        optimizer = state["optimizer"]
        placed = {
            i: {name: _ranks.placed_like(parameters.get(i), v) for name, v in s.items()}
            for i, s in optimizer["state"].items()
        }
        self.optimizer.load_state_dict(optimizer | {"state": placed})
        self.generator.set_state(state["generator"])
        self.steps_done, self.seconds = state["steps_done"], state["seconds"]
        self._window = [tuple(entry) for entry in state["window"]]


class StopSignal:
    """Inside ``with``, Ctrl-C and SIGTERM only set ``received``; the second one acts as it always does."""

    received: int | None = None

    def __enter__(self) -> StopSignal:
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def agreed(self) -> int | None:
        """The signal that has arrived at any of the processes, which all ask at the same place."""
        return int(_ranks.largest(self.received or 0)) or None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(self, *exception: object) -> None:
        self._restore()


class MetricsSink(Protocol):
    """Where lines of metrics go."""

    def append(self, row: dict[str, Any], /) -> None:
        """Add a line."""
        ...

    def sync(self) -> None:
        """Make the lines so far safe."""
        ...


def train(
    trainer: Trainer,
    metrics: MetricsSink,
    stop: StopSignal,
    on_line: Callable[[dict[str, float]], None],
    save: Callable[[], None] = lambda: None,
    save_every: int | None = None,
) -> bool:
    """Step to the end, or until a signal arrives; False then.

    Args:
        trainer: where to begin is its ``steps_done``.
        metrics: gets a line every ``setup.log_every`` steps and at every evaluation.
        stop: looked at after every step.
        on_line: called with every line.
        save: writes a checkpoint; called every ``save_every`` steps, at the end, and when a signal arrives.
        save_every: None for only at the end and on a signal.

    Raises:
        Diverged: the loss or the weights are not finite; nothing of it is saved.
    """
    setup = trainer.setup
    while trainer.steps_done < setup.steps:
        trainer.step()
        step, last = trainer.steps_done, trainer.steps_done == setup.steps
        if setup.evaluates_at(step) or step % setup.log_every == 0:
            line = trainer.metrics()
            if setup.evaluates_at(step):
                line["val_loss"] = trainer.evaluate()
            metrics.append(line)
            on_line(line)
        received = stop.agreed()
        if last or received or (save_every and step % save_every == 0):
            trainer.check_weights()
            metrics.sync()
            save()
        if received and not last:
            return False
    return True
