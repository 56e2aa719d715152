"""Averages, comparison, Markdown, CSV and heat maps of results."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from passion_plugin.errors import ConfigError
from passion_plugin.evaluation import Convention, Row, SubsetResults

DICE = Convention("fraction", None, 0.0)
HD95 = Convention("mm", 0.0, 373.13)


def small() -> SubsetResults:
    """Two samples, two targets, three subsets; sample b has no t1, ET is empty for a in flair."""
    values: dict[tuple[str, str, str], tuple[float | None, str]] = {
        ("flair", "a", "WT"): (0.5, "ok"),
        ("flair", "a", "ET"): (None, "both empty"),
        ("flair", "b", "WT"): (0.7, "ok"),
        ("flair", "b", "ET"): (0.0, "one empty"),
        ("t1", "a", "WT"): (0.2, "ok"),
        ("t1", "a", "ET"): (0.4, "ok"),
        ("t1", "b", "WT"): (None, "missing"),
        ("t1", "b", "ET"): (None, "missing"),
        ("flair+t1", "a", "WT"): (0.9, "ok"),
        ("flair+t1", "a", "ET"): (0.8, "ok"),
        ("flair+t1", "b", "WT"): (None, "missing"),
        ("flair+t1", "b", "ET"): (None, "missing"),
    }
    rows = [Row(s, i, t, "dice", value, status) for (s, i, t), (value, status) in values.items()]
    return SubsetResults(("flair", "t1"), tuple(rows), {"dice": DICE})


def both_metrics() -> SubsetResults:
    dice = small()
    rows = [
        row._replace(metric="hd95", value=None if row.status == "missing" else 10 / 3, status="ok") for row in dice.rows
    ]
    return SubsetResults(dice.modalities, (*dice.rows, *rows), {"dice": DICE, "hd95": HD95})


def shifted(by: float) -> SubsetResults:
    """The same rows, the values of sample a moved."""
    base = small()
    rows = [r._replace(value=r.value + by) if r.value is not None and r.sample == "a" else r for r in base.rows]
    return SubsetResults(base.modalities, tuple(rows), base.conventions)


def test_a_cell_is_mean_and_sample_sd_over_samples() -> None:
    mean, sd, n = small().summary(subsets="flair", targets="WT")
    assert mean == pytest.approx(0.6)
    assert sd == pytest.approx(math.sqrt(2 * 0.1**2 / 1))
    assert n == 2


def test_values_that_do_not_exist_are_left_out_and_one_value_has_no_sd() -> None:
    mean, sd, n = small().summary(subsets="flair", targets="ET")
    assert (mean, n) == (0.0, 1)
    assert math.isnan(sd)


def test_a_group_averages_its_cells_alike_and_its_sd_is_that_of_sample_averages() -> None:
    mean, sd, n = small().summary(targets="WT")
    assert mean == pytest.approx((0.6 + 0.2 + 0.9) / 3)
    a, b = (0.5 + 0.2 + 0.9) / 3, 0.7
    assert sd == pytest.approx(abs(a - b) / math.sqrt(2))
    assert n == 2
    assert small().mean() == pytest.approx((0.6 + 0.0 + 0.2 + 0.4 + 0.9 + 0.8) / 6)


def test_groups_by_modality_and_by_size() -> None:
    results = small()
    assert results.groups("modality") == {"flair": ("flair", "flair+t1"), "t1": ("t1", "flair+t1")}
    assert results.groups("size") == {"1": ("flair", "t1"), "2": ("flair+t1",)}
    groups = results.groups("modality")
    assert results.mean(subsets=groups["flair"], targets="WT") == pytest.approx((0.6 + 0.9) / 2)
    assert results.mean(subsets=groups["t1"], targets="ET") == pytest.approx((0.4 + 0.8) / 2)
    assert results.mean(subsets=results.groups("size")["1"], targets="WT") == pytest.approx((0.6 + 0.2) / 2)


def test_t1_is_not_in_a_subset_that_only_has_t1ce() -> None:
    rows = tuple(Row(s, "a", "WT", "dice", 0.5, "ok") for s in ("t1ce", "t1"))
    results = SubsetResults(("t1ce", "t1"), rows, {"dice": DICE})
    assert results.groups("modality") == {"t1ce": ("t1ce",), "t1": ("t1",)}


def test_skipped_counts_samples_not_values() -> None:
    assert small().skipped == {"flair": 0, "t1": 1, "flair+t1": 1}


def test_markdown_by_subset() -> None:
    assert small().to_markdown() == (
        "Dice (%), mean ± sd (ddof = 1) over samples. Both masks empty: skipped; exactly one empty: 0 "
        "(1 and 1 of 8 values). Left out because the sample lacks a modality: 2 of 6 pairs of subset and "
        "sample.\n"
        "\n"
        "| subset | WT | ET | mean | n |\n"
        "|---|---|---|---|---|\n"
        "| flair | 60.00 ± 14.14 | 0.00 | 30.00 ± 10.61 | 2/1 |\n"
        "| t1 | 20.00 | 40.00 | 30.00 | 1 |\n"
        "| flair+t1 | 90.00 | 80.00 | 85.00 | 1 |\n"
        "| all subsets | 56.67 ± 11.79 | 40.00 ± 42.43 | 48.33 ± 14.85 | 2 |\n"
    )


def test_markdown_by_modality_without_sd() -> None:
    assert small().to_markdown("modality", digits=1, sd=False).splitlines()[2:] == [
        "| contains | WT | ET | mean | n |",
        "|---|---|---|---|---|",
        "| flair | 75.0 | 40.0 | 57.5 | 2 |",
        "| t1 | 55.0 | 60.0 | 57.5 | 1 |",
        "| all subsets | 56.7 | 40.0 | 48.3 | 2 |",
    ]


def test_markdown_of_a_distance_states_unit_and_penalty() -> None:
    text = both_metrics().to_markdown(metric="hd95")
    assert text.startswith(
        "HD95 (mm), mean ± sd (ddof = 1) over samples. Both masks empty: 0; exactly one empty: 373.13"
    )
    assert "| t1 | 3.33 | 3.33 | 3.33 | 1 |" in text


def test_markdown_of_a_group_without_values_says_so() -> None:
    rows = (Row("t1", "a", "WT", "dice", None, "both empty"),)
    text = SubsetResults(("t1",), rows, {"dice": DICE}).to_markdown()
    assert "| t1 | n/a | 0 |" in text


def test_printing_gives_all_tables_and_repr_a_line() -> None:
    results = both_metrics()
    assert str(results) == results.to_markdown() + "\n" + results.to_markdown(metric="hd95")
    assert repr(results) == "SubsetResults(subsets: 3, samples: 2, targets: WT, ET, metrics: dice, hd95)"


def test_csv_gives_back_exactly_what_was_written(tmp_path: Path) -> None:
    for results in (both_metrics(), both_metrics().compare(both_metrics())):
        results.to_csv(tmp_path / "results.csv")
        assert SubsetResults.from_csv(tmp_path / "results.csv") == results


def test_csv_explains_itself(tmp_path: Path) -> None:
    small().to_csv(tmp_path / "results.csv")
    lines = (tmp_path / "results.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == ("subset,has_flair,has_t1,sample,target,metric,value,status,unit,both_empty,one_empty")
    assert lines[1] == "flair,1,0,a,WT,dice,0.5,ok,fraction,,0.0"
    assert lines[2] == "flair,1,0,a,ET,dice,,both empty,fraction,,0.0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", r"columns \['subset', .* are missing"),
        (
            "subset,has_t1,sample,target,metric,value,status,unit,both_empty,one_empty\n"
            "t1,1,a,WT,dice,high,ok,fraction,,0.0\n",
            "line 2: could not convert",
        ),
        (
            "subset,has_t1,sample,target,metric,value,status,unit,both_empty,one_empty\n"
            "t2,1,a,WT,dice,0.1,ok,fraction,,0.0\n",
            "unknown modality 't2'",
        ),
        ("subset,has_t1,sample,target,metric,value,status,unit,both_empty,one_empty\n", "no rows"),
    ],
)
def test_csv_that_is_not_ours_raises(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "other.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        SubsetResults.from_csv(tmp_path / "other.csv")


def test_compare_is_paired_by_sample() -> None:
    difference = shifted(0.1).compare(small())
    mean, sd, n = difference.summary(subsets="flair", targets="WT")
    assert mean == pytest.approx((0.1 + 0.0) / 2)
    assert sd == pytest.approx(0.1 / math.sqrt(2))
    assert n == 2
    assert difference.metrics == ("dice difference",)
    assert {row.status for row in difference.rows if row.value is None} == {"unpaired"}


def test_compare_with_itself_is_zero_everywhere() -> None:
    difference = both_metrics().compare(both_metrics())
    assert {row.value for row in difference.rows} == {0.0, None}


def test_compare_prints_signed_differences() -> None:
    lines = shifted(-0.1).compare(small()).to_markdown(digits=1).splitlines()
    assert lines[0] == (
        "Difference in Dice (percentage points, paired), mean ± sd (ddof = 1) over samples. Both masks "
        "empty: skipped; exactly one empty: 0. Without a partner: 5 of 12 values."
    )
    assert lines[4] == "| flair | -5.0 ± 7.1 | +0.0 | -2.5 ± 7.1 | 2/1 |"


def test_compare_refuses_what_cannot_be_paired() -> None:
    base = small()
    one = SubsetResults(base.modalities, base.rows, {"dice": Convention("fraction", 1.0, 0.0)})
    with pytest.raises(ConfigError, match="other conventions"):
        base.compare(one)
    renamed = SubsetResults(
        base.modalities, tuple(r._replace(sample="x" + r.sample) for r in base.rows), base.conventions
    )
    with pytest.raises(ConfigError, match="no row has the same"):
        base.compare(renamed)
    swapped = SubsetResults(("t1", "flair"), base.rows, base.conventions)
    with pytest.raises(ConfigError, match="modalities are"):
        base.compare(swapped)


def test_unknown_names_raise_with_suggestions() -> None:
    with pytest.raises(ConfigError, match=r"no subset 'flair\+t2'. Did you mean 'flair\+t1'"):
        small().mean(subsets="flair+t2")
    with pytest.raises(ConfigError, match=r"no metric 'dise'\. Did you mean 'dice'"):
        small().mean("dise")
    with pytest.raises(ConfigError, match="no target 'TC'"):
        small().summary(targets=["WT", "TC"])
    with pytest.raises(ConfigError, match="by is 'region'"):
        small().groups("region")  # type: ignore[arg-type]


def test_rows_that_cannot_be_right_raise() -> None:
    row = Row("t1", "a", "WT", "dice", 0.5, "ok")
    with pytest.raises(ConfigError, match="more than once"):
        SubsetResults(("t1",), (row, row), {"dice": DICE})
    with pytest.raises(ConfigError, match="metric 'dice' has no convention"):
        SubsetResults(("t1",), (row,), {})


def test_rows_are_a_data_frame_for_whoever_has_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(small().rows)
    assert list(frame.columns) == ["subset", "sample", "target", "metric", "value", "status"]
    assert frame.query("subset == 'flair' and target == 'WT'").value.mean() == pytest.approx(0.6)


def test_a_name_with_a_plus_is_one_modality_in_groups_and_files(tmp_path: Path) -> None:
    subsets = ("T1", "T1+C", "T2", "T1+T1+C", "T1+T2", "T1+C+T2", "T1+T1+C+T2")
    rows = tuple(Row(subset, "a", "WT", "dice", 0.1 * n, "ok") for n, subset in enumerate(subsets))
    results = SubsetResults(("T1", "T1+C", "T2"), rows, {"dice": DICE})
    assert results.groups("size") == {"1": subsets[:3], "2": subsets[3:6], "3": subsets[6:]}
    assert results.groups("modality")["T1+C"] == ("T1+C", "T1+T1+C", "T1+C+T2", "T1+T1+C+T2")
    results.to_csv(tmp_path / "results.csv")
    lines = (tmp_path / "results.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("subset,has_T1,has_T1+C,has_T2,")
    assert lines[6].startswith("T1+C+T2,0,1,1,")
    assert SubsetResults.from_csv(tmp_path / "results.csv") == results
