"""Presence tables: checks, files, drawing."""

from __future__ import annotations

import dataclasses
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from passion_plugin.data import PresenceTable, draw_presence
from passion_plugin.errors import ConfigError

NAMES = ("flair", "t1ce", "t1", "t2")
RATES = dict(zip(NAMES, (0.2, 0.4, 0.6, 0.8), strict=True))


def small_table() -> PresenceTable:
    return PresenceTable.from_array([[1, 0, 1], [0, 1, 1], [1, 1, 1]], ("a", "b", "c"), ("x", "y, z", "ü#"))


# --- the table


def test_ids_and_names_may_come_from_iterators() -> None:
    table = PresenceTable(iter("xy"), iter("ab"), np.ones((2, 2), dtype=np.bool_))  # type: ignore[arg-type]
    assert (table.sample_ids, table.modalities) == (("x", "y"), ("a", "b"))
    assert PresenceTable.from_array([[1, 1]] * 2, iter("ab"), (name for name in "xy")) == table  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="more than once"):
        PresenceTable(iter("xx"), iter("ab"), np.ones((2, 2), dtype=np.bool_))  # type: ignore[arg-type]
    rates = {"a": 0.2, "b": 0.4}
    drawn = draw_presence(iter("xyz"), rates, seed=0, modalities=iter("ba"))  # type: ignore[arg-type]
    assert drawn == draw_presence(list("xyz"), rates, seed=0, modalities=("b", "a"))


def test_counts_and_real_missing_rates_by_name() -> None:
    table = small_table()
    assert table.counts == {"a": 2, "b": 2, "c": 3}
    assert table.missing_rates == {"a": pytest.approx(1 / 3), "b": pytest.approx(1 / 3), "c": 0.0}


def test_rows_are_found_by_sample_id() -> None:
    table = small_table()
    assert table["y, z"].tolist() == [False, True, True]
    assert "x" in table
    assert "nobody" not in table
    assert list(table) == ["x", "y, z", "ü#"]
    with pytest.raises(ConfigError, match=r"no sample 'y, y'.*Did you mean 'y, z'"):
        table["y, y"]


def test_table_cannot_be_changed_and_does_not_share_memory() -> None:
    array = np.ones((2, 2), dtype=np.bool_)
    table = PresenceTable(("x", "y"), ("a", "b"), array)
    array[0, 0] = False
    assert table.presence.all()
    with pytest.raises(ValueError, match="read-only"):
        table.presence[0, 0] = False
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.seed = 1  # type: ignore[misc]


def test_select_keeps_rows_with_their_ids_in_the_order_given() -> None:
    table = small_table().select(["ü#", "x"])
    assert table.sample_ids == ("ü#", "x")
    assert table.presence.tolist() == [[True, True, True], [True, False, True]]


def test_tables_are_equal_when_everything_is() -> None:
    assert small_table() == small_table()
    assert small_table() == pickle.loads(pickle.dumps(small_table()))
    assert small_table() != small_table().select(["ü#", "y, z", "x"])
    assert small_table() != dataclasses.replace(small_table(), seed=1)
    assert small_table() != "table"


def test_all_problems_of_a_table_are_reported_at_once() -> None:
    presence = np.array([[True, False], [False, False], [True, False]])
    with pytest.raises(ConfigError) as caught:
        PresenceTable(("x", "y", "x"), ("a", "b,c"), presence, nominal_rates={"a": 0.1})
    message = str(caught.value)
    for part in (
        "5 problems",
        "more than once: 'x'",
        "no modality at all ('y')",
        "no sample has modality 'b,c'",
    ):
        assert part in message
    assert "modality 'b,c': a name must" in message
    assert "nominal_rates" in message


@pytest.mark.parametrize(
    ("ids", "names", "presence", "match"),
    [
        (("x",), ("a", "b"), np.ones((1, 2)), "presence is float64"),
        (
            ("x",),
            ("a", "b"),
            np.ones((2, 2), dtype=bool),
            r"shape \(2, 2\); pass bool, True = present, of shape \(1, 2\)",
        ),
        (("x",), ("a", "a"), np.ones((1, 2), dtype=bool), "named more than once"),
        (("x",), "ab", np.ones((1, 2), dtype=bool), "at least one name"),
        (("x", ""), ("a", "b"), np.ones((2, 2), dtype=bool), "non-empty printable"),
        (("x\n",), ("a", "b"), np.ones((1, 2), dtype=bool), "non-empty printable"),
        ((), ("a", "b"), np.ones((0, 2), dtype=bool), "there is no sample"),
    ],
)
def test_bad_tables_are_refused(ids: tuple, names: tuple, presence: np.ndarray, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        PresenceTable(ids, names, presence)


def test_from_array_refuses_anything_but_zero_and_one() -> None:
    with pytest.raises(ConfigError, match="other than 0 and 1"):
        PresenceTable.from_array([[1, 2]], ("a", "b"))


def test_describe_reports_nominal_beside_real_rates() -> None:
    text = draw_presence(10, {"a": 0.23, "b": 0.5}, seed=3).describe()
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines()}
    assert lines["a"] == ["0.230", "0.200", "8"]
    assert "seed 3" in text
    assert " - " in small_table().describe(), "no nominal rate is a dash, not a number"


