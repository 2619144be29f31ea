"""`adafactor trace --matrix`: what R and C keep of a matrix of squared gradients, and what they lose.

The matrix is the weight of a bigram model: logits for the next byte, one row per byte before it. Its gradients are as
real as they are small: rows and columns differ by the bytes' frequencies, which R and C hold, and single pairs stand
out, which they cannot hold. Two optimizers get the same gradients: one factored, one with the full second moment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import log_softmax

from adafactor import Adafactor
from adafactor.cli import _text
from adafactor.cli._errors import UserError
from adafactor.cli._trace_walk import factored_v

CLASSES = 32  # the most frequent bytes
BATCH = 4096  # byte pairs per step
NAMES = {9: "tab", 10: "↵", 13: "CR", 32: "␣"}


@dataclass(frozen=True)
class Factoring:
    """The second moments after the last step; arrays are [rows, columns], float64."""

    source: str
    steps: int
    labels: list[str]  # of rows (the byte before) and columns (the next byte) alike
    g2: np.ndarray  # the last gradient, squared
    ema: np.ndarray  # its running average, kept in full
    R: np.ndarray  # [rows]
    C: np.ndarray  # [columns]
    V: np.ndarray  # R C / mean(R)
    loss: float

    @property
    def ratio(self) -> np.ndarray:
        return self.V / self.ema

    def numbers(self) -> dict[str, float]:
        """What is kept and lost, in numbers."""
        log_v, log_e = np.log(self.V), np.log(self.ema)
        step = np.sqrt(self.ema / self.V)  # how many times longer the factored step is
        return {
            "numbers_kept": self.R.size + self.C.size,
            "numbers_full": self.ema.size,
            "row_means_relative_error": float(np.abs(self.V.mean(1) / self.ema.mean(1) - 1).max()),
            "column_means_relative_error": float(np.abs(self.V.mean(0) / self.ema.mean(0) - 1).max()),
            "relative_error": float(np.linalg.norm(self.V - self.ema) / np.linalg.norm(self.ema)),
            "variance_kept": 1 - float(((self.V - self.ema) ** 2).sum() / ((self.ema - self.ema.mean()) ** 2).sum()),
            "log_variance_kept": 1 - float(((log_v - log_e) ** 2).sum() / ((log_e - log_e.mean()) ** 2).sum()),
            "share_of_steps_within_factor_2": float(((step > 0.5) & (step < 2)).mean()),
            "longest_step_ratio": float(step.max()),
            "shortest_step_ratio": float(step.min()),
        }

    def extremes(self) -> dict[str, dict[str, Any]]:
        """The pairs whose second moment is missed by the most, both ways."""
        found = {}
        for name, flat in (("too_small", int(self.ratio.argmin())), ("too_large", int(self.ratio.argmax()))):
            i, j = divmod(flat, self.ratio.shape[1])
            found[name] = {"row": i, "column": j, "before": self.labels[i], "next": self.labels[j],
                           "V_over_ema": float(self.ratio[i, j])}  # fmt: skip
        return found

    def as_dict(self) -> dict[str, Any]:
        arrays = {k: getattr(self, k).tolist() for k in ("g2", "ema", "R", "C", "V", "ratio")}
        return {"text": self.source, "labels": self.labels, "loss": self.loss, "numbers": self.numbers(),
                "extremes": self.extremes(), **arrays}  # fmt: skip


def byte_name(byte: int) -> str:
    """How a byte is written beside the picture."""
    return NAMES.get(byte) or (chr(byte) if 33 <= byte < 127 else f"{byte:02x}")


def factoring(data: Path | None, steps: int, lr: float | None, seed: int, progress: Callable[[], None]) -> Factoring:
    """Train the bigram model for some steps and read both optimizers' states; ``progress()`` is called after each.

    Raises:
        UserError: the text has fewer than 2 different bytes in a row.
    """
    corpus = _text.load(data).checked(2)
    text = corpus.train.data.long()
    pairs = torch.bincount(256 * text[:-1] + text[1:], minlength=256 * 256).reshape(256, 256)
    pairs[32, 32] = 0  # indentation: this one pair would outshine all others
    often = pairs.sum(0) + pairs.sum(1)
    top = often.argsort(descending=True, stable=True)[:CLASSES]
    top = top[often[top] > 0]
    if len(top) < 2:
        raise UserError(f"--data {corpus.source} must hold at least 2 different bytes; give more text")
    chances = pairs[top][:, top].double()

    n = len(top)
    factored, full = (torch.nn.Parameter(torch.zeros(n, n, dtype=torch.float64)) for _ in range(2))
    ours = Adafactor([factored], lr=lr, factor="last2", min_dim_size_to_factor=0)
    whole = Adafactor([full], lr=lr, factor="none")
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros(())
    for _ in range(steps):
        drawn = torch.multinomial(chances.flatten(), BATCH, replacement=True, generator=generator)
        batch = torch.bincount(drawn, minlength=n * n).reshape(n, n) / BATCH
        ours.zero_grad()
        loss = -(batch * log_softmax(factored, dim=1)).sum()  # cross entropy of the next byte
        loss.backward()
        assert factored.grad is not None
        full.grad = factored.grad.clone()
        ours.step()
        whole.step()
        progress()
    assert factored.grad is not None
    R, C, V = factored_v(ours.state[factored], factored.shape)
    return Factoring(
        source=corpus.source,
        steps=steps,
        labels=[byte_name(int(b)) for b in top],
        g2=factored.grad.square().numpy(),
        ema=whole.state[full]["exp_avg_sq"].numpy().copy(),
        R=R.numpy(),
        C=C.numpy(),
        V=V.numpy(),
        loss=float(loss.detach()),
    )
