"""Random networks, specs, batches and orders of calls: whatever happens is right, or an error of ours that says why.

``HYPOTHESIS_PROFILE=fuzz pytest tests/test_fuzz.py`` runs 2,000 cases with a network and 500 with settings.
"""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fuzzing.batches import Batch, batches
from fuzzing.entrances import ENTRANCES
from fuzzing.mistakes import IMAGES, MASKS, NONSENSE, TARGETS
from fuzzing.nets import Plan, build, plans, right_spec
from fuzzing.settings import how_to_balance, plain_balance
from models import options_of
from passion_plugin import get_passion_state_dict, set_passion_state_dict
from passion_plugin.config import PassionConfig
from passion_plugin.errors import PassionError, PassionWarning
from passion_plugin.wrapper import PassionWrapper
from zoo.reference import fingerprint, first_difference

RATE = 0.25


def wrap(
    net: nn.Module, plan: Plan, strategy: str | None = None, config: PassionConfig | None = None, **options: Any
) -> PassionWrapper:
    options |= {"missing_rates": [RATE] * len(plan.modalities), **options_of(strategy, config)}
    return PassionWrapper(net, plan.modalities, **options)


def run(model: nn.Module, batch: Batch, **extra: Any) -> Any:
    """Call a network or a wrapper from a fixed random state."""
    torch.default_generator.manual_seed(7)
    args, kwargs = batch.call()
    return model(*args, **kwargs, **extra)


