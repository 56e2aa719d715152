"""What was drawn: the data, names and colours of the artists, not pixels."""

from __future__ import annotations

import io
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from passion_plugin.data import all_subsets, subset_name
from passion_plugin.errors import ConfigError, InputError
from passion_plugin.evaluation import Convention, Row, SubsetResults
from passion_plugin.training import EpochReport, epoch_records
from passion_plugin.training._metrics import epoch_metrics

pytest.importorskip("matplotlib")

from passion_plugin.report import (
    COLOURS,
    best_slice,
    draw_grid,
    new_figure,
    plot_distances,
    plot_overlay,
    plot_preference,
    plot_subsets,
)
from passion_plugin.report._figures import _painted

NAN = math.nan
DICE = Convention("fraction", None, 0.0)


def preference(epoch: int, beta: list[float], rp: list[float], distance: list[float]) -> EpochReport:
    columns = (torch.tensor(values, dtype=torch.float64) for values in (beta, rp, distance))
    return EpochReport(("ct", "pet"), epoch, *columns, torch.ones(2))


HISTORY = [
    preference(0, [1.1, 0.9], [-0.2, 0.2], [0.6, 0.4]),
    preference(1, [1.1, 0.9], [0.0, 0.0], [0.5, NAN]),
    preference(2, [1.3, 0.7], [-0.1, 0.1], [0.55, 0.45]),
]


def curves(axes: Any) -> dict[str, list[list[float]]]:
    """Epochs and values by name; lines at the neutral value have no name."""
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    return {line.get_label(): [list(line.get_xdata()), list(line.get_ydata())] for line in lines}


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


class TestCurves:
    def test_preference_and_beta_by_epoch_with_a_gap_where_nothing_was_measured(self) -> None:
        figure = plot_preference(HISTORY, missing_rates={"ct": 0.2})
        left, right = figure.axes
        drawn = curves(left)
        assert drawn["ct"] == [[0, 1, 2], [-0.2, 0.0, -0.1]]
        assert drawn["pet"][1][0::2] == [0.2, 0.1]
        assert math.isnan(drawn["pet"][1][1])
        assert curves(right) == {"ct": [[0, 1, 2], [1.1, 1.1, 1.3]], "pet": [[0, 1, 2], [0.9, 0.9, 0.7]]}
        assert (left.get_xlabel(), left.get_ylabel()) == ("epoch", "relative preference (no unit)")
        assert right.get_ylabel() == "beta (no unit)"
        assert legend(figure) == ["ct (missing in 20%)", "pet"]
        neutral = [axes.get_lines()[0].get_ydata()[0] for axes in (left, right)]
        assert neutral == [0, 1]

    def test_distances_by_epoch(self) -> None:
        (axes,) = plot_distances(HISTORY).axes
        assert curves(axes)["ct"][1] == [0.6, 0.5, 0.55]
        assert math.isnan(curves(axes)["pet"][1][1])
        assert axes.get_ylabel() == "mean prototype distance (no unit)"

    def test_logged_dicts_and_reports_give_the_same_picture(self) -> None:
        logged = [{"pixel/ct": 0.3}, *map(epoch_metrics, HISTORY)]
        for plot in (plot_preference, plot_distances):
            for first, second in zip(plot(HISTORY).axes, plot(logged).axes, strict=True):
                assert np.array_equal(
                    np.array(list(curves(first).values())), np.array(list(curves(second).values())), equal_nan=True
                )

    def test_a_strategy_without_preference_has_its_weights_alone(self) -> None:
        (axes,) = plot_preference([{"epoch": 0.0, "beta/ct": 0.5, "beta/pet": None}]).axes
        assert curves(axes) == {"ct": [[0.0], [0.5]]}
        assert axes.get_lines()[-1].get_marker() == "o", "one epoch is no line"

    def test_a_history_without_epochs_says_what_is_needed(self) -> None:
        for history in ([], [{"pixel/ct": 0.3}], [{"beta/ct": 1.0}]):
            with pytest.raises(InputError, match=r"none of 0 epochs .* has 'relative_preference/…' or 'beta/…'"):
                plot_preference(history)
        with pytest.raises(InputError, match=r"none of 1 epochs .* has 'epoch_distance/…'"):
            plot_distances([{"epoch": 0.0, "beta/ct": 1.0}])

    def test_more_modalities_than_colours_are_told_apart_by_dashes(self) -> None:
        names = [f"m{k}" for k in range(len(COLOURS) + 2)]
        (axes,) = plot_preference([{"epoch": 0.0, **{f"beta/{name}": 1.0 for name in names}}]).axes
        lines = axes.get_lines()[1:]
        assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(names)

    def test_names_are_drawn_as_they_are(self) -> None:
        names = ("_t1", "T$_1$", "<b>&")
        figure = plot_preference([{"epoch": 0.0, **{f"beta/{name}": 1.0 for name in names}}])
        figure.savefig(io.BytesIO(), format="png")
        assert legend(figure) == list(names)


