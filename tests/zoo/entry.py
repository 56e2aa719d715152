"""What one zoo entry says about its backbone, and the register of all of them.

An entry is the ground truth: which modules belong to which modality, where the classifier is, how images
and presence become call arguments. The tests hand over only what a user would (`spec`), and compare what
the library does with what this truth says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from passion_plugin.backbone import BackboneSpec

__all__ = ["THREE", "ZOO", "Arguments", "ZooEntry", "one_subset", "tensor_and_mask", "zoo"]

THREE = ("flair", "t1ce", "t1")
"""Default modalities; two of the names share a prefix on purpose."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
ModuleClass = TypeVar("ModuleClass", bound=type[nn.Module])


def tensor_and_mask(images: list[Tensor], presence: Tensor) -> Arguments:
    """Pack as ``model(x, mask)``: modalities stacked along channels, mask bool (B, M)."""
    return (torch.cat(images, dim=1), presence), {}


def mixed_subsets(num_modalities: int) -> Tensor:
    """Presence (4, M): everything, all but the second, all but the first, only the last."""
    presence = torch.ones(4, num_modalities, dtype=torch.bool)
    presence[1, 1] = False
    presence[2, 0] = False
    presence[3, :-1] = False
    return presence


def one_subset(num_modalities: int) -> Tensor:
    """Presence (4, M) with the same subset in every row, for backbones that take one subset per batch."""
    presence = torch.ones(4, num_modalities, dtype=torch.bool)
    presence[:, 1] = False
    return presence


