"""The three lines in Lightning: a wrapped network, a line in `training_step`, a callback.

python -m examples.lightning_callback
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn import functional as F

from examples.backbones import UHeMISLike
from examples.incomplete_phantom import incomplete_phantom
from passion_plugin.data import PresenceTable
from passion_plugin.integrations.lightning import PassionCallback
from passion_plugin.wrapper import PassionWrapper

__all__ = ["Segmentation", "main"]


class Segmentation(pl.LightningModule):
    def __init__(self, presence: PresenceTable) -> None:
        super().__init__()
        backbone = UHeMISLike(presence.modalities, num_classes=4)
        self.network = PassionWrapper(backbone, presence.modalities, presence=presence)  # 1: wrap
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        prediction = self.network(batch["image"], batch["mask"])
        loss = F.cross_entropy(prediction, batch["label"])
        loss = loss + self.network.passion_loss(batch["label"])  # 2: distil
        self.log("loss", loss, batch_size=len(prediction))
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        prediction = self.network(batch["image"], batch["mask"])
        self.log("val_loss", F.cross_entropy(prediction, batch["label"]), batch_size=len(prediction))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(out: str | Path = "runs/lightning", epochs: int = 3, patients: int = 8, size: int = 24) -> list[float]:
    """Train for a moment; returns the loss of every step, leaves `metrics.csv` and checkpoints in `out`."""
    torch.manual_seed(0)
    loader, presence = incomplete_phantom(patients, size)
    module = Segmentation(presence)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[PassionCallback()],  # 3: update the preference
        logger=CSVLogger(out, name="", version=""),
        log_every_n_steps=2,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, loader)
    print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items() if "beta" in name})
    return module.losses


if __name__ == "__main__":
    main()
