"""A training that may be stopped after any step and goes on as if it had never stopped, bit for bit on a CPU.

    python -m examples.resume --steps 12 --stop-after 5 --out runs/resume   # five steps, in the middle of an epoch
    python -m examples.resume --steps 12 --out runs/resume                  # the other seven

The folder holds one file, ``checkpoint.pt``, with everything that the next step depends on: the network, the add-on,
optimizer, schedule, the state of the random numbers (there is dropout), and how many steps were made, from which the
position in the data follows.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from examples.backbones import UHeMISLike
from examples.training import criterion
from passion_plugin import PassionWrapper, get_passion_state_dict, set_passion_state_dict
from passion_plugin.data import IncompleteDataset, draw_presence
from passion_plugin.phantom import CLASSES, MODALITIES, PhantomDataset

__all__ = ["main"]

RATES = {"flair": 0.2, "t1ce": 0.4, "t1": 0.6, "t2": 0.8}
PATIENTS, SIZE, BATCH = 6, 16, 2
STEPS_PER_EPOCH = PATIENTS // BATCH


class Training:
    """All that changes from step to step."""

    def __init__(self, steps: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        phantom = PhantomDataset(PATIENTS, (SIZE,) * 3)
        presence = draw_presence(phantom.ids, RATES, seed=seed)
        self.data = IncompleteDataset(phantom, presence)
        backbone = UHeMISLike(MODALITIES, len(CLASSES))
        backbone.decoder = nn.Sequential(backbone.decoder, nn.Dropout(0.2))
        self.model = PassionWrapper(backbone, MODALITIES, presence=presence)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.schedule = torch.optim.lr_scheduler.PolynomialLR(self.optimizer, total_iters=steps, power=0.9)
        self.step = 0

    def run(self, until: int) -> None:
        """Train up to step ``until``."""
        self.model.train()
        while self.step < until:
            for batch in self.rest_of_epoch():
                prediction = self.model(batch["image"], batch["mask"])
                loss = criterion(prediction, batch["label"], batch["mask"])
                loss = loss + self.model.passion_loss(batch["label"])
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.schedule.step()
                self.step += 1
                if self.step % STEPS_PER_EPOCH == 0:
                    self.model.end_epoch()
                print(f"step {self.step}: loss {loss.item():.6f}")
                if self.step == until:
                    break

    def rest_of_epoch(self) -> DataLoader[Any]:
        """The batches of the running epoch that were not seen yet; the order depends on the epoch alone."""
        epoch, done = divmod(self.step, STEPS_PER_EPOCH)
        generator = torch.Generator().manual_seed(epoch)
        order = torch.randperm(PATIENTS, generator=generator).split(BATCH)
        # A loader draws a seed for its workers whenever it is started. Drawn from the global generator, as it would be
        # without `generator`, a second start within the epoch would change the dropout that follows.
        return DataLoader(self.data, batch_sampler=[rows.tolist() for rows in order[done:]], generator=generator)

    def save(self, path: Path) -> None:
        """Write the checkpoint whole or not at all: whoever is stopped here keeps the one before."""
        state = {
            "step": self.step,
            "backbone": self.model.backbone.state_dict(),
            "passion": get_passion_state_dict(self.model),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        torch.save(state, temporary)
        temporary.replace(path)

    def load(self, path: Path) -> None:
        """Restore what :meth:`save` wrote; the random numbers last, since everything else may draw some."""
        state = torch.load(path, weights_only=True)
        set_passion_state_dict(self.model, state["passion"])  # First: it refuses what belongs to another training.
        self.model.backbone.load_state_dict(state["backbone"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step = state["step"]
        torch.set_rng_state(state["random"]["cpu"])
        torch.cuda.set_rng_state_all(state["random"]["cuda"])


def main(arguments: Sequence[str] | None = None) -> Training:
    """Train, from the checkpoint in the folder if there is one; returns the training as it was saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="length of the whole training")
    parser.add_argument("--stop-after", type=int, help="at most so many steps in this call")
    parser.add_argument("--out", type=Path, default=Path("runs/resume"), help="folder of the checkpoint")
    options = parser.parse_args(arguments)
    training, path = Training(options.steps), options.out / "checkpoint.pt"
    if path.is_file():
        training.load(path)
        print(f"going on after step {training.step}")
    most = options.steps if options.stop_after is None else training.step + options.stop_after
    training.run(min(most, options.steps))
    training.save(path)
    return training


if __name__ == "__main__":
    main()
