"""Training with DistributedDataParallel: the three lines, and what belongs to several processes.

torchrun --nproc-per-node 2 -m examples.train_ddp

Each process takes its share of the phantom patients. On a machine with GPUs every process uses one of its own.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import distributed
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from examples.backbones import UHeMISLike
from passion_plugin import IncompleteDataset, PassionWrapper, draw_presence, get_passion_state_dict
from passion_plugin.phantom import PhantomDataset

__all__ = ["main"]

RATES = {"flair": 0.2, "t1ce": 0.4, "t1": 0.6, "t2": 0.8}


def main(epochs: int, patients: int, size: int, out: Path) -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if cuda else "gloo")
    # In a function of its own, so that the network is freed before the group: a network that is freed later, while
    # gloo finishes its last sum, may hang.
    train(device, epochs, patients, size, out)
    # Nobody leaves while rank 0 still writes.
    distributed.barrier()
    distributed.destroy_process_group()


def train(device: torch.device, epochs: int, patients: int, size: int, out: Path) -> None:
    rank = distributed.get_rank()
    torch.manual_seed(0)
    phantom = PhantomDataset(patients, (size,) * 3)
    # The table of the whole training set, the same in every process.
    presence = draw_presence(phantom.ids, RATES, seed=0)
    data = IncompleteDataset(phantom, presence)
    sampler = DistributedSampler(data)
    loader = DataLoader(data, batch_size=2, sampler=sampler)

    backbone = UHeMISLike(phantom.modalities, num_classes=4).to(device)
    # Examined now and on the same images everywhere: a first batch would be another one in every process.
    shape = (2, len(phantom.modalities))
    example = torch.randn(*shape, *(size,) * 3, generator=torch.Generator().manual_seed(0)).to(device)
    everything = torch.ones(shape, dtype=torch.bool, device=device)
    model = PassionWrapper(  # 1: wrap, then distribute
        backbone, phantom.modalities, presence=presence, example_input=example, example_mask=everything
    )
    network = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)

    for epoch in range(1, epochs + 1):
        sampler.set_epoch(epoch)
        for batch in loader:
            image, mask, label = (batch[key].to(device) for key in ("image", "mask", "label"))
            prediction, distillation = network(image, mask, passion_target=label)  # 2: distil
            loss = F.cross_entropy(prediction, label) + distillation
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        beta = model.end_epoch().beta  # 3: update the preference, in every process
        print(f"epoch {epoch}: rank {rank}, beta {' '.join(f'{value:.4f}' for value in beta.tolist())}", flush=True)

    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        state = {"backbone": backbone.state_dict(), "passion": get_passion_state_dict(model)}
        torch.save(state, out / "checkpoint.pt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--patients", type=int, default=8)
    parser.add_argument("--size", type=int, default=16, help="voxels per axis")
    parser.add_argument("--out", type=Path, default=Path("runs/ddp"), help="folder of checkpoint.pt")
    main(**vars(parser.parse_args()))
