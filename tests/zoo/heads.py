"""What comes out: containers, activations, classifiers, resolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Net, block, conv
from .entry import zoo


@zoo()
class DictOutput(Net):
    """Returns a dict with the logits, the features and a number."""

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Any]:
        logits = super().forward(x, mask)
        return {"features": logits.flatten(1), "logits": logits, "scale": 1.0}


@zoo()
class ReconstructionsFirst(Net):
    """Returns ``({"t1": reconstruction, ..., "seg": probabilities}, side products)``, the prediction last."""

    def add_head(self, num_classes: int) -> None:
        super().add_head(num_classes)
        self.reconstruction = conv(num_classes, num_classes)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        logits = super().forward(x, mask)
        image = self.reconstruction(logits)
        return {"t1": image, "t2": -image, "seg": logits.softmax(dim=1)}, [logits.mean()]


@zoo(expected="refused", reason=r"'first', 'second' may each be the prediction .* as classifier=")
class NamelessDict(Net):
    """Returns a dict of two maps, and no name says which one is the prediction."""

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        logits = super().forward(x, mask)
        return {"first": logits.square(), "second": logits}


class Prediction(NamedTuple):
    """Logits and a side product."""

    logits: Tensor
    energy: Tensor


@zoo()
class NamedTupleOutput(Net):
    """Returns a named tuple, prediction first."""

    def forward(self, x: Tensor, mask: Tensor) -> Prediction:
        logits = super().forward(x, mask)
        return Prediction(logits, logits.square().mean())


@zoo()
class SoftmaxInside(Net):
    """Returns probabilities: distilling what is returned would soften twice."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x, mask).softmax(dim=1)


