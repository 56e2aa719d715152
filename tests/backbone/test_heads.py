"""Students that are heads on encoder features, for backbones that cannot let a single modality through."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from models import NAMES, MeanNet, batch, copies_gradients, spec_of
from passion_plugin.backbone import UnimodalHead
from passion_plugin.errors import BackboneError, ConfigError, InputError
from passion_plugin.testing import references
from passion_plugin.wrapper import PassionWrapper

M = NAMES[:3]
MIXED = [[1, 1, 0], [1, 1, 1], [0, 0, 1]]


def wrap(net: MeanNet, **options: Any) -> PassionWrapper:
    ndim = 2 if isinstance(net.classifier, torch.nn.Conv2d) else 3
    x, mask, _ = batch([[1, 1, 1]] * 2, ndim=ndim)
    example = {"example_input": x.to(net.classifier.weight.dtype), "example_mask": mask, **options}
    return PassionWrapper(net, M, missing_rates=(0.2, 0.5, 0.75), spec=spec_of(net, students="heads"), **example)


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_head_predicts_at_the_size_asked_for_from_maps_of_any_size(ndim: int) -> None:
    head = UnimodalHead([3, 5], num_classes=4, ndim=ndim, hidden=6)
    maps = [torch.randn(2, 3, *[8] * ndim), torch.randn(2, 5, *[4] * ndim)]
    prediction = head(maps, size=[8] * ndim)
    assert prediction.logits.shape == (2, 4, *[8] * ndim)
    assert prediction.features.shape == (2, 6, *[8] * ndim)
    assert prediction.coarse == ()
    torch.testing.assert_close(head.classifier(prediction.features), prediction.logits)


def test_every_map_reaches_the_prediction_and_samples_do_not_mix() -> None:
    head = UnimodalHead([3, 5], num_classes=2, ndim=2)
    maps = [torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 5, 2, 2, requires_grad=True)]
    head(maps, size=(4, 4)).logits[0].square().sum().backward()
    for feature in maps:
        assert feature.grad is not None
        assert feature.grad[0].any()
        assert not feature.grad[1].any()


@pytest.mark.parametrize(
    ("channels", "classes", "ndim", "hidden"), [([], 2, 2, 4), ([1], 0, 2, 4), ([1], 2, 4, 4), ([1], 2, 3, 0)]
)
def test_a_head_that_makes_no_sense_is_refused(channels: list[int], classes: int, ndim: int, hidden: int) -> None:
    with pytest.raises(ConfigError, match=r"UnimodalHead needs .* got in_channels="):
        UnimodalHead(channels, classes, ndim, hidden)


def test_a_head_refuses_another_number_of_maps() -> None:
    with pytest.raises(InputError, match="built for 1 feature maps, got 2"):
        UnimodalHead([3], 2, 2)([torch.randn(1, 3, 4, 4)] * 2, size=(4, 4))


@pytest.mark.parametrize("ndim", [2, 3])
def test_heads_are_the_students_and_the_backbone_runs_once(ndim: int) -> None:
    net = MeanNet(M, ndim=ndim).double()
    bare = copy.deepcopy(net)
    model = wrap(net)
    calls: list[int] = []
    net.decoder.register_forward_hook(lambda *_: calls.append(1))
    x, mask, y = batch(MIXED, ndim=ndim, dtype=torch.float64)
    prediction = model(x, mask)
    assert torch.equal(prediction, bare(x, mask))
    assert len(calls) == 1
    loss = model.passion_loss(y)
    terms = model.passion.loss_terms()
    assert torch.equal(terms.active, torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.bool))
    student = model.passion.heads[1]([net.encoders["t1ce"](x[:, 1:2])], size=x.shape[2:])
    features = net.decoder(net.fuse(net.encode(x), mask))
    pixel = references.pixel_distillation(student.logits, prediction, 4.0)
    prototype, distance = references.prototype_distillation(student.features, features, y, 3)
    for name, wanted in (("pixel", pixel), ("prototype", prototype), ("distance", distance)):
        values = getattr(terms, name)[:2, 1].tolist()
        assert values == pytest.approx(wanted[:2].tolist(), rel=1e-9)
    loss.backward()
    gradients = copies_gradients(model)
    for index, name in enumerate(M):
        assert gradients[f"backbone.encoders.{name}.0.weight"].any()
        assert gradients[f"passion.heads.{index}.classifier.weight"].any()
    assert not gradients["backbone.decoder.0.weight"].any(), "heads do not reach the shared decoder"


def test_heads_exist_before_the_optimizer_and_travel_with_the_model() -> None:
    model = wrap(MeanNet(M))
    names = [name for name, _ in model.named_parameters()]
    assert sum(name.startswith("passion.heads.") for name in names) == 3 * 6
    assert not any(name.startswith("passion.heads.") for name, _ in model.backbone.named_parameters())
    other = copy.deepcopy(model)
    other.get_parameter("passion.heads.2.classifier.weight").data.zero_()
    assert model.get_parameter("passion.heads.2.classifier.weight").any()


def test_heads_train() -> None:
    model = wrap(MeanNet(M))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    x, mask, y = batch(MIXED)
    losses = []
    for _ in range(30):
        prediction, loss = model(x, mask, passion_target=y)
        (F.cross_entropy(prediction, y) + loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_absent_content_never_reaches_a_head() -> None:
    net = MeanNet(M)
    model = wrap(net)
    x, mask, y = batch(MIXED)
    model(x, mask, passion_target=y)[1].backward()
    wanted = copies_gradients(model)
    poisoned = torch.where(mask[:, :, None, None], x, torch.nan)
    model(poisoned, mask, passion_target=y)[1].backward()
    assert all(torch.equal(value, wanted[name]) for name, value in copies_gradients(model).items())


def test_heads_of_modalities_whose_names_look_alike_stay_apart() -> None:
    net = MeanNet(("a", "b"))
    x, mask, y = batch([[1, 1]])
    spec = spec_of(net, students="heads", encoders={"type": "encoders.a", "t.1": "encoders.b"})
    model = PassionWrapper(
        net, ("type", "t.1"), missing_rates=(0.1, 0.1), spec=spec, example_input=x, example_mask=mask
    )
    assert len(model.passion.heads) == 2
    model(x, mask, passion_target=y)[1].backward()
    model.unwrap()
    spec = spec_of(net, students="heads", encoders={"t.1": "encoders.a", "t_1": "encoders.b"})
    model = PassionWrapper(net, ("t.1", "t_1"), missing_rates=(0.1, 0.1), spec=spec, example_input=x, example_mask=mask)
    assert len(model.passion.heads) == 2


def test_heads_without_an_example_say_what_to_pass() -> None:
    net = MeanNet(M)
    model = PassionWrapper(net, M, missing_rates=(0.1,) * 3, spec=spec_of(net, students="heads"))
    x, mask, _ = batch(MIXED)
    with pytest.raises(BackboneError, match=r"pass example_input= and example_mask="):
        model(x, mask)


def test_an_encoder_without_feature_maps_cannot_carry_a_head() -> None:
    class Flat(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)

    net = MeanNet(M)
    net.encoders["t1"] = torch.nn.Sequential(net.encoders["t1"], Flat(), torch.nn.Unflatten(1, (4, 4, 4)))
    spec = spec_of(
        net,
        students="heads",
        encoders={"flair": "encoders.flair", "t1ce": "encoders.t1ce", "t1": "encoders.t1.1"},
    )
    x, mask, _ = batch([[1, 1, 1]])
    with pytest.raises(ConfigError, match="'t1' puts out no feature map"):
        PassionWrapper(net, M, missing_rates=(0.1,) * 3, spec=spec, example_input=x, example_mask=mask)


def test_building_heads_moves_nothing_in_the_backbone() -> None:
    class Counting(MeanNet):
        steps = 0

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
            self.steps += 1
            return super().forward(x, mask)

    net = Counting(M, norm="batch")
    before = copy.deepcopy(net.state_dict())
    model = wrap(net)
    assert len(model.passion.heads) == 3
    assert net.training
    assert net.steps == 0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_lazy_layers_get_their_shapes_before_heads_are_built() -> None:
    net = MeanNet(M)
    net.decoder = torch.nn.Sequential(torch.nn.LazyConv2d(4, 3, padding=1), torch.nn.LazyBatchNorm2d())
    model = wrap(net)
    x, mask, y = batch(MIXED)
    assert int(net.decoder[1].num_batches_tracked) == 0
    model(x, mask, passion_target=y)[1].backward()
    assert int(net.decoder[1].num_batches_tracked) == 1