def test_epochs_that_come_again_replace_the_attempt_that_was_given_up() -> None:
    log: list[dict[str, Any]] = [{"step": 1}, {"epoch": None}]
    log += [{"epoch": float(epoch), "beta/ct": 1.0 + epoch} for epoch in (0, 0, 1, 2, 3)]
    log += [{"epoch": 1.0, "beta/ct": 7.0}, {"epoch": 2.0, "beta/ct": 8.0}, {"epoch": 2.0, "validation": 0.5}]
    assert [(record["epoch"], record["beta/ct"]) for record in epoch_records(log)] == [(0, 1), (1, 7), (2, 8)]


def results(values: dict[tuple[str, str], float | None], convention: Convention = DICE) -> SubsetResults:
    rows = [Row(subset, "a", target, "dice", value, "ok") for (subset, target), value in values.items()]
    return SubsetResults(("ct", "pet"), tuple(rows), {"dice": convention})


FULL = results({("ct", "WT"): 0.5, ("ct", "ET"): 0.1, ("pet", "WT"): 0.2, ("pet", "ET"): None, ("ct+pet", "WT"): 1.0})
WEAK = results({("ct", "WT"): 0.25, ("ct", "ET"): 0.75, ("ct+pet", "WT"): 0.0})


def ticks(axes: Any) -> tuple[list[str], list[str]]:
    return tuple([tick.get_text() for tick in labels] for labels in (axes.get_yticklabels(), axes.get_xticklabels()))  # type: ignore[return-value]


class TestSubsets:
    def test_one_model_is_subsets_by_targets_in_percent(self) -> None:
        axes = plot_subsets(FULL).axes[0]
        assert ticks(axes) == (["ct", "pet", "ct+pet"], ["WT", "ET"])
        drawn = axes.images[0].get_array()
        assert drawn.filled(-1).tolist() == pytest.approx(np.array([[50, 10], [20, -1], [100, -1]]))
        assert [text.get_text() for text in axes.texts] == ["50.0", "10.0", "20.0", "100.0"]
        assert (axes.get_title(), axes.get_ylabel()) == ("Dice (%)", "available modalities")

    def test_several_models_are_names_by_subsets_averaged_over_targets(self) -> None:
        axes = plot_subsets({"plain": WEAK, "PASSION": FULL}).axes[0]
        assert ticks(axes) == (["plain", "PASSION"], ["ct", "ct+pet", "pet"])
        assert axes.images[0].get_array().filled(-1).tolist() == pytest.approx(np.array([[50, 0, -1], [30, 100, 20]]))
        assert axes.get_title() == "Dice (%), mean over WT, ET"

    def test_a_difference_is_coloured_around_zero_and_blue_is_better(self) -> None:
        both = plot_subsets({"plain": WEAK.compare(FULL)}).axes[0]
        assert both.images[0].get_clim() == pytest.approx((-100, 100))
        assert both.images[0].get_cmap().name == "RdBu"
        assert [text.get_text() for text in both.texts] == ["+20.0", "-100.0"]
        in_mm = Convention("mm", None, 373.13)
        far, near = (results({("ct", "WT"): value}, in_mm) for value in (9.0, 4.0))
        assert plot_subsets(near.compare(far)).axes[0].images[0].get_cmap().name == "RdBu_r"

    def test_models_that_do_not_fit_together_are_refused_with_all_reasons(self) -> None:
        other = SubsetResults(
            ("ct",), (Row("ct", "a", "WT", "hd95", 3.0, "ok"),), {"hd95": Convention("mm", None, 9.0)}
        )
        strict = results({("ct", "GTV"): 0.5}, Convention("fraction", 1.0, 0.0))
        with pytest.raises(ConfigError) as error:
            plot_subsets({"a": WEAK, "b": other, "c": strict})
        message = str(error.value)
        assert "2 problems" in message
        assert "'b' and 'a' do not fit on one scale: 'dice' has None and Convention(unit='fraction'" in message
        assert "'c' and 'a' do not fit on one scale: 'dice' has Convention(unit='fraction', both_empty=1.0" in message
        assert "the targets are ('GTV',) and ('WT', 'ET'); evaluate both alike" in message
        with pytest.raises(ConfigError, match="there are no results"):
            plot_subsets({})
        with pytest.raises(ConfigError, match="no metric 'hd95'"):
            plot_subsets(WEAK, metric="hd95")

    def test_numbers_stand_out_from_their_colour(self) -> None:
        axes = plot_subsets(results({("ct", "WT"): 0.0, ("pet", "WT"): 1.0})).axes[0]
        assert [text.get_color() for text in axes.texts] == ["white", "black"]

    def test_a_table_without_numbers_is_blank(self) -> None:
        axes = new_figure().subplots()
        for form in (".1f", "+.1f"):
            draw_grid(axes, [[NAN, math.inf]], rows=["a"], columns=["b", "c"], form=form)
            assert (axes.images[-1].get_array().mask.tolist(), list(axes.texts)) == ([[True, True]], [])
        axes.figure.savefig(io.BytesIO(), format="png")

    def test_options_are_those_of_imshow(self) -> None:
        axes = new_figure().subplots()
        image = draw_grid(
            axes, [[1.0, -2.0]], rows=["a"], columns=["b", "c"], form="+.0f", tilt=True, vmax=5, cmap="Greys"
        )
        assert (image.get_clim(), image.get_cmap().name) == ((-2, 5), "Greys")
        assert [text.get_text() for text in axes.texts] == ["+1", "-2"]
        assert [tick.get_rotation() for tick in axes.get_xticklabels()] == [45, 45]


