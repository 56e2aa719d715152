"""The three lines in a Hugging Face Accelerate loop, with a checkpoint.

python -m examples.accelerate_loop
"""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn import functional as F

from examples.backbones import UHeMISLike
from examples.incomplete_phantom import incomplete_phantom
from passion_plugin.wrapper import PassionWrapper

__all__ = ["main"]


def main(out: str | Path = "runs/accelerate", epochs: int = 3, patients: int = 8, size: int = 24) -> list[float]:
    """Train for a moment; returns the loss of every step, leaves a checkpoint in `out`."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    loader, presence = incomplete_phantom(patients, size)

    backbone = UHeMISLike(presence.modalities, num_classes=4)
    wrapper = PassionWrapper(backbone, presence.modalities, presence=presence)  # 1: wrap
    optimizer = torch.optim.AdamW(wrapper.parameters(), lr=1e-3)
    model, optimizer, batches = accelerator.prepare(wrapper, optimizer, loader)

    losses = []
    for epoch in range(epochs):
        for batch in batches:
            with accelerator.accumulate(model):
                # One call for both, so that it is right when Accelerate uses DDP.
                prediction, passion_loss = model(batch["image"], batch["mask"], passion_target=batch["label"])
                loss = F.cross_entropy(prediction, batch["label"]) + passion_loss  # 2: distil
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        wrapper.end_epoch()  # 3: update the preference
        accelerator.log(wrapper.passion.metrics(), step=epoch)
        accelerator.print(f"epoch {epoch + 1}: loss {losses[-1]:.3f}")
    # The state of the wrapper holds numbers and names as well, which safetensors files cannot.
    accelerator.save_state(str(out), safe_serialization=False)
    return losses


if __name__ == "__main__":
    main()
