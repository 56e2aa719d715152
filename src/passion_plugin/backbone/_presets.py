"""Specs of well-known public backbones, recognised by the names of their modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from passion_plugin.backbone._spec import BackboneSpec
from passion_plugin.errors import ConfigError, suggest

_BRATS = ("flair", "t1ce", "t1", "t2")

_ALIASES = {
    "t1c": "t1ce",
    "t1gd": "t1ce",
    "t1post": "t1ce",
    "t2flair": "flair",
    "t2f": "flair",
    "t1n": "t1",
    "t2w": "t2",
}


@dataclass(frozen=True)
class Preset:
    """A family of backbones that share module names and calling convention.

    Attributes:
        name: what to pass as ``spec=``.
        source: paper and public repository.
        fingerprint: module names that together identify the family.
        encoders: names of the encoder modules of one modality; ``{m}`` stands for the modality of the mask
            column, ``{k}`` for its number.
        columns: modality of each mask column; numbers when the code attaches no names to them.
        fields: the other fields of the spec.
    """

    name: str
    source: str
    fingerprint: tuple[str, ...]
    encoders: tuple[str, ...]
    columns: tuple[str, ...]
    fields: Mapping[str, Any]

    def matches(self, backbone: nn.Module) -> bool:
        """Whether ``backbone``, or what is inside a compiled or parallel wrapper, has all the names."""
        names = [name for name, _ in backbone.named_modules()]
        inside = {name.removeprefix("_orig_mod.").removeprefix("module.") for name in names}
        return all(name in inside for name in self.fingerprint)

    def spec(self, modalities: Sequence[str]) -> BackboneSpec:
        """Return the spec for modalities in mask-column order; raise ConfigError if they are not the columns."""
        columns = self.columns
        if len(modalities) != len(columns):
            raise ConfigError(
                f"{self.name} has {len(columns)} modalities ({', '.join(columns)}), but {len(modalities)} were named: "
                f"{tuple(modalities)}"
            )
        given, wanted = ([_canonical(name) for name in names] for names in (modalities, columns))
        if given != wanted and set(given) == set(wanted):
            raise ConfigError(
                f"the mask columns of {self.name} are {columns}, but modalities={tuple(modalities)}: with this order "
                f"every name would stand for another modality. Name them in column order"
            )
        encoders = {
            modality: tuple(name.format(m=column, k=number) for name in self.encoders)
            for number, (modality, column) in enumerate(zip(modalities, columns, strict=True))
        }
        return BackboneSpec(encoders=encoders, **self.fields)


def preset(name: str, backbone: nn.Module, modalities: Sequence[str]) -> BackboneSpec:
    """Return the spec of the preset called ``name``.

    Args:
        name: key of :data:`PRESETS`.
        backbone: the module it is meant for.
        modalities: names given by the user, in mask-column order.

    Raises:
        ConfigError: unknown name, or the backbone lacks modules of that family.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}.{suggest(name, PRESETS)}")
    chosen = PRESETS[name]
    if not chosen.matches(backbone):
        known = {path for path, _ in backbone.named_modules()}
        missing = [path for path in chosen.fingerprint if path not in known]
        raise ConfigError(f"{type(backbone).__name__} is no {name}: it has no module {missing}")
    return chosen.spec(modalities)


def find_preset(backbone: nn.Module, modalities: Sequence[str]) -> BackboneSpec | None:
    """Return the spec of the preset whose module names ``backbone`` has, or None."""
    return next((entry.spec(modalities) for entry in PRESETS.values() if entry.matches(backbone)), None)


def separate_predictions(raw: Any) -> Sequence[Tensor] | None:
    """Pick the predictions of the separate uni-modal decoder out of ``(fused, separate, coarse)``."""
    if isinstance(raw, (tuple, list)) and len(raw) >= 2 and isinstance(raw[1], (tuple, list)):
        return raw[1]
    return None


def _canonical(name: str) -> str:
    plain = name.lower().replace("-", "").replace("_", "")
    return _ALIASES.get(plain, plain)


_BRATS_ENCODERS = tuple(f"{name}_encoder" for name in _BRATS)
# Fields of the backbones that return (fused, separate, coarse) in training.
_SEPARATE = {"student_mode": {"is_training": False}, "unimodal_outputs": separate_predictions}
_DROP = {"mask_argument": "drop", "mask_meaning": "missing"}

