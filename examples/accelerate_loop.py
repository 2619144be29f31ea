"""A loop of one's own under Accelerate: accumulation, stepping in backward, a schedule, checkpoints.

    python examples/accelerate_loop.py
    python examples/accelerate_loop.py --resume runs/accelerate/epoch-1
    accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py

A small transformer learns to predict the next byte of Python's standard library, read from this machine.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import adafactor


class Decoder(nn.Module):
    def __init__(self, width: int = 96, length: int = 64) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.places = nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)

    def forward(self, text: Tensor) -> Tensor:
        """[batch, length] -> the loss."""
        length = text.shape[1] - 1
        mask = nn.Transformer.generate_square_subsequent_mask(length, text.device)
        x = self.bytes(text[:, :-1]) + self.places(torch.arange(length, device=text.device))
        logits = self.head(self.layers(x, mask, is_causal=True))
        return nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


def text(windows: int, length: int = 65) -> Tensor:
    """[windows, length], bytes."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    everything = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
    return everything[: len(everything) // length * length].view(-1, length)[:windows].long()


def main(command_line: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--windows", type=int, default=2000, help="of 64 bytes, in an epoch")
    parser.add_argument("--out", default="runs/accelerate")
    parser.add_argument("--resume", help="a folder named epoch-N that an earlier run wrote")
    options = parser.parse_args(command_line)

    accelerator = Accelerator(gradient_accumulation_steps=3)
    torch.manual_seed(0)
    data = torch.utils.data.DataLoader(text(options.windows), batch_size=16, shuffle=True)
    model = Decoder()
    optimizer = adafactor.Adafactor(
        model.named_parameters(), **adafactor.recipes.adamw_like(3e-3), step_in_backward="accelerate"
    )
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimizer, 1.0, 0.1, total_iters=options.epochs * options.windows // 48
    )
    model, optimizer, data, schedule = accelerator.prepare(model, optimizer, data, schedule)

    begin = 0
    if options.resume:
        accelerator.load_state(options.resume)
        begin = int(options.resume.rpartition("-")[2])
    losses = []
    for epoch in range(begin, options.epochs):
        for batch in data:
            with accelerator.accumulate(model):  # the last group of an epoch may be shorter
                loss = model(batch)
                accelerator.backward(loss)  # parameters change here, at the end of each group
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        accelerator.print(f"epoch {epoch + 1}: loss {sum(losses[-20:]) / len(losses[-20:]):.3f} nats per byte")
        accelerator.save_state(str(Path(options.out, f"epoch-{epoch + 1}")))
    accelerator.end_training()
    return losses


if __name__ == "__main__":
    main()