@zoo()
class SoftmaxModule(Net):
    """The softmax is the last registered module."""

    def add_head(self, num_classes: int) -> None:
        super().add_head(num_classes)
        self.softmax = nn.Softmax(dim=1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.softmax(super().forward(x, mask))


@zoo()
class LogSoftmaxInside(Net):
    """Returns log-probabilities."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x, mask).log_softmax(dim=1)


@zoo(outputs="sigmoid", spec={"outputs": "sigmoid"})
class SigmoidRegions(Net):
    """Overlapping regions, sigmoid inside."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x, mask).sigmoid()


@zoo(outputs="sigmoid", num_classes=1, spec={"outputs": "sigmoid"})
class OneRegion(SigmoidRegions):
    """One region only, as in binary segmentation with a sigmoid."""


@zoo(outputs="softmax", spec={"classifier": "classifier"})
class BackgroundRemoved(Net):
    """Softmax, then the background channel is dropped, as in ivadomed: K logits, K - 1 returned."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x, mask).softmax(dim=1)[:, 1:]


@zoo()
class HalfResolution(Net):
    """Features and logits at half resolution, logits up-sampled bilinearly afterwards."""

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        fused = F.avg_pool2d(self.fusion(torch.cat(list(features), dim=1)), 2)
        return F.interpolate(self.classifier(fused), scale_factor=2, mode="bilinear", align_corners=False)


@zoo()
class HalfResolutionSoftmax(HalfResolution):
    """Half resolution, softmax, then nearest up-sampling."""

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        fused = F.avg_pool2d(self.fusion(torch.cat(list(features), dim=1)), 2)
        return F.interpolate(self.classifier(fused).softmax(1), scale_factor=2)


@zoo()
class WideClassifier(Net):
    """The classifier is a 3x3 convolution."""

    def add_head(self, num_classes: int) -> None:
        self.classifier = conv(self.width, num_classes, 3)


@zoo(classifier="classifier.1.0")
class NestedClassifier(Net):
    """The classifier sits inside a Sequential behind a dropout of zero."""

    def add_head(self, num_classes: int) -> None:
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Sequential(conv(self.width, num_classes, 1), nn.Identity()))


@zoo()
class TransposedClassifier(Net):
    """The last layer is a transposed convolution that doubles the resolution."""

    def add_head(self, num_classes: int) -> None:
        self.classifier = nn.ConvTranspose2d(self.width, num_classes, 2, stride=2)

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        return self.classifier(F.avg_pool2d(self.fusion(torch.cat(list(features), dim=1)), 2))


@zoo(expected="refused", reason=r"last dimension")
class LinearClassifier(Net):
    """The classifier is a Linear on channels-last features, permuted back afterwards."""

    def add_head(self, num_classes: int) -> None:
        self.classifier = nn.Linear(self.width, num_classes)

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        fused = self.fusion(torch.cat(list(features), dim=1))
        return self.classifier(fused.movedim(1, -1)).movedim(-1, 1)


@zoo()
class DecoyHead(Net):
    """A 1x1 convolution with as many outputs is registered last and even runs, but is not the classifier."""

    def add_head(self, num_classes: int) -> None:
        super().add_head(num_classes)
        self.decoy = conv(self.width, num_classes, 1)
        self.never_used = conv(self.width, num_classes, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        features = torch.cat(self.encode(x.split(self.channels, dim=1), mask), dim=1)
        fused = self.fusion(features)
        logits = self.classifier(fused)
        self.decoy(fused)
        return logits


@zoo()
class DeepSupervision(Net):
    """Returns a list, full resolution first, coarse logits behind it."""

    def add_head(self, num_classes: int) -> None:
        super().add_head(num_classes)
        self.coarse = conv(self.width, num_classes, 1)

    def forward(self, x: Tensor, mask: Tensor) -> list[Tensor]:
        fused = self.fusion(torch.cat(self.encode(x.split(self.channels, dim=1), mask), dim=1))
        return [self.classifier(fused), self.coarse(F.avg_pool2d(fused, 2))]


@zoo(classifier="decoder_fuse.seg_layer")
class AuxiliaryHeads(Net):
    """``is_training``: fused, separate and coarse probabilities; fused alone when it is off."""

    class Decoder(nn.Module):
        """Fusion block and classifier."""

        def __init__(self, inputs: int, width: int, num_classes: int) -> None:
            super().__init__()
            self.block = block(inputs, width)
            self.seg_layer = conv(width, num_classes, 1)

        def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
            fused = self.block(features)
            return self.seg_layer(fused), fused

    def add_head(self, num_classes: int) -> None:
        self.is_training = True
        self.decoder_fuse = self.Decoder(self.width * len(self.names), self.width, num_classes)
        self.prm_layer = conv(self.width, num_classes, 1)
        self.decoder_sep = self.Decoder(self.width, self.width, num_classes)
        del self.fusion

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        raw = [self.encoder(index)(image) for index, image in enumerate(x.split(self.channels, dim=1))]
        shown = [torch.where(mask[:, i, None, None, None], f, torch.zeros(())) for i, f in enumerate(raw)]
        logits, fused = self.decoder_fuse(torch.cat(shown, dim=1))
        prediction = logits.softmax(dim=1)
        if not self.is_training:
            return prediction
        separate = tuple(self.decoder_sep(feature)[0].softmax(dim=1) for feature in raw)
        coarse = F.interpolate(self.prm_layer(F.avg_pool2d(fused, 2)).softmax(dim=1), scale_factor=2)
        return prediction, separate, (coarse,)


@zoo(classifier="head")
class TrainingChangesStructure(Net):
    """``self.training`` decides: tuple of logits and auxiliary logits in train, probabilities in eval."""

    def add_head(self, num_classes: int) -> None:
        self.auxiliary = conv(self.width, num_classes, 1)
        self.head = conv(self.width, num_classes, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        fused = self.fusion(torch.cat(self.encode(x.split(self.channels, dim=1), mask), dim=1))
        if self.training:
            return self.auxiliary(fused), self.head(fused)
        return self.head(fused).softmax(dim=1)


@zoo(classifier="", expected="refused", reason=r"no layer's output is the prediction")
class FunctionalClassifier(Net):
    """The classifier is an einsum with a bare parameter: there is no module to tap."""

    def add_head(self, num_classes: int) -> None:
        self.weight = nn.Parameter(torch.randn(num_classes, self.width))

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        return torch.einsum("kc,bchw->bkhw", self.weight, self.fusion(torch.cat(list(features), dim=1)))


@zoo(classifier="", expected="refused", reason=r"no layer's output is the prediction")
class SumOfTwoClassifiers(Net):
    """The prediction is the sum of two convolutions' outputs: no single layer's output equals it."""

    def add_head(self, num_classes: int) -> None:
        super().add_head(num_classes)
        self.second = conv(self.width, num_classes, 1)

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        fused = self.fusion(torch.cat(list(features), dim=1))
        return self.classifier(fused) + self.second(fused.tanh())