# --- own file format


def test_saved_table_is_read_back_equal(tmp_path: Path) -> None:
    for table in (small_table(), draw_presence(["p,1", 'q"2', "#r"], {"T1+C": 1 / 3, "TE=8": 0.1}, seed=7)):
        table.save(tmp_path / "table.csv")
        assert PresenceTable.load(tmp_path / "table.csv") == table


def test_saved_file_is_plain_and_the_same_on_every_system(tmp_path: Path) -> None:
    draw_presence(["p1", "p2"], {"flair": 0.5, "t1ce": 0.0}, seed=0).save(tmp_path / "table.csv")
    lines = (tmp_path / "table.csv").read_bytes().decode().split("\n")
    assert lines[0].startswith("# passion-plugin presence table")
    assert lines[1:4] == ["# nominal_rates: flair=0.5,t1ce=0.0", "# seed: 0", "sample_id,flair,t1ce"]
    assert sorted(line[3:] for line in lines[4:6]) == ["0,1", "1,1"]


@pytest.mark.parametrize("start", ["", "\ufeff", "# my own remark\n# https://example.org: a\n"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_file_written_by_hand_is_read(tmp_path: Path, start: str, end: str) -> None:
    text = f'{start}sample_id,a,b\np1,1, 0\n\n"p,2",0,1\n'.replace("\n", end)
    (tmp_path / "table.csv").write_bytes(text.encode())
    table = PresenceTable.load(tmp_path / "table.csv")
    assert table.sample_ids == ("p1", "p,2")
    assert table.presence.tolist() == [[True, False], [False, True]]
    assert table.nominal_rates is None


def test_a_table_that_a_spreadsheet_saved_again_is_read(tmp_path: Path) -> None:
    table = draw_presence(["001", "002", "003"], {"flair": 0.0, "t1ce": 0.5, "t2": 0.5}, seed=3)
    table.save(tmp_path / "table.csv")
    lines = (tmp_path / "table.csv").read_text().splitlines()
    width = max(line.count(",") for line in lines)
    padded = [line + "," * (width - line.count(",")) for line in lines]
    quoted = [f'"{line}",,,' if line.startswith("#") else line for line in lines]
    for again in (padded, quoted):
        (tmp_path / "again.csv").write_text("\r\n".join([*again, "," * width, ""]))
        assert PresenceTable.load(tmp_path / "again.csv") == table


def test_all_problems_of_a_file_are_reported_with_line_numbers(tmp_path: Path) -> None:
    text = "# seed: os.system('x')\n# nominal_rates: a=0.1,b=none\nsample_id,a,b\n"
    text += "p1,1,2\np1,1\np2,yes,1\np3,0,1\n"
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(ConfigError) as caught:
        PresenceTable.load(tmp_path / "table.csv")
    message = str(caught.value)
    for part in ("line 1: seed", "line 2: nominal", "line 4:", "line 5:", "line 6:"):
        assert part in message
    assert "line 7" not in message


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "header"),
        (b"id,a,b\np1,1,1\n", "need sample_id"),
        (b"sample_id,a,b\n", "there is no sample"),
        (b"sample_id,a,b\np1,0,0\np2,1,1\n", "no modality at all"),
        (b"sample_id,a,b\np1,1,0\n", "no sample has modality 'b'"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b'sample_id,a,b\n"p1,1,0\n', "line 2: not CSV"),
        (b"sample_id,a,b\np1,1," + b"1" * 200_000, "line 2: not CSV"),
        (b"# nominal_rates: a=0.1,b=nan\nsample_id,a,b\np1,1,1\n", "nominal_rates is"),
        (b"# nominal_rates: a=0.1\nsample_id,a,b\np1,1,1\n", "nominal_rates is"),
        (b"# seed: -1\nsample_id,a,b\np1,1,1\n", "seed is -1"),
        (b"sample_id,a,a\np1,1,1\n", "more than once"),
    ],
)
def test_bad_files_are_refused_with_a_short_message(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(ConfigError, match=match) as caught:
        PresenceTable.load(tmp_path / "table.csv")
    assert len(str(caught.value)) < 1000


# --- drawing


@st.composite
def feasible_rates(draw: st.DrawFn) -> dict[str, float]:
    size = draw(st.integers(2, 6))
    rates = draw(st.lists(st.floats(0, 0.99), min_size=size, max_size=size))
    total = sum(rates)
    if total > size - 1:
        rates = [rate * (size - 1) / total for rate in rates]
    return {f"m{index}": rate for index, rate in enumerate(rates)}


@given(rates=feasible_rates(), count=st.integers(1, 60), seed=st.integers(0, 2**32))
def test_drawn_rates_are_within_one_sample_of_nominal_and_nobody_has_nothing(
    rates: dict[str, float], count: int, seed: int
) -> None:
    table = draw_presence(count, rates, seed=seed)
    assert table.presence.shape == (count, len(rates))
    assert table.presence.any(axis=1).all()
    assert table.presence.any(axis=0).all()
    for name, rate in rates.items():
        assert abs(table.missing_rates[name] - rate) <= 1 / count + 1e-9


@given(seed=st.integers(0, 2**32), count=st.integers(20, 80))
def test_drawn_counts_are_exactly_the_rounded_ones_where_that_is_possible(seed: int, count: int) -> None:
    table = draw_presence(count, RATES, seed=seed)
    assert table.counts == {name: count - math.floor(rate * count + 0.5) for name, rate in RATES.items()}


def test_tight_rates_leave_every_sample_with_exactly_one_modality() -> None:
    table = draw_presence(30, {"a": 2 / 3, "b": 2 / 3, "c": 2 / 3}, seed=1)
    assert (table.presence.sum(axis=1) == 1).all()
    assert set(table.counts.values()) == {10}


def test_modalities_are_missing_independently_where_nothing_needs_repair() -> None:
    # One sample in 10 000 would be empty: what is left is the noise of 8000 draws, 0.011 per pair.
    table = draw_presence(8000, {"a": 0.1, "b": 0.1, "c": 0.1, "d": 0.1}, seed=0)
    correlation = np.corrcoef(table.presence.T.astype(float))
    assert np.abs(correlation - np.eye(4)).max() < 0.04


def test_repair_touches_no_more_samples_than_it_must() -> None:
    # Independent draws leave 0.2 * 0.4 * 0.6 * 0.8 = 3.84 % empty. Each becomes a sample with one modality
    # and as many donors lose one modality, so singles grow by that share and by some of the donors.
    table = draw_presence(4000, RATES, seed=0)
    single = (table.presence.sum(axis=1) == 1).mean()
    independent = sum(
        (1 - rate) * math.prod(other for name, other in RATES.items() if name != own) for own, rate in RATES.items()
    )
    assert independent + 0.0384 - 0.02 < single < independent + 2 * 0.0384 + 0.02


def test_same_seed_same_table_other_seed_other_table() -> None:
    assert draw_presence(50, RATES, seed=4) == draw_presence(50, RATES, seed=4)
    one, two = draw_presence(50, RATES, seed=4), draw_presence(50, RATES, seed=5)
    assert not np.array_equal(one.presence, two.presence)
    assert one.counts == two.counts
    assert (one.seed, one.nominal_rates) == (4, RATES)


def test_mask_columns_follow_the_names_given() -> None:
    table = draw_presence(["p", "q", "r", "s", "t"], RATES, seed=0, modalities=("t2", "t1", "t1ce", "flair"))
    assert table.modalities == ("t2", "t1", "t1ce", "flair")
    assert table.counts == {"t2": 1, "t1": 2, "t1ce": 3, "flair": 4}
    assert table.sample_ids == ("p", "q", "r", "s", "t")


@pytest.mark.parametrize(
    ("samples", "rates", "extra", "match"),
    [
        (10, {"a": 0.6, "b": 0.6}, {}, r"sum to 1\.2, but at most 1"),
        (10, {"a": 1.0, "b": 0.0}, {}, "leave out a modality that nobody has"),
        (10, {"a": -0.1, "b": math.nan}, {}, "2 problems"),
        (10, {"a": "0.5", "b": 0.5}, {}, "need a number"),
        (
            10,
            {"t1c": 0.1, "t2": 0.1},
            {"modalities": ("t1ce", "t2")},
            "(?s)'t1c'.*Did you mean 't1ce'.*no rate",
        ),
        (0, {"a": 0.1, "b": 0.1}, {}, "at least one"),
        ("case", {"a": 0.1, "b": 0.1}, {}, "pass a list of ids"),
        (["p", "p"], {"a": 0.1, "b": 0.1}, {}, "more than once"),
        (10, {}, {}, "rates={}; pass a rate for each modality"),
        (10, {"a": 0.1, "b": 0.1}, {"seed": None}, "seed=None"),
    ],
)
def test_impossible_draws_are_refused(samples: object, rates: dict, extra: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        draw_presence(samples, rates, **{"seed": 0, **extra})
