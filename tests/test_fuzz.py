"""Random networks, specs, batches and orders of calls: whatever happens is right, or an error of ours that says why.

``HYPOTHESIS_PROFILE=fuzz pytest tests/test_fuzz.py`` runs 2,000 cases; by default a few hundred.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from typing import Any

import torch
from hypothesis import event, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fuzzing.batches import Batch, batches
from fuzzing.mistakes import IMAGES, MASKS, TARGETS
from fuzzing.nets import Plan, build, plans, right_spec
from fuzzing.settings import how_to_balance
from passion_plugin import PassionError, PassionWarning, PassionWrapper
from zoo.reference import first_difference, fingerprint

RATE = 0.25
HARMLESS: set[str] = set()


def wrap(net: nn.Module, plan: Plan, **options: Any) -> PassionWrapper:
    return PassionWrapper(net, plan.modalities, missing_rates=[RATE] * len(plan.modalities), **options)


def run(model: nn.Module, batch: Batch, **extra: Any) -> Any:
    """Call a network or a wrapper from a fixed random state."""
    torch.default_generator.manual_seed(7)
    args, kwargs = batch.call()
    return model(*args, **kwargs, **extra)


def bare_failure(plan: Plan, batch: Batch, *, training: bool) -> type[Exception] | None:
    """What the network alone raises for the batch."""
    try:
        run(build(plan).train(training), batch)
    except Exception as error:
        return type(error)
    return None


def train(model: PassionWrapper, batch: Batch) -> Tensor:
    """One step with a loss of the user's own; everything finite that should be."""
    model.zero_grad(set_to_none=True)
    raw = run(model, batch, **batch.ours())
    loss = model.passion_loss(batch.target)
    assert loss.ndim == 0
    assert loss.isfinite()
    (loss + sum(leaf.square().mean() for leaf in tree_leaves(raw))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert all(math.isfinite(value) for value in model.metrics().values())
    return loss


def assert_eval_is_bare(model: PassionWrapper, plan: Plan, batch: Batch) -> None:
    """In evaluation mode the wrapper is its backbone, bit for bit."""
    bare = build(plan).eval()
    bare.load_state_dict(model.backbone.state_dict())
    modes = model.training
    model.eval()
    with torch.no_grad():
        try:
            expected = run(bare, batch)
        except Exception:
            return
        finally:
            model.train(modes)
        assert not first_difference(tree_nan(run(model.eval(), batch)), tree_nan(expected))
    model.train(modes)


def tree_nan(raw: Any) -> list[Tensor]:
    """Leaves with NaN replaced, which is not equal to itself."""
    return [leaf.nan_to_num(nan=12345.0) for leaf in tree_leaves(raw)]


@given(st.data())
def test_right_use_trains_or_is_refused_with_a_reason(data: st.DataObject) -> None:
    plan = data.draw(plans())
    batch, later = data.draw(batches(plan)), data.draw(batches(plan))
    how = data.draw(how_to_balance())
    students = data.draw(st.sampled_from(["detect", "auto", "replay", "mixed", "rerun"]))
    net = build(plan)
    before = fingerprint(net)
    spec = None if students == "detect" else right_spec(plan, students)
    model = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PassionWarning)
        try:
            model = wrap(net, plan, spec=spec, **how)
            train(model, batch)
            event("trained")
            model.end_epoch()
            assert_eval_is_bare(model, plan, later)
        except PassionError as error:
            event(f"refused: {str(error)[:300]}")
        except Exception as error:
            assert type(error) is bare_failure(plan, batch, training=True)
            event("refused by the network itself")
    if model is not None:
        assert model.unwrap() is net
    assert fingerprint(net) == before


@given(st.data())
def test_a_mistake_is_named_and_training_goes_on(data: st.DataObject) -> None:
    plan = data.draw(plans(plain=True))
    batch, later = data.draw(batches(plan)), data.draw(batches(plan))
    how = data.draw(how_to_balance(plain=True))
    net = build(plan)
    before = fingerprint(net)
    model = wrap(net, plan, spec=right_spec(plan, data.draw(st.sampled_from(["replay", "rerun", "mixed"]))), **how)
    part, mistakes = data.draw(st.sampled_from([("images", IMAGES), ("mask", MASKS), ("target", TARGETS)]))
    mistake = data.draw(st.sampled_from(mistakes))
    wrong = batch.changed(part, mistake.change)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PassionWarning)
        try:
            train(model, wrong)
        except PassionError as error:
            assert re.search(mistake.says, str(error), re.DOTALL), error
            event(f"{part} {mistake.name}: {str(error)[:150]}")
        except Exception as error:
            assert part != "target"
            assert type(error) is bare_failure(plan, wrong, training=True)
            event(f"{part} {mistake.name}: bare {type(error).__name__}")
        else:
            event(f"{part} {mistake.name}: no error")
            assert mistake.name in HARMLESS
        if bare_failure(plan, later, training=True) is None:
            train(model, later)
    assert model.unwrap() is net
    assert fingerprint(net) == before
