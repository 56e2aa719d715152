"""MONAI networks in an unmodified `SupervisedTrainer`, and sliding windows over whole volumes afterwards.

python -m examples.monai_trainer
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange, reduce
from monai.engines import SupervisedTrainer
from monai.engines.utils import PrepareBatchExtraInput
from monai.losses import DiceCELoss
from monai.networks.blocks import Convolution, UpSample
from monai.networks.nets import UNet
from torch import Tensor, nn

from examples.incomplete_phantom import incomplete_phantom
from passion_plugin.evaluation import BRATS_REGIONS, SubsetResults, evaluate_subsets, sliding_window_predict
from passion_plugin.integrations.loss import PassionLoss
from passion_plugin.integrations.monai import PassionHandler
from passion_plugin.phantom import PhantomDataset
from passion_plugin.wrapper import PassionWrapper

__all__ = ["EncoderPerModality", "main"]


class EncoderPerModality(nn.Module):
    """MONAI blocks put together: two levels per modality, the mean over what is present, one decoder."""

    def __init__(self, modalities: Sequence[str], num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.fine = nn.ModuleDict({name: Convolution(3, 1, width) for name in modalities})
        self.coarse = nn.ModuleDict({name: Convolution(3, width, 2 * width, strides=2) for name in modalities})
        self.up = UpSample(3, 2 * width, width, scale_factor=2)
        self.decoder = Convolution(3, 2 * width, width)
        self.classifier = nn.Conv3d(width, num_classes, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        fine = [encoder(x[:, k : k + 1]) for k, encoder in enumerate(self.fine.values())]
        coarse = [encoder(features) for encoder, features in zip(self.coarse.values(), fine, strict=True)]
        fine, coarse = mean_of_present(fine, mask), mean_of_present(coarse, mask)
        return self.classifier(self.decoder(torch.cat([fine, self.up(coarse)], dim=1)))


def mean_of_present(features: list[Tensor], mask: Tensor) -> Tensor:
    weight = rearrange(mask / mask.sum(1, keepdim=True), "b m -> b m 1 1 1 1")
    return reduce(torch.stack(features, dim=1) * weight, "b m ... -> b ...", "sum")


def main(network: str = "encoders", epochs: int = 3, patients: int = 8, size: int = 24) -> SubsetResults:
    """Train for a moment, then score every subset of modalities.

    Args:
        network: ``"encoders"``, one encoder per modality, which takes a mask; or ``"unet"``, MONAI's UNet as it is.
            That has one encoder for all channels: its students run it again on an image that is blank but for one.
        epochs: of training.
        patients: in training; two more are for the test.
        size: voxels per axis.
    """
    torch.manual_seed(0)
    loader, presence = incomplete_phantom(patients, size)
    names = presence.modalities
    if network == "encoders":
        backbone: nn.Module = EncoderPerModality(names, num_classes=4)
        extra: list[str] | dict[str, str] = ["mask"]  # network(image, mask)
    else:
        backbone = UNet(3, len(names), 4, channels=(8, 16), strides=(2,))
        extra = {"passion_presence": "mask"}  # network(image); which channels are present is for the wrapper only
    model = PassionWrapper(backbone, names, presence=presence)  # 1: wrap

    task = DiceCELoss(softmax=True, to_onehot_y=True)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=loader,
        network=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=3e-3),
        loss_function=PassionLoss(lambda prediction, label: task(prediction, label[:, None]), model),  # 2: distil
        prepare_batch=PrepareBatchExtraInput(extra),
        train_handlers=[PassionHandler(model)],  # 3: update the preference
    )
    trainer.run()
    print({name: round(value, 3) for name, value in trainer.state.metrics.items() if "beta" in name})

    network_alone = model.unwrap()
    windows = sliding_window_predict(
        size * 2 // 3,
        predict=lambda net, x, mask: net(x, mask) if network == "encoders" else net(x),
    )
    test = torch.utils.data.DataLoader(PhantomDataset(2, (size,) * 3, seed=1), batch_size=2)
    results = evaluate_subsets(network_alone, test, modalities=names, regions=BRATS_REGIONS, predict=windows)
    print(results.to_markdown(by="size", sd=False))
    return results


if __name__ == "__main__":
    main()