MODALITIES = ("ct", "pet", "t1")
CASE = torch.arange(3 * 4 * 6).reshape(3, 4, 6).float() + 1
TRUTH = torch.zeros(4, 6, dtype=torch.long)
TRUTH[1, 2], TRUTH[0, 0] = 1, -1
ALL = {subset_name(subset): torch.full((4, 6), len(subset)) for subset in all_subsets(MODALITIES)}


class TestOverlay:
    def test_every_subset_is_drawn_over_its_first_modality(self) -> None:
        figure = plot_overlay(CASE, TRUTH, ALL, modalities=MODALITIES, classes=("background", "tumour"))
        panels = {axes.get_title(): axes for axes in figure.axes if axes.images}
        assert list(panels) == ["truth", "ct", "pet", "t1", "ct+pet", "ct+t1", "pet+t1", "ct+pet+t1"]
        assert len(figure.axes) == 9
        assert not figure.axes[-1].axison, "an empty place shows nothing"
        for name, channel in {"truth": 0, "pet": 1, "t1": 2, "ct+t1": 0, "pet+t1": 1}.items():
            assert np.array_equal(panels[name].images[0].get_array(), CASE[channel])
        assert np.array_equal(panels["pet+t1"].images[1].get_array(), _painted(ALL["pet+t1"]))
        assert legend(figure) == ["tumour", "class 2", "class 3"]

    def test_background_and_what_is_to_be_ignored_are_transparent(self) -> None:
        painted = _painted(TRUTH)
        assert painted.shape == (4, 6, 4)
        assert np.argwhere(painted[..., 3]).tolist() == [[1, 2]]
        with_uint8 = _painted(torch.tensor([[0, 255]], dtype=torch.uint8))
        assert with_uint8[0, :, 3].tolist() == [0.0, 0.6]

    def test_of_a_volume_the_slice_with_most_labels_is_shown(self) -> None:
        volume, truth = torch.rand(3, 5, 4, 6), torch.zeros(5, 4, 6, dtype=torch.long)
        truth[1, :1], truth[3, :2] = 1, 1
        prediction = torch.zeros_like(truth)
        prediction[4] = 2
        seen = plot_overlay(volume, truth, {"pet": prediction}, modalities=MODALITIES).axes[1].images
        assert np.array_equal(seen[0].get_array(), volume[1, 3])
        assert not seen[1].get_array().any()
        unknown = plot_overlay(volume, None, {"pet": prediction}, modalities=MODALITIES).axes[0].images
        assert np.array_equal(unknown[0].get_array(), volume[1, 4])
        assert best_slice(torch.zeros(5, 4, 6)) == 2

    def test_arrays_and_half_precision_are_fine(self) -> None:
        figure = plot_overlay(CASE.half(), TRUTH.numpy(), {"ct": ALL["ct"].byte().numpy()}, modalities=MODALITIES)
        assert [axes.get_title() for axes in figure.axes] == ["truth", "ct"]

    def test_everything_wrong_is_told_at_once(self) -> None:
        with pytest.raises(InputError) as error:
            plot_overlay(CASE[:2], TRUTH[:3], {"ct": ALL["ct"].float(), "pet": ALL["pet"]}, modalities=MODALITIES)
        message = str(error.value)
        assert "3 problems" in message
        assert "image has 2 channels, modalities are 3" in message
        assert "'truth' is torch.int64 (3, 6); pass integer labels of shape (4, 6)" in message
        assert "'ct' is torch.float32 (4, 6)" in message
        with pytest.raises(ConfigError, match="unknown modality 'mr'"):
            plot_overlay(CASE, TRUTH, {"ct+mr": ALL["ct"]}, modalities=MODALITIES)
        with pytest.raises(InputError, match="there are no predictions"):
            plot_overlay(CASE, TRUTH, {}, modalities=MODALITIES)
        with pytest.raises(InputError, match=r"image is torch.float32 \(4, 6\)"):
            plot_overlay(CASE[0], None, {"ct": ALL["ct"]}, modalities=MODALITIES)


def test_no_picture_touches_global_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    pictures = (
        plot_preference(HISTORY),
        plot_distances(HISTORY),
        plot_subsets(FULL),
        plot_overlay(CASE, TRUTH, ALL, modalities=MODALITIES),
    )
    for number, figure in enumerate(pictures):
        figure.savefig(tmp_path / f"{number}.png")
    assert "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "passion-plugin\[plot\]"'):
        plot_preference(HISTORY)
