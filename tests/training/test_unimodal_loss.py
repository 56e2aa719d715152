"""Students that are trained with the user's own loss: what it is given, what it weighs, and what is refused."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models import NAMES, MeanNet, batch, spec_of
from passion_plugin import get_passion_state_dict, set_passion_state_dict
from passion_plugin.config import PassionConfig
from passion_plugin.errors import ConfigError, PassionWarning, UsageError
from passion_plugin.losses import segmentation_loss
from passion_plugin.training import PassionRule
from passion_plugin.wrapper import PassionWrapper

M = NAMES[:3]
RATES = (0.2, 0.5, 0.75)
PRESENCE = [[1, 1, 0], [1, 1, 1], [0, 0, 1]]
ONLY_STUDENTS = PassionConfig(pixel_weight=0.0, prototype_weight=0.0)


def wrap(net: MeanNet, loss: Any, config: PassionConfig | None = None) -> PassionWrapper:
    rule = PassionRule(unimodal_loss=loss)
    return PassionWrapper(net, M, missing_rates=RATES, spec=spec_of(net), strategy=rule, config=config)


def gradients(net: MeanNet, loss: Any, config: PassionConfig | None = None) -> list[Tensor]:
    model = wrap(copy.deepcopy(net), loss, config)
    x, mask, y = batch(PRESENCE, dtype=torch.float64)
    model(x, mask)
    return list(torch.autograd.grad(model.passion_loss(y), list(model.parameters())))


def test_our_loss_as_the_users_own_changes_no_bit() -> None:
    net = MeanNet(M).double()
    for wanted, found in zip(gradients(net, None), gradients(net, segmentation_loss), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_it_is_weighted_by_rarity_and_by_how_many_samples_have_the_student(reduction: str) -> None:
    net = MeanNet(M).double()

    def own(logits: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, labels, reduction=reduction)
        return loss if reduction == "mean" else loss.flatten(1).mean(1)

    found = gradients(net, own, ONLY_STUDENTS)
    x, mask, y = batch(PRESENCE, dtype=torch.float64)
    wanted = 0.0
    # The third sample has one modality and no student, the third modality one student in the second sample.
    for column, rows in enumerate(([0, 1], [0, 1], [1])):
        alone = torch.zeros(len(rows), len(M), dtype=torch.bool)
        alone[:, column] = True
        seen = mask[rows] & alone
        loss = F.cross_entropy(net(x[rows], seen), y[rows])
        wanted = wanted + loss * len(rows) / len(x) / (1 - RATES[column])
    for one, two in zip(found, torch.autograd.grad(wanted, list(net.parameters())), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-14)


def test_it_is_given_labels_as_large_as_the_logits() -> None:
    seen = []

    def own(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append((len(logits), labels.dtype, labels.shape[1:] == logits.shape[2:]))
        return F.cross_entropy(logits, labels)

    gradients(MeanNet(M).double(), own)
    assert seen == [(2, torch.int64, True), (2, torch.int64, True), (1, torch.int64, True)]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (lambda logits, labels: 0.5, "unimodal_loss gave a float"),
        (lambda logits, labels: logits, "unimodal_loss gave a torch.float64 tensor of shape"),
        (lambda logits, labels: labels.sum(), "floating-point tensor"),
    ],
)
def test_what_is_no_loss_is_refused(own: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        gradients(MeanNet(M).double(), own)


def test_it_must_be_a_function_and_has_no_place_in_the_official_mode() -> None:
    with pytest.raises(ConfigError, match="unimodal_loss must be a function of logits and labels, got 'dice'"):
        PassionRule(unimodal_loss="dice")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="mode='default'"):
        wrap(MeanNet(M), F.cross_entropy, PassionConfig.official())


def test_a_state_says_with_which_loss_it_was_made() -> None:
    saved = get_passion_state_dict(wrap(MeanNet(M), F.cross_entropy))
    assert saved["_extra_state"]["settings"]["unimodal_loss"] == "torch.nn.functional.cross_entropy"
    set_passion_state_dict(wrap(MeanNet(M), F.cross_entropy), saved)
    with pytest.warns(PassionWarning, match=r"unimodal_loss was 'torch\.nn\.functional\.cross_entropy' and is"):
        set_passion_state_dict(wrap(MeanNet(M), segmentation_loss), saved)


def test_two_lambdas_are_two_settings() -> None:
    def named(loss: Any) -> Any:
        return wrap(MeanNet(M), loss).passion.strategy.settings()["unimodal_loss"]

    first = lambda logits, labels: F.cross_entropy(logits, labels)  # noqa: E731
    second = lambda logits, labels: 2 * F.cross_entropy(logits, labels)  # noqa: E731
    assert named(first) != named(second)
    assert named(first) == named(first)
    assert named(partial(F.cross_entropy, ignore_index=1)) != named(partial(F.cross_entropy, ignore_index=2))
    assert "functools.partial" not in named(partial(F.cross_entropy))