def failure(action: Callable[[], Any]) -> Exception | None:
    """What an action raises; warnings of ours are to be expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PassionWarning)
        try:
            action()
        except Exception as error:
            return error
    return None


def bare_failure(plan: Plan, batch: Batch) -> Exception | None:
    """What the network alone raises for the batch in training mode."""
    return failure(lambda: run(build(plan).train(), batch))


@contextmanager
def nothing_left(net: nn.Module) -> Iterator[list[PassionWrapper]]:
    """Unwrap what is put into the list; the network then has no hook, attribute or forward that it had not."""
    before, wrappers = fingerprint(net), []
    yield wrappers
    for wrapper in wrappers:
        assert wrapper.unwrap() is net
    assert fingerprint(net) == before


def step(model: PassionWrapper, batch: Batch) -> Tensor:
    """Forward, loss with one of the user's own, backward; everything finite that should be."""
    model.zero_grad(set_to_none=True)
    raw = run(model, batch, **batch.ours())
    loss = model.passion_loss(batch.target)
    assert loss.ndim == 0
    assert loss.isfinite()
    (loss + sum(leaf.square().mean() for leaf in tree_leaves(raw))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert all(abs(value) < float("inf") for value in model.passion.metrics().values())
    return loss


def assert_eval_is_bare(model: PassionWrapper, plan: Plan, batch: Batch) -> None:
    """In evaluation mode the wrapper is its backbone, bit for bit; NaN in absent modalities included."""
    bare = build(plan).eval()
    bare.load_state_dict(model.backbone.state_dict())
    expected: list[Any] = []
    with torch.no_grad():
        if failure(lambda: expected.append(run(bare, batch))) is None:
            model.eval()
            assert not first_difference(without_nan(run(model, batch)), without_nan(expected[0]))
            model.train()


def without_nan(raw: Any) -> list[Tensor]:
    """Leaves with NaN replaced, which is not equal to itself."""
    return [leaf.nan_to_num(nan=12345.0) for leaf in tree_leaves(raw)]


@given(st.data())
def test_right_use_trains_or_is_refused_with_a_reason(data: st.DataObject) -> None:
    plan = data.draw(plans())
    batch, later = data.draw(batches(plan)), data.draw(batches(plan))
    how = data.draw(how_to_balance(plan))
    students = data.draw(st.sampled_from(["replay", "auto", "detect", "rerun", "mixed", "replay", "rerun"]))
    if data.draw(st.booleans()):
        how |= {"example_input": batch.images, "example_mask": None if plan.mask == "none" else batch.mask}
    net = build(plan)
    with nothing_left(net) as wrappers:

        def use() -> None:
            spec = None if students == "detect" else right_spec(plan, students)
            model = wrap(net, plan, spec=spec, **how)
            wrappers.append(model)
            step(model, batch)
            model.end_epoch()
            assert_eval_is_bare(model, plan, later)

        error = failure(use)
        if error is None:
            event("trained")
        elif isinstance(error, PassionError):
            event(f"refused: {str(error)[:300]}")
            assert not has_no_excuse(plan, how, students), error
        else:
            event("the network itself cannot")
            assert type(error) is type(bare_failure(plan, batch)), error


def has_no_excuse(plan: Plan, how: dict[str, Any], students: str) -> bool:
    """Whether a network, taken at its word, must be trained by the default strategy."""
    config = how["config"]
    plain = how["strategy"] is None and config.mode == "default" and config.modulation != "encoder"
    taken_at_its_word = students in ("replay", "mixed", "rerun") and plan.mask != "none"
    optional = config.skip_missing_encoders is True
    return plain and taken_at_its_word and not optional and plan.norm == "none"


@given(st.data())
def test_a_mistake_is_named_and_training_goes_on(data: st.DataObject) -> None:
    plan = data.draw(plans(plain=True))
    batch, later = data.draw(batches(plan)), data.draw(batches(plan))
    how = data.draw(plain_balance())
    spec = right_spec(plan, data.draw(st.sampled_from(["replay", "rerun", "mixed"])))
    part, mistakes = data.draw(st.sampled_from([("images", IMAGES), ("mask", MASKS), ("target", TARGETS)]))
    mistake = data.draw(st.sampled_from(mistakes))
    net = build(plan)
    with nothing_left(net) as wrappers:
        model = wrap(net, plan, spec=spec, **how)
        wrappers.append(model)
        wrong = batch.changed(part, mistake.change)
        error = failure(lambda: step(model, wrong))
        event(f"{part}, {mistake.name}: {type(error).__name__}")
        if isinstance(error, PassionError):
            assert re.search(mistake.says, str(error), re.DOTALL), error
        else:
            assert error is not None
            assert part != "target", error
            assert type(error) is type(bare_failure(plan, wrong)), error
        assert failure(lambda: step(model, later)) is None


@given(st.data())
def test_nonsense_in_a_setting_is_refused_with_its_name(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(ENTRANCES)))
    function, arguments, right = ENTRANCES[name]
    chosen = data.draw(st.lists(st.sampled_from(arguments), min_size=1, max_size=3, unique=True))
    nonsense = {argument: data.draw(st.sampled_from(NONSENSE) | st.text() | st.floats()) for argument in chosen}
    error = failure(lambda: function(**{**right, **nonsense}))
    event(f"{name}: {type(error).__name__}")
    if error is not None:
        assert isinstance(error, PassionError), error
        said = [words for argument, value in nonsense.items() for words in naming(argument, value)]
        assert any(words.lower() in str(error).lower() for words in said), error


def naming(argument: str, value: Any) -> list[str]:
    """Words of which one at least is in a message about an argument."""
    return [argument[:5], repr(value)[:12], type(value).__name__]


@given(st.data())
def test_a_spec_with_nonsense_in_it_trains_or_is_refused(data: st.DataObject) -> None:
    """What no check of single values can see shows when spec and network meet, or with the first batch."""
    plan = data.draw(plans(plain=True))
    batch = data.draw(batches(plan))
    right = right_spec(plan, data.draw(st.sampled_from(["auto", "replay", "rerun"])))
    fields = st.sampled_from(ENTRANCES["BackboneSpec"][1])
    words = st.sampled_from(["score", "encoders", "encoders.0", "fusion", "decoder.1", "", "no", 0, 1, 7, "x", "mask"])
    values = words | st.sampled_from(NONSENSE) | st.lists(words, max_size=5) | st.booleans()
    changes = {field: data.draw(values) for field in data.draw(st.lists(fields, min_size=1, max_size=3, unique=True))}
    net = build(plan)
    with nothing_left(net) as wrappers:

        def use() -> None:
            model = wrap(net, plan, spec=right.replaced(**changes))
            wrappers.append(model)
            step(model, batch)

        error = failure(use)
        event(type(error).__name__)
        assert error is None or isinstance(error, PassionError), error
    assert failure(lambda: step(wrap(net, plan, spec=right_spec(plan, "rerun")), batch)) is None