PRESETS: dict[str, Preset] = {
    entry.name: entry
    for entry in (
        Preset(
            name="rfnet",
            source="Ding et al., ICCV 2021; dyh127/RFNet, qysgithubopen/GSS and the RFNet of Jun-Jie-Shi/PASSION",
            fingerprint=(
                *_BRATS_ENCODERS,
                "decoder_fuse.seg_layer",
                "decoder_fuse.RFM4.region_fusion",
                "decoder_fuse.prm_generator1.prm_layer.1",
                "decoder_fuse.prm_generator4.prm_layer.1",
                "decoder_sep.seg_layer",
            ),
            encoders=("{m}_encoder",),
            columns=_BRATS,
            fields={
                **_SEPARATE,
                "classifier": "decoder_fuse.seg_layer",
                "deep_supervision": tuple(f"decoder_fuse.prm_generator{level}.prm_layer.1" for level in (1, 2, 3, 4)),
            },
        ),
        Preset(
            name="mmformer",
            source="Zhang et al., MICCAI 2022; YaoZhang93/mmFormer and the mmFormer of Jun-Jie-Shi/PASSION",
            fingerprint=(
                *(f"{name}_{part}" for name in _BRATS for part in ("encoder", "encode_conv", "transformer")),
                "multimodal_transformer",
                "multimodal_decode_conv",
                "decoder_fuse.seg_layer",
                "decoder_fuse.seg_d1",
                "decoder_fuse.seg_d4",
                "decoder_sep.seg_layer",
            ),
            encoders=("{m}_encoder", "{m}_encode_conv", "{m}_transformer"),
            columns=_BRATS,
            fields={
                **_SEPARATE,
                "classifier": "decoder_fuse.seg_layer",
                "deep_supervision": tuple(f"decoder_fuse.seg_d{level}" for level in (1, 2, 3, 4)),
            },
        ),
        Preset(
            name="m2ftrans",
            source="Shi et al., IEEE JBHI 2024; Jun-Jie-Shi/M2FTrans, both versions, and that of Jun-Jie-Shi/PASSION",
            fingerprint=(
                *_BRATS_ENCODERS,
                "Bottleneck.trans_bottle",
                "weight_attention",
                "decoder_fusion.seg_layer",
                "decoder_fusion.prm_fusion1.prm_layer.1",
                "decoder_fusion.prm_fusion5.prm_layer.1",
                "decoder_sep.seg_layer",
            ),
            encoders=("{m}_encoder",),
            columns=_BRATS,
            fields={
                **_SEPARATE,
                "classifier": "decoder_fusion.seg_layer",
                "deep_supervision": tuple(f"decoder_fusion.prm_fusion{level}.prm_layer.1" for level in (1, 2, 3, 4, 5)),
            },
        ),
        Preset(
            name="u-hved",
            source="Dorent et al., MICCAI 2019; the port in AImageLab-zip/IM-Fuse",
            fingerprint=(*_BRATS_ENCODERS, "approximate_sampler", "t1c_decoder", "seg_decoder.conv_out"),
            encoders=("{m}_encoder",),
            columns=("t1", "t1ce", "t2", "flair"),
            fields={"classifier": "seg_decoder.conv_out", "student_kwargs": {"is_inference": True}},
        ),
        Preset(
            name="ra-hved",
            source="Jeong et al., WACV 2022; U_HVEDConvNet3D of ssjx10/RA-HVED",
            fingerprint=(
                *(f"{part}.{number}" for part in ("init_blocks", "encoders.0", "DRBs.0") for number in (0, 3)),
                "VU_blocks",
                "experts_drop",
                "rdecoder",
                "final_conv",
            ),
            encoders=(
                "init_blocks.{k}",
                *(f"{part}.{level}.{{k}}" for level in range(4) for part in ("encoders", "DRBs")),
            ),
            columns=("0", "1", "2", "3"),
            fields={**_DROP, "classifier": "final_conv", "outputs": "sigmoid", "student_kwargs": {"valid": True}},
        ),
        Preset(
            name="u-hemis",
            source="Havaei et al., MICCAI 2016, U-Net variant; U_HeMIS of ssjx10/RA-HVED",
            fingerprint=(
                "enc_list.0.encoder",
                "enc_list.3.encoder",
                "abstraction_op",
                "recon_decoder_list",
                "seg_decoder.final_conv.conv",
            ),
            encoders=("enc_list.{k}",),
            columns=("0", "1", "2", "3"),
            fields={**_DROP, "classifier": "seg_decoder.final_conv.conv"},
        ),
    )
}
