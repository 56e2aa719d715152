"""Presets: recognised by the names of modules, never mistaken, and right about columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import batch
from passion_plugin import attach
from passion_plugin.backbone import BackboneSpec
from passion_plugin.backbone._adapter import BackboneAdapter
from passion_plugin.backbone._presets import PRESETS, Preset, find_preset, preset
from passion_plugin.config import PassionConfig
from passion_plugin.errors import ConfigError
from passion_plugin.testing import references
from passion_plugin.wrapper import PassionWrapper

BRATS = ("flair", "t1ce", "t1", "t2")
USER = ("a", "b", "c", "d")


def hollow(names: Iterable[str]) -> nn.Module:
    """A module in which every dotted name exists and does nothing."""
    net = nn.Module()
    for name in names:
        owner = net
        for part in name.split("."):
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
    vars(net)["is_training"] = True
    return net


def names_of(entry: Preset) -> list[str]:
    """Every module that a backbone of the family has as far as the preset knows."""
    encoders = [
        name.format(m=column, k=number) for number, column in enumerate(entry.columns) for name in entry.encoders
    ]
    return [*entry.fingerprint, *encoders, entry.fields["classifier"], *entry.fields.get("deep_supervision", ())]


def modalities_of(entry: Preset) -> tuple[str, ...]:
    return USER if entry.columns[0] == "0" else entry.columns


each_preset = pytest.mark.parametrize("entry", PRESETS.values(), ids=lambda entry: entry.name)


def test_the_promised_families_are_there() -> None:
    assert {"rfnet", "mmformer", "m2ftrans", "u-hemis", "u-hved"} <= set(PRESETS)


@each_preset
def test_a_preset_is_chosen_by_structure_and_no_other_one_is(entry: Preset) -> None:
    net = hollow(names_of(entry))
    assert [other.name for other in PRESETS.values() if other.matches(net)] == [entry.name]
    names = modalities_of(entry)
    found = find_preset(net, names)
    assert found == preset(entry.name, net, names)
    assert isinstance(found, BackboneSpec)
    adapter = BackboneAdapter(net, found, names)
    for number, (name, column) in enumerate(zip(names, entry.columns, strict=True)):
        wanted = [net.get_submodule(part.format(m=column, k=number)) for part in entry.encoders]
        assert list(adapter.encoders[name]) == wanted
    assert adapter.classifier is net.get_submodule(entry.fields["classifier"])
    model = PassionWrapper(net, names, missing_rates=(0.1,) * len(names))
    assert model.passion._spec == found


@each_preset
def test_one_missing_name_is_enough_not_to_match(entry: Preset) -> None:
    for dropped in entry.fingerprint:
        net = hollow(name for name in names_of(entry) if not f"{name}.".startswith(f"{dropped}."))
        assert not entry.matches(net)
        with pytest.raises(ConfigError, match=f"is no {entry.name}: it has no module.*{dropped}"):
            preset(entry.name, net, modalities_of(entry))


@each_preset
def test_a_preset_is_found_inside_a_parallel_wrapper(entry: Preset) -> None:
    outer = nn.Module()
    outer.module = hollow(names_of(entry))
    assert entry.matches(outer)


@each_preset
def test_the_number_of_modalities_must_be_that_of_the_family(entry: Preset) -> None:
    net = hollow(names_of(entry))
    with pytest.raises(ConfigError, match=rf"{entry.name} has 4 modalities .* but 3 were named"):
        preset(entry.name, net, modalities_of(entry)[:3])


@pytest.mark.parametrize("name", ["rfnet", "mmformer", "m2ftrans", "u-hved"])
def test_known_names_in_another_order_than_the_columns_are_refused(name: str) -> None:
    entry = PRESETS[name]
    net = hollow(names_of(entry))
    with pytest.raises(ConfigError, match="Name them in column order"):
        preset(name, net, entry.columns[::-1])
    with pytest.raises(ConfigError, match="Name them in column order"):
        PassionWrapper(net, entry.columns[::-1], missing_rates=(0.1,) * 4)


def test_other_spellings_of_the_columns_are_understood() -> None:
    net = hollow(names_of(PRESETS["rfnet"]))
    spec = preset("rfnet", net, ("T2-FLAIR", "T1Gd", "T1", "T2w"))
    assert spec.encoders["T1Gd"] == ("t1ce_encoder",)
    with pytest.raises(ConfigError, match="Name them in column order"):
        preset("rfnet", net, ("T2w", "T1Gd", "T1n", "FLAIR"))


def test_names_that_say_nothing_are_taken_in_column_order() -> None:
    spec = preset("rfnet", hollow(names_of(PRESETS["rfnet"])), USER)
    assert [spec.encoders[name] for name in USER] == [(f"{column}_encoder",) for column in BRATS]


def test_an_unknown_preset_suggests_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown preset 'mmfomer'\. Did you mean 'mmformer'"):
        preset("mmfomer", nn.Module(), BRATS)


def test_a_model_without_such_names_has_no_preset() -> None:
    assert find_preset(nn.Conv2d(1, 1, 1), BRATS) is None


class Region(nn.Module):
    """Stands for one level of the fusion decoder."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.region_fusion = nn.Conv3d(width, width, 1)


