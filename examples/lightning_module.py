"""Lightning: the optimizer in `configure_optimizers`, stepping in backward by a callback, checkpoints by the `Trainer`.

    python examples/lightning_module.py
    python examples/lightning_module.py --resume runs/lightning/last.ckpt

A small network learns to tell apart the blobs that it is shown, made on the spot.
"""

from __future__ import annotations

import argparse

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import adafactor
from adafactor.integrations.lightning import StepInBackward


def blobs(count: int, seed: int) -> torch.utils.data.TensorDataset:
    """Points of 64 dims around ten centres."""
    centres = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    return torch.utils.data.TensorDataset(centres[labels] + 2 * torch.randn(count, 64, generator=generator), labels)


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10))

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.layers(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_index: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.layers(batch[0]), batch[1]), prog_bar=True)

    def configure_optimizers(self) -> dict:
        optimizer = adafactor.Adafactor(self.named_parameters(), **adafactor.recipes.adamw_like(1e-3))
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


def main(command_line: list[str] | None = None) -> L.Trainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--out", default="runs/lightning")
    parser.add_argument("--resume", help="a checkpoint that an earlier run wrote")
    options = parser.parse_args(command_line)

    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_epochs=options.epochs,
        accumulate_grad_batches=3,
        default_root_dir=options.out,
        callbacks=[StepInBackward(), ModelCheckpoint(options.out, save_last=True)],
        logger=False,
        enable_model_summary=False,
    )
    train = torch.utils.data.DataLoader(blobs(2000, 1), batch_size=32)
    trainer.fit(
        Classifier(), train, torch.utils.data.DataLoader(blobs(500, 2), batch_size=100), ckpt_path=options.resume
    )
    print(f"validation loss {trainer.callback_metrics['val_loss']:.3f}")
    return trainer


if __name__ == "__main__":
    main()
