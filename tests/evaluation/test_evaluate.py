"""The loop over subsets: what the model is given, what is counted, what is put back."""

from __future__ import annotations

import builtins
import itertools
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, default_collate

from passion_plugin.backbone import prediction_of, split
from passion_plugin.data import IncompleteDataset, PresenceTable
from passion_plugin.errors import ConfigError, InputError, PassionWarning
from passion_plugin.evaluation import BRATS_REGIONS, SubsetResults, evaluate_subsets, sliding_window_predict

NAMES = ("flair", "t1ce", "t1")
X, Y = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4)


def vote(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Foreground where the sum of the modalities that are let through is positive."""
    total = torch.where(mask.view(*mask.shape, 1, 1), x, 0.0).sum(1)
    return torch.stack([torch.zeros_like(total), total], dim=1)


class Recorder(nn.Module):
    """Votes, and keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.Dropout(0.9)
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.flags: list[bool] = []

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        assert mask.is_contiguous(), "a row of the mask must not share memory with another"
        self.calls.append((x.clone(), mask.clone()))
        self.flags += [self.training, self.frozen.training, torch.is_grad_enabled()]
        scores = vote(self.frozen(x), mask) * self.scale
        x.fill_(7.0)
        mask.fill_(False)
        return scores


def data(size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(size, 3, 4, 4)
    return x, (x.sum(1) > 0).long()


def item(x: torch.Tensor, label: torch.Tensor, **more: Any) -> dict[str, Any]:
    return {"image": x, "label": label, **more}


def run(model: Any = vote, loader: Any = None, **options: Any) -> Any:
    return evaluate_subsets(model, [data()] if loader is None else loader, modalities=NAMES, **options)


def test_every_subset_is_scored_in_the_fixed_order() -> None:
    results = run()
    expected = [
        "+".join(names) for size in (1, 2, 3) for names in itertools.combinations(NAMES, size)
    ]  # by size, then by mask order
    assert list(results.subsets) == expected
    assert results.mean(subsets="flair+t1ce+t1") == 1.0
    assert results.mean(subsets="t1") < 1.0


def test_dice_of_each_subset_equals_a_direct_count() -> None:
    x, label = data()
    results = run(loader=[(x, label)])
    for row in results.rows:
        kept = [NAMES.index(name) for name in row.subset.split("+")]
        predicted = x[int(row.sample), kept].sum(0) > 0
        true = label[int(row.sample)] == 1
        count = 2 * int((predicted & true).sum()) / int(predicted.sum() + true.sum())
        assert row.value == pytest.approx(count, rel=1e-15)


def test_the_model_sees_zeros_and_false_outside_the_subset() -> None:
    model = Recorder()
    x, label = data(2)
    run(model, [(x, label)])
    assert len(model.calls) == 7
    for (given, mask), names in zip(model.calls, run().subsets, strict=True):
        kept = torch.tensor([name in names.split("+") for name in NAMES])
        assert mask.dtype == torch.bool
        assert torch.equal(mask, kept.expand(2, -1))
        # The model overwrites its input and mask: the next subset must not notice.
        assert torch.equal(given[:, kept], x[:, kept])
        assert not given[:, ~kept].any()


def test_nan_in_an_absent_modality_changes_nothing() -> None:
    x, label = data()
    spoiled = x.clone()
    spoiled[:, 1] = torch.nan

    def naive(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.zeros_like(x[:, 0]), x.sum(1)], dim=1)

    subsets = ["flair", "t1", "flair+t1"]
    assert run(naive, [(spoiled, label)], subsets=subsets).rows == run(naive, [(x, label)], subsets=subsets).rows


def test_nan_in_the_scores_raises_and_names_subset_and_samples() -> None:
    x, label = data(2)
    x[1, 1] = torch.nan
    with pytest.raises(InputError, match=r"subset 't1ce', samples \['a', 'b'\].*NaN"):
        run(loader=[item(x, label, id=["a", "b"])])


def test_the_model_runs_in_eval_mode_without_gradients_and_is_put_back() -> None:
    model = Recorder()
    model.frozen.eval()
    run(model)
    assert not any(model.flags)
    assert model.training
    assert not model.frozen.training
    assert torch.is_grad_enabled()


def test_modes_are_put_back_after_an_error() -> None:
    model = Recorder()
    model.frozen.eval()
    with pytest.raises(InputError):
        run(model, [data(), "nonsense"])
    assert model.training
    assert not model.frozen.training


def test_the_random_state_of_a_running_training_is_left_alone() -> None:
    x, label = data()
    loader = DataLoader(list(zip(x, label, strict=True)), batch_size=2, shuffle=True)
    before = torch.random.get_rng_state()
    run(loader=loader)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_results_do_not_depend_on_the_batch_size() -> None:
    x, label = data(5)
    rows = [run(loader=DataLoader(list(zip(x, label, strict=True)), batch_size=size)).rows for size in (1, 2, 5)]
    assert rows[0] == rows[1] == rows[2]


def test_a_sample_is_left_out_of_subsets_it_lacks_and_counted() -> None:
    model = Recorder()
    x, label = data(3)
    mask = torch.tensor([[1, 0, 0], [1, 0, 1], [1, 1, 1]])
    results = run(model, [(x, mask, label)])
    assert results.skipped == {
        "flair": 0, "t1ce": 2, "t1": 1, "flair+t1ce": 2, "flair+t1": 1, "t1ce+t1": 2, "flair+t1ce+t1": 2
    }  # fmt: skip
    assert results.summary(subsets="flair+t1").n == 2
    complete = run(loader=[(x, label)])
    assert {row for row in results.rows if row.status == "ok"} < set(complete.rows)
    gone = {(row.subset, row.sample) for row in results.rows if row.status == "missing"}
    assert ("t1", "0") in gone
    assert all(row.value is None for row in results.rows if (row.subset, row.sample) in gone)
    # Only complete rows reach the model, here the last two of the batch.
    given = model.calls[results.subsets.index("t1")][0]
    assert torch.equal(given[:, 2], x[1:, 2])


def test_a_batch_in_which_no_sample_has_the_subset_never_reaches_the_model() -> None:
    model = Recorder()
    x, label = data(2)
    results = run(model, [(x, torch.tensor([[True, True, False]] * 2), label)])
    assert len(model.calls) == 3
    assert results.skipped["t1"] == 2


def test_an_incomplete_data_set_in_nan_mode_is_evaluated_on_what_it_has() -> None:
    x, label = data(3)
    table = PresenceTable.from_array([[1, 1, 1], [1, 0, 1], [0, 0, 1]], NAMES)
    loader = DataLoader(IncompleteDataset(list(zip(x, label, strict=True)), table, fill="nan"), batch_size=2)
    results, complete = run(loader=loader), run(loader=[(x, label)])
    assert results.skipped["t1"] == 0
    assert results.skipped["flair+t1ce+t1"] == 2
    scored = [row for row in results.rows if row.status != "missing"]
    assert set(scored) <= set(complete.rows)


def test_loader_forms_give_the_same_rows() -> None:
    x, label = data(2)
    full = torch.ones(2, 3, dtype=torch.bool)
    expected = run(loader=[(x, label)]).rows
    assert run(loader=[(x, full, label)]).rows == expected
    assert run(loader=[[x, label]]).rows == expected
    assert run(loader=[item(x, label, mask=full, id=torch.arange(2))]).rows == expected
    assert (
        run(loader=[item(x.numpy(), label.numpy())], batch=lambda b: (torch.as_tensor(b["image"]), b["label"])).rows
        == expected
    )
    assert run(loader=[{"scan": x, "seg": label}], batch=lambda b: (b["scan"], b["seg"])).rows == expected


def test_a_mapping_from_modality_names_is_blanked_too() -> None:
    x, label = data(3)

    def from_mapping(model: Any, parts: dict[str, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        return model(torch.stack([parts[name] for name in NAMES], dim=1), torch.ones_like(mask))

    parts = {name: x[:, k] for k, name in enumerate(NAMES)}
    assert run(loader=[(parts, label)], predict=from_mapping).rows == run(loader=[(x, label)]).rows


def test_all_that_a_modality_brings_is_blanked_and_half_named_inputs_are_refused() -> None:
    x, label = data()
    parts = dict(zip(NAMES, x.split(1, dim=1), strict=True))

    def seen(inputs: dict[str, Any], mask: torch.Tensor) -> torch.Tensor:
        hidden = {name for m, name in enumerate(NAMES) if not mask[:, m].any()}
        assert not any(part.any() for name in hidden for part in inputs[name])
        return vote(torch.cat([inputs[name][0] for name in NAMES], dim=1), mask)

    run(seen, [item({name: [part, part] for name, part in parts.items()}, label)])
    wrong = {name.upper() if name == NAMES[0] else name: part for name, part in parts.items()}
    with pytest.raises(InputError, match=rf"none for '{NAMES[0]}'"):
        run(vote, [item(wrong, label)])


def test_ids_are_kept_to_the_letter(tmp_path: Path) -> None:
    x, label = data(2)
    results = run(vote, [item(x, label, id=["Anna\u00a0M", 'B, "b"'])])
    assert results.samples == ("Anna\u00a0M", 'B, "b"')
    results.to_csv(tmp_path / "results.csv")
    assert SubsetResults.from_csv(tmp_path / "results.csv") == results


def test_spacing_may_come_as_the_default_collate_function_makes_it() -> None:
    x, label = data()
    size = len(x)
    wanted = run(vote, [item(x, label, spacing=torch.tensor([[1.0, 2.5]] * size))], hd95=True).rows
    collated = default_collate([{"spacing": (1.0, 2.5)}] * size)["spacing"]
    for spacing in (collated, [torch.tensor([1.0, 2.5])] * size):
        assert run(vote, [item(x, label, spacing=spacing)], hd95=True).rows == wanted


@pytest.mark.parametrize(
    "wrap",
    [
        lambda scores: (scores, "extra"),
        lambda scores: [scores],
        lambda scores: {"logits": scores, "features": scores[:, :1]},
        lambda scores: {"anything": scores, "note": "text"},
    ],
    ids=["tuple", "list", "named entry", "only tensor"],
)
def test_scores_are_found_in_common_outputs(wrap: Any) -> None:
    loader = [data()]
    assert run(lambda x, mask: wrap(vote(x, mask)), loader).rows == run(vote, loader).rows


@pytest.mark.parametrize("output", [{"a": torch.zeros(1), "b": torch.zeros(1)}, "text", (), None])
def test_outputs_without_clear_scores_raise(output: Any) -> None:
    with pytest.raises(InputError, match="Pass predict="):
        run(lambda x, mask: output)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda scores, other: {"prediction": other, "pred": scores},
        lambda scores, other: {"prediction": other, "seg": scores},
        lambda scores, other: {"features": other, "output": scores},
        lambda scores, other: {"features": other, "logits": (scores, other)},
        lambda scores, other: ({"labels": scores.argmax(1)}, {"style": other.mean((2, 3)), "seg": scores}),
        lambda scores, other: (scores.argmax(1), scores),
    ],
    ids=["pred before prediction", "seg before prediction", "output", "nested", "second part", "after labels"],
)
def test_evaluation_scores_what_training_distils(wrap: Any) -> None:
    loader = [data()]

    def model(x: torch.Tensor, mask: torch.Tensor) -> Any:
        scores = vote(x, mask)
        output = wrap(scores, -scores)
        assert prediction_of(output) is scores
        return output

    assert run(model, loader).rows == run(vote, loader).rows


def test_labels_instead_of_scores_raise() -> None:
    with pytest.raises(InputError, match=r"labels, not logits or probabilities.*Pass predict="):
        run(lambda x, mask: vote(x, mask).argmax(1))


def test_a_warning_blames_the_line_of_the_user_and_comes_once() -> None:
    x, label = data()
    loader = [(x, nn.functional.one_hot(label, 2).movedim(-1, 1))]

    def model(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return vote(x, mask).sigmoid()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line = sys._getframe().f_lineno + 1
        evaluate_subsets(model, loader, modalities=NAMES, outputs="sigmoid")
    ours = [warning for warning in caught if issubclass(warning.category, PassionWarning)]
    assert [(warning.filename, warning.lineno) for warning in ours] == [(__file__, line)]


@pytest.mark.parametrize("container", ["tensor", "list", "tuple", "mapping"])
def test_a_modality_may_have_several_channels(container: str) -> None:
    x, label = torch.randn(4, 3, 2, 5, 5), torch.randint(2, (4, 5, 5))
    parts = list(x.unbind(1))
    inputs = {
        "tensor": x.flatten(1, 2),
        "list": parts,
        "tuple": tuple(parts),
        "mapping": dict(zip(NAMES, parts, strict=True)),
    }[container]
    seen = []

    def model(given: Any, mask: torch.Tensor) -> torch.Tensor:
        assert type(given) is type(inputs)
        by_name = split(given, NAMES)
        for m, part in enumerate(by_name):
            assert part.shape[1] == 2
            assert torch.equal(part, parts[m] if mask[0, m] else torch.zeros_like(parts[m]))
        seen.append(mask)
        return vote(torch.stack([part.sum(1) for part in by_name], dim=1), mask)

    expected = run(vote, [(x.sum(2), label)])
    assert run(model, [{"image": inputs, "label": label}]).rows == expected.rows
    assert len(seen) == 7


def test_names_with_a_plus_are_evaluated() -> None:
    x, label = data()
    results = evaluate_subsets(vote, [(x, label)], modalities=("T1", "T1+C", "T2"), subsets=["T1+C+T2", "T1+T2"])
    assert results.subsets == ("T1+C+T2", "T1+T2")
    plain = run(vote, [(x, label)], subsets=["t1ce+t1", "flair+t1"])
    assert [row.value for row in results.rows] == [row.value for row in plain.rows]


def test_regions_and_both_metrics_end_up_in_the_rows() -> None:
    pytest.importorskip("monai")
    label = torch.zeros(1, 6, 6, dtype=torch.long)
    label[0, 1, 1], label[0, 1, 2] = 1, 3
    x = torch.zeros(1, 3, 6, 6)

    def constant(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(1, dtype=torch.long).expand(1, 6, 6).clone()
        found[0, 1, 4] = 1
        return nn.functional.one_hot(found, 4).movedim(-1, 1).float()

    results = run(constant, [item(x, label, spacing=[(2.0, 0.5)])], regions=BRATS_REGIONS, hd95=True, subsets="t1")
    values = {(row.metric, row.target): (row.value, row.status) for row in results.rows}
    assert values["dice", "WT"] == (0.0, "ok")
    assert values["dice", "ET"] == (0.0, "one empty")
    assert values["hd95", "ET"] == (373.13, "one empty")
    # One voxel against (1, 1) and (1, 2): the farther one is three columns of 0.5 mm away, at the 95th
    # percentile of {2, 3} columns.
    assert values["hd95", "WT"][0] == pytest.approx((2 + 0.95) * 0.5)
    assert results.conventions["hd95"] == ("mm", 0.0, 373.13)


def test_spacing_argument_goes_before_the_batch_and_none_means_voxels() -> None:
    pytest.importorskip("monai")
    x, label = data(1)
    loader = [item(x, label, spacing=[(2.0, 2.0)])]
    own, given, none = (
        run(loader=loader, hd95=True),
        run(loader=loader, hd95=True, spacing=(4.0, 4.0)),
        run(loader=[(x, label)], hd95=True),
    )
    assert [r.conventions["hd95"].unit for r in (own, given, none)] == ["mm", "mm", "voxels"]
    assert given.mean("hd95") == pytest.approx(2 * own.mean("hd95"))
    assert own.mean("hd95") == pytest.approx(2 * none.mean("hd95"))
    assert none.mean("hd95") > 0
    with pytest.raises(InputError, match="some batches have a spacing"):
        run(loader=[*loader, item(x, label, id=["b"])], hd95=True)


def test_each_sample_is_measured_with_its_own_spacing_also_when_rows_are_left_out() -> None:
    pytest.importorskip("monai")
    x, label = data(1)
    loader = [
        {
            "image": x.expand(3, -1, -1, -1),
            "label": label.expand(3, -1, -1),
            "mask": torch.tensor([[0, 1, 0], [1, 0, 0], [1, 0, 0]]),
            "spacing": [(1.0, 1.0), (2.0, 2.0), (6.0, 6.0)],
        }
    ]
    rows = run(loader=loader, hd95=True, subsets="flair").rows
    first, second = (row for row in rows if row.metric == "hd95" and row.status == "ok")
    assert (first.sample, second.sample) == ("1", "2")
    assert first.value is not None
    assert first.value > 0
    assert second.value == pytest.approx(3 * first.value)


def test_empty_masks_are_skipped_or_counted_as_asked() -> None:
    x, label = -torch.ones(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long)
    skipped = run(loader=[(x, label)], subsets="t1")
    assert [(row.value, row.status) for row in skipped.rows] == [(None, "both empty")] * 2
    assert skipped.summary().n == 0
    assert run(loader=[(x, label)], subsets="t1", empty="one").mean() == 1.0


def test_subsets_can_be_names_or_sequences_in_any_order_of_modalities() -> None:
    results = run(subsets=["t1ce+flair", ("t1",), ["t1", "t1ce", "flair"], "flair+t1ce"])
    assert results.subsets == ("flair+t1ce", "t1", "flair+t1ce+t1")


def test_a_progress_bar_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    run(progress=True)
    assert "evaluation: 100%" in capsys.readouterr().err


def test_unknown_modalities_are_reported_together_with_suggestions() -> None:
    with pytest.raises(ConfigError, match="3 problems") as caught:
        run(subsets=["t1c", "flare+t1", ()])
    assert "'t1c'. Did you mean 't1ce'" in str(caught.value)
    assert "'flare'" in str(caught.value)
    assert "subset (): it is empty" in str(caught.value)
    with pytest.raises(ConfigError, match="at least one name"):
        evaluate_subsets(vote, [data()], modalities="flair")


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "loader is empty"),
        (iter(()), "loader is empty"),
        (["text"], "yields a str"),
        ([(1, 2, 3, 4)], "yields a tuple of 4"),
        ([{"x": 1, "label": 2}], r"keys \['label', 'x'\]"),
        ([(X[:, :2], Y)], r"image has shape \(2, 2, 4, 4\)"),
        ([(X, torch.zeros(3, 4, 4))], r"label \(3, 4, 4\)"),
        ([(X, torch.zeros(2, 5, 4))], r"label has shape \(2, 5, 4\)"),
        ([(X, Y + 2)], "labels run from 2 to 2"),
        ([(X, torch.ones(2, 2), Y)], r"mask is torch.float32 of shape \(2, 2\)"),
        ([(X, torch.full((2, 3), 2), Y)], "True where the sample has"),
        ([(X, torch.zeros(2, 3), Y)], "no sample has all modalities"),
        ([item(X, Y, id=["a"])], "2 samples and 1 ids"),
        ([item(X, Y, id=["a", "a"])], "'a' comes twice"),
        ([item(X, Y, spacing=[[1.0, 1.0]])], "spacing has shape"),
        ([(X, "text")], "label is a str"),
    ],
)  # fmt: skip
def test_batches_that_do_not_fit_raise(loader: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(loader=loader)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"empty": "zero"}, "empty is 'zero'"),
        ({"hd95_empty": "one", "hd95_penalty": -1.0}, "2 problems"),
        ({"num_classes": 3, "regions": BRATS_REGIONS}, "region 'WT' uses label 3"),
        ({"subsets": []}, "no subset"),
    ],
)
def test_wrong_options_raise_before_the_model_runs(options: dict[str, Any], message: str) -> None:
    model = Recorder()
    with pytest.raises(ConfigError, match=message):
        run(model, **options)
    assert not model.calls