class Coarse(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.prm_layer = nn.Sequential(nn.Conv3d(width, width, 1), nn.Conv3d(width, classes, 1))


class Decoder(nn.Module):
    def __init__(self, width: int, classes: int, fuse: bool) -> None:
        super().__init__()
        self.seg_layer = nn.Conv3d(width, classes, 1)
        if fuse:
            self.RFM4 = Region(width)
            for level in (1, 2, 3, 4):
                self.add_module(f"prm_generator{level}", Coarse(width, classes))


class SmallRFNet(nn.Module):
    """The names and the calling convention of RFNet on eight voxels a side."""

    def __init__(self, width: int = 4, classes: int = 4) -> None:
        super().__init__()
        for name in BRATS:
            self.add_module(f"{name}_encoder", nn.Sequential(nn.Conv3d(1, width, 3, padding=1), nn.LeakyReLU()))
        self.decoder_fuse = Decoder(width, classes, fuse=True)
        self.decoder_sep = Decoder(width, classes, fuse=False)
        self.is_training = True

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        encoded = [self.get_submodule(f"{name}_encoder")(x[:, m : m + 1]) for m, name in enumerate(BRATS)]
        stacked = torch.stack(encoded, 1) * mask[:, :, None, None, None, None]
        fused: Any = self.decoder_fuse.RFM4.region_fusion(stacked.mean(1))
        coarse = []
        for level in (1, 2, 3, 4):
            pooled = F.avg_pool3d(fused, 2 ** (level - 1))
            prm = self.decoder_fuse.get_submodule(f"prm_generator{level}.prm_layer")(pooled)
            coarse.append(prm.softmax(1))
        prediction = self.decoder_fuse.seg_layer(fused.tanh()).softmax(1)
        if not self.is_training:
            return prediction
        return prediction, tuple(self.decoder_sep.seg_layer(one).softmax(1) for one in encoded), tuple(coarse)


@pytest.mark.parametrize("mode", ["default", "official"])
def test_a_network_of_the_family_trains_through_its_preset(mode: Any) -> None:
    net = SmallRFNet()
    model = PassionWrapper(net, BRATS, missing_rates=(0.2, 0.4, 0.6, 0.8), config=PassionConfig(mode=mode))
    calls: list[bool] = []
    net.decoder_sep.seg_layer.register_forward_hook(lambda *_: calls.append(net.is_training))
    x, mask, y = batch([[1, 1, 0, 1], [1, 0, 0, 1]], classes=4, ndim=3, side=8)
    model(x, mask, passion_target=y)  # The first batch is also looked at from all sides.
    calls.clear()
    fused, separate, coarse = model(x, mask)
    loss = model.passion_loss(y)
    (F.nll_loss(fused.log(), y) + loss).backward()
    assert model.passion.adapter is not None
    assert model.passion.adapter.spec.classifier == "decoder_fuse.seg_layer"
    assert len(model.passion.adapter.deep_supervision) == len(coarse) == 4
    assert calls == [True] * 4, "students run without the separate decoder"
    terms = model.passion.loss_terms()
    assert torch.equal(terms.active, mask)
    assert (terms.pixel[mask].abs() > 1e-9).all()
    if mode == "official":
        logs = separate[3].detach().double().log()
        wanted = references.weighted_cross_entropy(logs, y, mode="official")
        wanted = wanted + references.dice_loss(logs, y, mode="official")
        assert terms.unimodal[:, 3].tolist() == pytest.approx(wanted.tolist(), rel=1e-5)
    assert any(p.grad is not None and p.grad.any() for p in net.get_submodule("t2_encoder").parameters())
    assert net.is_training is True


def test_a_preset_works_on_an_attached_backbone_and_by_name() -> None:
    net = SmallRFNet()
    passion = attach(net, modalities=BRATS, missing_rates=(0.2,) * 4, spec="rfnet")
    x, mask, y = batch([[1, 1, 0, 1]], classes=4, ndim=3, side=8)
    net(x, mask)
    assert passion.loss(y) > 0
    passion.detach()
    assert len(net(x, mask)) == 3
