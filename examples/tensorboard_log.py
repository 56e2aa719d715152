"""The loop of `three_lines`, with terms, relative preference and weights in TensorBoard.

python -m examples.tensorboard_log && tensorboard --logdir runs/tensorboard
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional as F

from examples.backbones import UHeMISLike
from examples.incomplete_phantom import incomplete_phantom
from passion_plugin.integrations.logging import MetricsLogger
from passion_plugin.integrations.tensorboard import TensorBoardLog
from passion_plugin.wrapper import PassionWrapper

__all__ = ["main"]


def main(out: str | Path = "runs/tensorboard", epochs: int = 3, patients: int = 8, size: int = 24) -> list[float]:
    """Train for a moment; returns the loss of every step, leaves an event file in `out`."""
    torch.manual_seed(0)
    loader, presence = incomplete_phantom(patients, size)
    model = PassionWrapper(UHeMISLike(presence.modalities, num_classes=4), presence.modalities, presence=presence)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    board = TensorBoardLog(out)
    logger = MetricsLogger(board, every=2)  # MetricsLogger(wandb.log, every=50), MetricsLogger(mlflow.log_metrics), ...

    losses: list[float] = []
    for epoch in range(epochs):
        for batch in loader:
            loss = F.cross_entropy(model(batch["image"], batch["mask"]), batch["label"])
            loss = loss + model.passion_loss(batch["label"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            logger(model, len(losses))
        model.end_epoch()
        print(f"epoch {epoch + 1}: loss {losses[-1]:.3f}")
    board.close()
    return losses


if __name__ == "__main__":
    main()
