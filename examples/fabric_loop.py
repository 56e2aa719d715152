"""The three lines in a Lightning Fabric loop, with a checkpoint.

python -m examples.fabric_loop
"""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch.nn import functional as F

from examples.backbones import UHeMISLike
from examples.incomplete_phantom import incomplete_phantom
from passion_plugin.wrapper import PassionWrapper

__all__ = ["main"]


def main(out: str | Path = "runs/fabric", epochs: int = 3, patients: int = 8, size: int = 24) -> list[float]:
    """Train for a moment; returns the loss of every step, leaves a checkpoint in `out`."""
    fabric = Fabric(accelerator="cpu", devices=1)
    torch.manual_seed(0)
    loader, presence = incomplete_phantom(patients, size)

    backbone = UHeMISLike(presence.modalities, num_classes=4)
    wrapper = PassionWrapper(backbone, presence.modalities, presence=presence)  # 1: wrap
    model, optimizer = fabric.setup(wrapper, torch.optim.AdamW(wrapper.parameters(), lr=1e-3))
    batches = fabric.setup_dataloaders(loader)

    losses = []
    for epoch in range(epochs):
        for batch in batches:
            # One call for both, so that it is right under every strategy, DDP included.
            prediction, passion_loss = model(batch["image"], batch["mask"], passion_target=batch["label"])
            loss = F.cross_entropy(prediction, batch["label"]) + passion_loss  # 2: distil
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        wrapper.end_epoch()  # 3: update the preference
        fabric.log_dict(wrapper.passion.metrics(), step=epoch)
        print(f"epoch {epoch + 1}: loss {losses[-1]:.3f}")
    fabric.save(Path(out) / "last.ckpt", {"model": model, "optimizer": optimizer})
    return losses


if __name__ == "__main__":
    main()