CALLS: dict[str, Callable[[PassionWrapper, Batch], Any]] = {
    "forward": lambda model, batch: run(model, batch, **batch.ours()),
    "loss": lambda model, batch: model.passion_loss(batch.target),
    "step": step,
    "in one call": lambda model, batch: run(model, batch, **batch.ours(), passion_target=batch.target)[1].isfinite(),
    "end_epoch": lambda model, batch: model.end_epoch(),
    "eval": lambda model, batch: model.eval(),
    "train": lambda model, batch: model.train(),
    "no_grad": lambda model, batch: torch.no_grad()(run)(model, batch, **batch.ours()),
    "inference_mode": lambda model, batch: torch.inference_mode()(run)(model, batch, **batch.ours()),
    "autocast": lambda model, batch: torch.autocast("cpu", torch.bfloat16)(step)(model, batch),
    "disabled": lambda model, batch: in_disabled(model, batch),
    "metrics": lambda model, batch: model.passion.metrics(),
    "loss_terms": lambda model, batch: model.passion.loss_terms(),
    "save and load": lambda model, batch: model.load_state_dict(copy.deepcopy(model.state_dict())),
    "add-on": lambda model, batch: set_passion_state_dict(
        model, pickle.loads(pickle.dumps(get_passion_state_dict(model)))
    ),
    "another add-on": lambda model, batch: set_passion_state_dict(model, {"_extra_state": {"modalities": []}}),
    "copy": lambda model, batch: step(copy.deepcopy(model).train(), batch),
    "pickle": lambda model, batch: step(pickle.loads(pickle.dumps(model)).train(), batch),
    "wrap again": lambda model, batch: wrap(model, batch.plan),
    "no target": lambda model, batch: model.passion_loss(None),
    "double": lambda model, batch: model.to(batch.plan.dtype).requires_grad_(),
    "unwrap": lambda model, batch: model.unwrap(),
}


def in_disabled(model: PassionWrapper, batch: Batch) -> None:
    with model.passion.disabled():
        run(model, batch)


@given(st.data())
def test_calls_in_any_order_work_or_are_refused_and_training_goes_on(data: st.DataObject) -> None:
    plan = data.draw(plans(plain=True))
    how = data.draw(plain_balance())
    spec = right_spec(plan, data.draw(st.sampled_from(["replay", "auto", "rerun"])))
    calls = data.draw(st.lists(st.sampled_from(sorted(CALLS)), min_size=1, max_size=8))
    batch, last = data.draw(batches(plan)), data.draw(batches(plan))
    net = build(plan)
    with nothing_left(net) as wrappers:
        model = wrap(net, plan, spec=spec, **how)
        wrappers.append(model)
        for call in calls:
            error = failure(lambda: CALLS[call](model, batch))  # noqa: B023 - called at once
            event(f"{call}: {type(error).__name__}")
            assert error is None or isinstance(error, PassionError), error
        model.train()
        if "unwrap" not in calls:
            error = failure(lambda: step(model, last))
            assert error is None or isinstance(error, PassionError), error
        assert_eval_is_bare(model, plan, batch)


@pytest.mark.parametrize("name", sorted(ENTRANCES))
def test_right_settings_are_taken(name: str) -> None:
    """Otherwise nonsense would be refused for another reason."""
    function, _, right = ENTRANCES[name]
    function(**right)
