"""State: what is ours, what is the backbone's, and training that goes on as if it had never stopped."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import NAMES, DeepNet, MeanNet, batch, spec_of
from passion_plugin import get_passion_state_dict, set_passion_state_dict
from passion_plugin.config import PassionConfig
from passion_plugin.data import PresenceTable
from passion_plugin.wrapper import PassionWrapper

M = NAMES[:3]
MIXED = [[1, 1, 0], [1, 1, 1], [0, 0, 1]]


def wrap(net: MeanNet, names: tuple[str, ...] = M, *, heads: bool = False, **config: Any) -> PassionWrapper:
    x, mask, _ = batch([[1] * len(names)] * 2)
    encoders = {name: f"encoders.{own}" for name, own in zip(names, net.names, strict=True)}
    spec = spec_of(net, encoders=encoders, students="heads" if heads else "replay")
    example: dict[str, Any] = {"example_input": x, "example_mask": mask} if heads else {}
    return PassionWrapper(
        net,
        names,
        missing_rates=(0.2,) * len(names),
        spec=spec,
        config=PassionConfig(**config),
        **example,
    )


def train(model: PassionWrapper, optimizer: torch.optim.Optimizer, steps: range, per_epoch: int = 2) -> list[float]:
    losses = []
    for index in steps:
        x, mask, y = batch(MIXED, seed=index)
        prediction = model(x, mask)
        loss = F.cross_entropy(prediction, y) + model.passion_loss(y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (index + 1) % per_epoch == 0:
            model.end_epoch()
    return losses


def stored(state: Any, tmp_path: Path) -> Any:
    """What a checkpoint gives back, read without trust."""
    torch.save(state, tmp_path / "checkpoint.pt")
    return torch.load(tmp_path / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("modulation", ["distillation", "encoder"])
def test_training_that_stops_and_resumes_is_the_same_bit_for_bit(heads: bool, modulation: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = MeanNet(M, norm="batch", dropout=0.2)
    whole = wrap(copy.deepcopy(net), heads=heads, modulation=modulation)
    initial = copy.deepcopy(get_passion_state_dict(whole))
    optimizer = torch.optim.AdamW(whole.parameters(), lr=0.01)
    torch.manual_seed(1)
    expected = train(whole, optimizer, range(7))

    first = wrap(copy.deepcopy(net), heads=heads, modulation=modulation)
    set_passion_state_dict(first, initial)
    optimizer = torch.optim.AdamW(first.parameters(), lr=0.01)
    torch.manual_seed(1)
    losses = train(first, optimizer, range(3))  # Stops in the middle of the second epoch.
    checkpoint = {
        "backbone": first.backbone.state_dict(),
        "passion": get_passion_state_dict(first),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
    }
    checkpoint = stored(checkpoint, tmp_path)
    torch.manual_seed(99)
    second = wrap(MeanNet(M, norm="batch", dropout=0.2), heads=heads, modulation=modulation)
    second.backbone.load_state_dict(checkpoint["backbone"])
    set_passion_state_dict(second, checkpoint["passion"])
    optimizer = torch.optim.AdamW(second.parameters(), lr=0.01)
    optimizer.load_state_dict(checkpoint["optimizer"])
    torch.set_rng_state(checkpoint["random"])
    losses += train(second, optimizer, range(3, 7))
    assert losses == expected
    assert torch.equal(second.passion.preference.beta, whole.passion.preference.beta)
    assert not torch.equal(whole.passion.preference.beta, torch.ones(3, dtype=torch.float64))
    for name, tensor in whole.backbone.state_dict().items():
        assert torch.equal(second.backbone.state_dict()[name], tensor), name


def test_the_backbone_state_loads_into_the_bare_class_and_back() -> None:
    model = wrap(MeanNet(M, norm="batch"))
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), range(2))
    bare = MeanNet(M, norm="batch")
    bare.load_state_dict(model.backbone.state_dict())
    x, mask, _ = batch(MIXED)
    assert torch.equal(bare.eval()(x, mask), model.eval()(x, mask))
    other = wrap(MeanNet(M, norm="batch"))
    other.backbone.load_state_dict(bare.state_dict())
    assert torch.equal(other.eval()(x, mask), bare(x, mask))


def test_the_whole_state_dict_of_the_wrapper_round_trips(tmp_path: Path) -> None:
    model = wrap(MeanNet(M), heads=True)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), range(4))
    state = model.state_dict()
    assert {name.split(".")[0] for name in state} == {"backbone", "passion"}
    other = wrap(MeanNet(M), heads=True)
    other.load_state_dict(stored(state, tmp_path))
    assert torch.equal(other.passion.preference.beta, model.passion.preference.beta)
    assert other.passion.preference.epoch == 2
    x, mask, y = batch(MIXED)
    assert torch.equal(other(x, mask, passion_target=y)[1], model(x, mask, passion_target=y)[1])


def test_the_addon_state_holds_only_ours_and_survives_an_untrusting_load(tmp_path: Path) -> None:
    model = wrap(MeanNet(M), heads=True)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), range(3))
    state = get_passion_state_dict(model)
    weights = {id(p) for p in model.backbone.parameters()}
    pointers = {p.data_ptr() for p in model.backbone.parameters()}
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(state) if isinstance(leaf, Tensor)]
    assert not any(id(leaf) in weights or leaf.data_ptr() in pointers for leaf in leaves)
    assert {name.partition(".")[0] for name in state} == {"heads", "_extra_state"}
    other = wrap(MeanNet(M), heads=True)
    set_passion_state_dict(other, stored(state, tmp_path))
    assert torch.equal(other.passion.preference.beta, model.passion.preference.beta)
    assert other.passion.preference.samples_seen == 3
    for name, tensor in model.passion.heads.state_dict().items():
        assert torch.equal(other.passion.heads.state_dict()[name], tensor)


def test_the_addon_state_does_not_change_when_training_goes_on() -> None:
    model = wrap(MeanNet(M))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, range(3))
    state = get_passion_state_dict(model)
    before = pickle.dumps(state)
    train(model, optimizer, range(3, 6))
    assert pickle.dumps(state) == before


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("pending", [False, True])
def test_a_copy_trains_on_by_itself(how: str, pending: bool) -> None:
    model = wrap(DeepNetLogits(M), modulation="encoder")
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), range(3))
    x, mask, y = batch(MIXED)
    if pending:
        model(x, mask)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert other.passion.backbone is other.backbone
    assert other.passion.preference is other.passion.preference
    assert other.passion.heads is other.passion.heads
    assert other.backbone is not model.backbone
    assert {p.data_ptr() for p in other.parameters()}.isdisjoint({p.data_ptr() for p in model.parameters()})
    if pending:
        assert model.passion_loss(y) > 0, "the original keeps its step"
        with pytest.raises(RuntimeError, match="nothing to compute"):
            other.passion_loss(y)
    before = copy.deepcopy(model.state_dict())
    found = train(other, torch.optim.SGD(other.parameters(), lr=0.1), range(3, 6))
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, before[f"backbone.{name}"]), name
    if not pending:
        assert train(model, torch.optim.SGD(model.parameters(), lr=0.1), range(3, 6)) == found


class DeepNetLogits(DeepNet):
    """Gives its probabilities only."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        raw: Any = super().forward(x, mask)
        return raw[0] if isinstance(raw, tuple) else raw