@pytest.mark.parametrize("shape", [(3, 2, 4, 4), (4,), (4, 2)])
def test_scores_of_another_shape_raise(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="the scores are"):
        run(lambda x, mask: torch.zeros(shape), predict=lambda model, x, mask: model(x, mask))
    with pytest.raises(InputError, match=r"the scores are|without a tensor"):
        run(lambda x, mask: torch.zeros(shape))


@pytest.mark.parametrize(
    ("call", "module", "extra"),
    [
        (lambda: run(hd95=True), "monai", "monai"),
        (lambda: run(hd95=True), "scipy", "monai"),
        (lambda: sliding_window_predict(4), "monai", "monai"),
        (lambda: run(progress=True), "tqdm", "examples"),
    ],
)
def test_a_missing_extra_is_named_with_its_pip_line(
    call: Any, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == module:
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=rf'pip install "passion-plugin\[{extra}\]"'):
        call()


class TestSlidingWindow:
    """Windows of several samples share a batch; each must meet the mask of its own sample."""

    @pytest.fixture(autouse=True)
    def _needs_monai(self) -> None:
        pytest.importorskip("monai")

    @pytest.mark.parametrize("size", [1, 2, 3, 5, 64])
    @pytest.mark.parametrize("blend", ["constant", "gaussian"])
    def test_equals_the_whole_volume_for_a_pointwise_model_whatever_the_window_batch(
        self, size: int, blend: Any
    ) -> None:
        x = torch.randn(3, 3, 7, 6)
        mask = torch.tensor([[True, False, False], [False, True, True], [True, True, True]])
        predict = sliding_window_predict((4, 4), sw_batch_size=size, overlap=0.25, blend=blend)
        torch.testing.assert_close(predict(vote, x, mask), vote(x, mask))

    def test_mask_rows_follow_their_windows(self) -> None:
        # Sample b is filled with b and has mask row b: every window can tell whose mask it should get.
        x = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 6, 6).clone()
        mask = torch.eye(3, dtype=torch.bool)
        sizes = []

        def check(windows: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            sizes.append(len(windows))
            assert torch.equal(rows, mask[windows[:, 0, 0, 0].long()])
            return windows[:, :2]

        sliding_window_predict(4, sw_batch_size=5, overlap=0.0)(check, x, mask)
        assert sizes == [5, 5, 2]

    def test_a_model_that_returns_its_input_does_not_spoil_it(self) -> None:
        x = torch.randn(1, 3, 8, 8)
        before = x.clone()
        predict = sliding_window_predict(4, sw_batch_size=1, blend="gaussian")
        scores = predict(lambda windows, rows: windows, x, torch.ones(1, 3, dtype=torch.bool))
        assert torch.equal(x, before)
        torch.testing.assert_close(scores, x)

    def test_works_inside_the_loop_in_3d_with_windows_larger_than_the_volume(self) -> None:
        x = torch.randn(2, 3, 5, 4, 6)
        label = (x.sum(1) > 0).long()

        def vote3d(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return torch.stack([torch.zeros_like(x[:, 0]), x.sum(1)], dim=1)

        windows = run(vote3d, [(x, label)], predict=sliding_window_predict((4, 8, 4), overlap=0.5))
        assert windows.rows == run(vote3d, [(x, label)]).rows

    def test_refuses_anything_but_a_tensor(self) -> None:
        with pytest.raises(InputError, match="needs a tensor"):
            sliding_window_predict(4)(vote, {"flair": torch.zeros(1)}, torch.ones(1, 1, dtype=torch.bool))
