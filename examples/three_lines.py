"""The smallest training loop with PASSION: an ordinary loop and three lines more.

python -m examples.three_lines
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from examples.backbones import UHeMISLike
from passion_plugin.data import IncompleteDataset, draw_presence
from passion_plugin.phantom import PhantomDataset
from passion_plugin.wrapper import PassionWrapper

__all__ = ["main"]


def main(epochs: int = 3, patients: int = 8, size: int = 24) -> list[float]:
    """Train for a moment; returns the loss of every step."""
    torch.manual_seed(0)
    phantom = PhantomDataset(patients, (size,) * 3)
    presence = draw_presence(phantom.ids, {"flair": 0.2, "t1ce": 0.4, "t1": 0.6, "t2": 0.8}, seed=0)
    loader = DataLoader(IncompleteDataset(phantom, presence), batch_size=2)

    backbone = UHeMISLike(phantom.modalities, num_classes=4)
    model = PassionWrapper(backbone, modalities=phantom.modalities, presence=presence)  # 1: wrap
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    losses = []
    for epoch in range(epochs):
        for batch in loader:
            prediction = model(batch["image"], batch["mask"])
            loss = F.cross_entropy(prediction, batch["label"])
            loss = loss + model.passion_loss(batch["label"])  # 2: distil
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        preference = model.end_epoch()  # 3: update the preference
        print(f"epoch {epoch + 1}: loss {losses[-1]:.3f}, beta {preference.beta.tolist()}")
    return losses


if __name__ == "__main__":
    main()