@dataclass(frozen=True)
class ZooEntry:
    """One awkward backbone.

    Attributes:
        name: test id.
        backbone_class: module class, built as ``backbone_class(modalities, num_classes, **options)``.
        notes: what is awkward about it (the docstring of the class).
        modalities: names in mask-column order.
        num_classes: number of classes K (regions when ``outputs`` is "sigmoid").
        options: further constructor arguments.
        channels: channels per modality; one each by default.
        spatial: size of the images.
        dtype: of images and weights.
        finish: last step of the construction, such as a cast or ``torch.compile``.
        pack: images and presence to call arguments.
        example: call arguments to what detection is shown, ``(input, mask)``.
        presence: M to presence table (B, M) of the example batch.
        encoders: true private modules of a modality, templates with ``{name}`` and ``{i}``; empty: none.
        classifier: true path of the last layer; empty where none is a module.
        outputs: "softmax" or "sigmoid".
        spec: fields of ``BackboneSpec`` that nobody can detect and that the user states.
        by_hand: further fields that detection has to find, for a user who writes the whole spec.
        expected: "works" or "refused".
        reason: regular expression of the refusal.
        rung: rung of the replay ladder that detection should choose; empty where any right one will do.
        reference: "single" recomputes students row by row, "rows" on the rows of a student together,
            "batch" on the whole batch (normalisation over the batch makes these differ).
        nan_safe: the bare backbone ignores NaN in what is absent.
        private: no parameter of an encoder is used by another modality.
        private_modules: no encoder module is used by another modality.
        frozen: modalities (numbers) whose encoder does not learn.
        copies: the bare backbone survives deepcopy and pickle after a step.
    """

    name: str
    backbone_class: type[nn.Module]
    notes: str
    modalities: tuple[str, ...] = THREE
    num_classes: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    channels: tuple[int, ...] | None = None
    spatial: tuple[int, ...] = (8, 8)
    dtype: torch.dtype = torch.float32
    finish: Callable[[nn.Module], nn.Module] | None = None
    pack: Callable[[list[Tensor], Tensor], Arguments] = tensor_and_mask
    example: Callable[..., tuple[Any, Any]] = lambda x, mask=None: (x, mask)
    presence: Callable[[int], Tensor] = mixed_subsets
    encoders: tuple[str, ...] = ("{name}_encoder",)
    classifier: str = "classifier"
    outputs: str = "softmax"
    spec: Mapping[str, Any] = field(default_factory=dict)
    by_hand: Mapping[str, Any] = field(default_factory=dict)
    expected: str = "works"
    reason: str = ""
    rung: str = ""
    reference: str = "single"
    nan_safe: bool = True
    private: bool = True
    private_modules: bool = True
    frozen: tuple[int, ...] = ()
    copies: bool = True

    def backbone(self) -> nn.Module:
        """Build the backbone with reproducible weights, in train mode."""
        torch.default_generator.manual_seed(0)
        backbone = self.backbone_class(self.modalities, self.num_classes, **self.options).to(self.dtype)
        return (self.finish(backbone) if self.finish else backbone).train()

    def images(self) -> list[Tensor]:
        """One image (B, C_m, *spatial) per modality, absent ones zero."""
        presence = self.table()
        images = self.full_images(len(presence))
        return [blank(image, presence[:, index]) for index, image in enumerate(images)]

    def table(self) -> Tensor:
        """Presence (B, M) of the example batch."""
        return self.presence(len(self.modalities))

    def training_table(self) -> Tensor:
        """Presence (N, M) of the training set: the example batch and two complete samples."""
        return torch.cat([self.table(), torch.ones(2, len(self.modalities), dtype=torch.bool)])

    def labels(self) -> Tensor:
        """Labels (B, *spatial) with every class in every sample; region masks (B, K, *spatial) if sigmoid."""
        generator = torch.Generator().manual_seed(2)
        shape = (len(self.table()), *self.spatial)
        if self.outputs == "sigmoid":
            return torch.rand((shape[0], self.num_classes, *self.spatial), generator=generator) > 0.5
        labels = torch.randint(self.num_classes, shape, generator=generator)
        labels.flatten(1)[:, : self.num_classes] = torch.arange(self.num_classes)
        return labels

    def arguments(self) -> Arguments:
        """Call arguments of the example batch."""
        return self.pack(self.images(), self.table())

    def full_images(self, batch: int) -> list[Tensor]:
        """One image (B, C_m, *spatial) per modality, all with content."""
        generator = torch.Generator().manual_seed(3)
        channels = self.channels or (1,) * len(self.modalities)
        return [torch.randn((batch, count, *self.spatial), generator=generator).to(self.dtype) for count in channels]

    def full_example(self) -> tuple[Any, Any]:
        """What detection is shown: two samples with all modalities."""
        args, kwargs = self.pack(self.full_images(2), torch.ones(2, len(self.modalities), dtype=torch.bool))
        return self.example(*args, **kwargs)

    def extra(self, presence: Tensor | None = None) -> dict[str, Any]:
        """Keywords of the wrapper besides the backbone's own: presence, where no mask says it."""
        if self.spec.get("mask_argument", 1) is not None:
            return {}
        return {"passion_presence": self.table() if presence is None else presence}

    def full_spec(self) -> BackboneSpec:
        """The spec as somebody would write it who knows everything."""
        encoders = {name: self.encoder_paths(index) for index, name in enumerate(self.modalities)}
        return BackboneSpec(
            **{
                "classifier": self.classifier,
                "encoders": encoders if self.encoders and self.private_modules else {},
                "outputs": self.outputs,
                "students": self.rung or ("replay" if self.encoders and self.private_modules else "rerun"),
                **self.by_hand,
                **self.spec,
            }
        )

    def only(self, modality: int, rows: Tensor) -> Arguments:
        """Call arguments for ``rows`` with one modality left: all others blank, mask one-hot."""
        keep = torch.zeros(len(rows), len(self.modalities), dtype=torch.bool)
        keep[:, modality] = True
        images = [blank(image[rows], keep[:, index]) for index, image in enumerate(self.images())]
        return self.pack(images, keep)

    def encoder_paths(self, modality: int) -> tuple[str, ...]:
        """True module paths that belong to one modality only."""
        return tuple(path.format(name=self.modalities[modality], i=modality) for path in self.encoders)


ZOO: dict[str, ZooEntry] = {}


def zoo(name: str = "", **fields: Any) -> Callable[[ModuleClass], ModuleClass]:
    """Register the decorated class as an entry; stack the decorator for variants."""

    def register(cls: ModuleClass) -> ModuleClass:
        key = name or re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
        if key in ZOO:
            raise ValueError(f"two zoo entries are called {key!r}")
        ZOO[key] = ZooEntry(name=key, backbone_class=cls, notes=(cls.__doc__ or "").strip(), **fields)
        return cls

    return register


def blank(image: Tensor, keep: Tensor, fill: float = 0.0) -> Tensor:
    """Copy of ``image`` (B, ...) with the rows outside ``keep`` (B,) set to ``fill``."""
    image = image.clone()
    image[~keep] = fill
    return image
