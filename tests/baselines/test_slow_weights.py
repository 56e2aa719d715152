"""Slow weights: Reptile's rule, and nothing else that moves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from passion_plugin.baselines import SlowWeights
from passion_plugin.errors import ConfigError


def walk(model: nn.Module, slow: SlowWeights | None, steps: range) -> list[bool]:
    """Train on targets of its own for each step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    averaged = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 3, generator=generator)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if slow is not None:
            averaged.append(slow.step())
    return averaged


def test_after_a_burst_the_weights_lie_between_where_it_began_and_where_it_ended() -> None:
    model = nn.Linear(3, 2)
    fast = copy.deepcopy(model)
    begun = copy.deepcopy(model)
    averaged = walk(model, SlowWeights(model, rate=0.3, every=3), range(3))
    walk(fast, None, range(3))
    assert averaged == [False, False, True]
    for found, start, end in zip(model.parameters(), begun.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(found, start + 0.3 * (end - start))
        assert (end - start).abs().max() > 1e-4


def test_within_a_burst_nothing_is_touched_and_a_rate_of_one_changes_nothing() -> None:
    for rate, every in ((0.3, 10), (1.0, 2)):
        model = nn.Linear(3, 2)
        bare = copy.deepcopy(model)
        walk(model, SlowWeights(model, rate=rate, every=every), range(4))
        walk(bare, None, range(4))
        for found, wanted in zip(model.parameters(), bare.parameters(), strict=True):
            torch.testing.assert_close(found, wanted)


def test_frozen_parameters_and_buffers_are_left_alone() -> None:
    model = nn.BatchNorm1d(2)
    model.weight.requires_grad_(False)
    slow = SlowWeights(model, rate=0.5, every=1)
    with torch.no_grad():
        model.weight.add_(1)
        model.bias.add_(1)
        model.running_mean.add_(1)  # type: ignore[union-attr]
    slow.step()
    assert model.weight.tolist() == [2, 2]
    assert model.bias.tolist() == [0.5, 0.5]
    assert model.running_mean.tolist() == [1, 1]  # type: ignore[union-attr]


def test_training_that_stops_in_a_burst_resumes_bit_for_bit(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    whole, first = copy.deepcopy(model), copy.deepcopy(model)
    walk(whole, SlowWeights(whole, rate=0.3, every=3), range(7))
    slow = SlowWeights(first, rate=0.3, every=3)
    walk(first, slow, range(4))
    torch.save({"model": first.state_dict(), "slow": slow.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second = nn.Linear(3, 2)
    second.load_state_dict(state["model"])
    slow = SlowWeights(second, rate=0.3, every=3)
    slow.load_state_dict(state["slow"])
    walk(second, slow, range(4, 7))
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("wrong", [{"rate": 0}, {"rate": 1.5}, {"every": 0}, {"every": 2.5}])
def test_wrong_numbers_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} must be"):
        SlowWeights(nn.Linear(1, 1), **wrong)


def test_states_of_others_are_refused() -> None:
    slow = SlowWeights(nn.Linear(1, 1), rate=0.25, every=3)
    with pytest.raises(ConfigError, match=r"missing entries: \['rate', 'every', 'steps', 'slow'\]"):
        slow.load_state_dict({})
    with pytest.raises(ConfigError, match=r"weights: weight has shape \(1, 2\), need \(1, 1\)"):
        slow.load_state_dict(SlowWeights(nn.Linear(2, 1)).state_dict())
    with pytest.raises(ConfigError, match=r"weights: missing entries: \['bias'\]"):
        slow.load_state_dict(SlowWeights(nn.Linear(1, 1, bias=False)).state_dict())
    with pytest.raises(ConfigError, match=r"(?s)rate was 0.5 and is 0.25 now.*every was 15 and is 3 now"):
        slow.load_state_dict(SlowWeights(nn.Linear(1, 1)).state_dict())