class Copied(MeanNet):
    """Knows how to copy itself, as GraphModule does."""

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        other = Copied(self.names)
        other.load_state_dict(self.state_dict())
        memo[id(self)] = other
        return other


def test_a_backbone_with_its_own_way_of_copying_does_not_stand_in_for_the_wrapper() -> None:
    model = wrap(Copied(M))
    other = copy.deepcopy(model)
    assert type(other) is PassionWrapper
    assert type(other.backbone) is Copied
    assert other.backbone is not model.backbone


def test_presence_may_be_a_table_in_another_order_of_modalities() -> None:
    table = PresenceTable(
        ("a", "b", "c", "d"), ("t1", "flair", "t1ce"), np.array([[1, 1, 1], [0, 1, 1], [0, 1, 1], [0, 1, 0]], bool)
    )
    spec = spec_of(MeanNet(M))
    model = PassionWrapper(MeanNet(M), M, presence=table, spec=spec)
    assert model.passion.frequencies.weights == pytest.approx((1.0, 4 / 3, 4.0))
    assert model.passion.frequencies.counts == (4, 3, 1)
    plain = PassionWrapper(MeanNet(M), M, presence=table.presence[:, [1, 2, 0]], spec=spec)
    assert plain.passion.frequencies == model.passion.frequencies
    tensor = PassionWrapper(MeanNet(M), M, presence=torch.from_numpy(table.presence[:, [1, 2, 0]]), spec=spec)
    assert tensor.passion.frequencies == model.passion.frequencies


def test_missing_rates_by_name_and_in_order_agree_with_a_table() -> None:
    spec = spec_of(MeanNet(M))
    by_name = PassionWrapper(MeanNet(M), M, missing_rates={"t1": 0.75, "flair": 0.0, "t1ce": 0.5}, spec=spec)
    in_order = PassionWrapper(MeanNet(M), M, missing_rates=(0.0, 0.5, 0.75), spec=spec)
    table = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 0, 0]], dtype=bool)
    counted = PassionWrapper(MeanNet(M), M, presence=table, spec=spec)
    assert by_name.passion.frequencies.weights == in_order.passion.frequencies.weights == (1.0, 2.0, 4.0)
    assert counted.passion.frequencies.weights == (1.0, 2.0, 4.0)


def test_moving_the_wrapper_moves_backbone_and_heads() -> None:
    model = wrap(MeanNet(M), heads=True).double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    x, mask, y = batch(MIXED, dtype=torch.float64)
    assert model(x, mask, passion_target=y)[1].dtype == torch.float64
