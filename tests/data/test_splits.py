"""Split files of the published code: exact format, nothing evaluated."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from passion_plugin.data import PresenceTable, read_split_csv, write_split_csv
from passion_plugin.errors import ConfigError

NAMES = ("flair", "t1ce", "t1", "t2")
HEADER = "data_name,mask_id,mask,pos_mask_ids\r\n"
# Two rows as the published files have them, and one of each other kind.
ROWS = [
    'Brats18_2013_0_1,1,"[False, True, False, False]",[1]',
    'HG_BraTS20_Training_002,10,"[True, True, True, False]","[1, 2, 3, 5, 6, 9, 10]"',
    'case_c,8,"[True, False, False, True]","[0, 3, 8]"',
    'case_d,14,"[True, True, True, True]","[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]"',
]


def write(path: Path, *rows: str, header: str = HEADER, end: str = "\r\n") -> Path:
    path.write_bytes((header + "".join(row + end for row in rows)).encode())
    return path


def test_published_rows_are_read(tmp_path: Path) -> None:
    table = read_split_csv(write(tmp_path / "split.csv", *ROWS), NAMES)
    assert table.modalities == NAMES
    assert table.sample_ids == ("Brats18_2013_0_1", "HG_BraTS20_Training_002", "case_c", "case_d")
    assert table.presence.astype(int).tolist() == [[0, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1], [1, 1, 1, 1]]


def test_published_rows_are_written_byte_for_byte(tmp_path: Path) -> None:
    path = write(tmp_path / "split.csv", *ROWS)
    write_split_csv(read_split_csv(path, NAMES), tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == path.read_bytes()


def test_all_fifteen_masks_survive_and_reach_exactly_their_subsets(tmp_path: Path) -> None:
    masks = [mask for mask in itertools.product([False, True], repeat=4) if any(mask)]
    table = PresenceTable.from_array(np.array(masks), NAMES)
    write_split_csv(table, tmp_path / "split.csv")
    assert np.array_equal(read_split_csv(tmp_path / "split.csv", NAMES).presence, table.presence)
    lines = (tmp_path / "split.csv").read_text().splitlines()[1:]
    ids = [int(line.split(",")[1]) for line in lines]
    assert sorted(ids) == list(range(15))
    for line, mask in zip(lines, masks, strict=True):
        reachable = {int(number) for number in line.rsplit("[", 1)[1].strip(']"').split(", ")}
        subsets = [
            number
            for number, other in zip(ids, masks, strict=True)
            if all(b <= a for a, b in zip(mask, other, strict=True))
        ]
        assert reachable == set(subsets)


@given(st.lists(st.integers(1, 15), min_size=1, max_size=20))
def test_every_table_of_four_modalities_makes_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, codes: list[int]
) -> None:
    presence = np.array([[bool(code >> bit & 1) for bit in range(4)] for code in [*codes, 15]])
    table = PresenceTable.from_array(presence, NAMES, [f"case, {index}" for index in range(len(presence))])
    path = tmp_path_factory.getbasetemp() / "round.csv"
    write_split_csv(table, path)
    assert read_split_csv(path, NAMES) == table


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_byte_order_mark_and_either_line_end_are_accepted(tmp_path: Path, start: str, end: str) -> None:
    path = write(tmp_path / "split.csv", *ROWS, header=start + HEADER.replace("\r\n", end), end=end)
    assert len(read_split_csv(path, NAMES)) == 4


def test_booleans_as_numpy_2_prints_them_are_accepted(tmp_path: Path) -> None:
    row = 'case,8,"[np.True_, np.False_, np.False_, np.True_]","[0, 3, 8]"'
    assert read_split_csv(write(tmp_path / "split.csv", row, ROWS[3]), NAMES)["case"].tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ("c,1,\"__import__('os').system('touch owned')\",[1]", "mask is"),
        ('c,1,"[False, True, False, False]","[__import__(\'os\').getpid()]"', "pos_mask_ids is"),
        ('c,open("owned"),"[False, True, False, False]",[1]', "mask_id is"),
        ('c,1,"[False, True, False, 9**9**9**9]",[1]', "mask is"),
        ('c,1,"[False, True, False]",[1]', "four booleans"),
        ('c,1,"[False, True, False, False, False]",[1]', "four booleans"),
        ('c,1,"(False, True, False, False)",[1]', "four booleans"),
        ('c,1,"[0, 1, 0, 0]",[1]', "four booleans"),
        ('c,1,"[False, True, False, False]\n",[1]', "line 2"),
        (
            'c,2,"[False, True, False, False]",[1]',
            r"mask_id is '2', but that of \[False, True, False, False\] is 1",
        ),
        ('c,15,"[True, True, True, True]",[1]', "is 14"),
        ('c,-1,"[True, True, True, True]",[1]', "is 14"),
        ('c,१,"[False, True, False, False]",[1]', "is 1"),
        ('c,1,"[False, True, False, False]","[1, 2]"', r"subsets of .* are \[1\]"),
        ('c,1,"[False, True, False, False]",[]', "pos_mask_ids is"),
        ('c,0,"[False, False, False, False]",[0]', "the sample has nothing"),
        ("c,1", "2 cells, need 4"),
        ('c,1,"[False, True, False, False]",[1],more', "5 cells, need 4"),
        (',1,"[False, True, False, False]",[1]', "non-empty printable"),
        ('c,1,"[False, True, False, False],[1]', "not CSV"),
        ('c,1,"' + "[" * 9000 + '",[1]', "mask is"),
        ("c,1," + "x" * 1_000_000 + ",[1]", "line 2: not CSV"),
    ],
)
def test_broken_rows_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str, match: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "split.csv", row, ROWS[3])
    with pytest.raises(ConfigError, match=match) as caught:
        read_split_csv(path, NAMES)
    assert len(str(caught.value)) < 1000
    assert not (tmp_path / "owned").exists()


def test_all_bad_rows_are_reported_with_line_numbers_but_not_without_end(tmp_path: Path) -> None:
    rows = ['c,2,"[False, True, False, False]",[1]', ROWS[0], 'c,1,"[no]",[x]']
    with pytest.raises(ConfigError) as caught:
        read_split_csv(write(tmp_path / "split.csv", *rows), NAMES)
    assert [f"line {line}:" in str(caught.value) for line in (2, 3, 4)] == [True, False, True]
    with pytest.raises(ConfigError, match="and 480 more"):
        read_split_csv(write(tmp_path / "split.csv", *['c,2,"[no]",[1]'] * 500), NAMES)


@pytest.mark.parametrize("header", ["", "name,mask_id,mask,pos_mask_ids\n", "data_name;mask_id;mask;pos_mask_ids\n"])
def test_other_headers_are_refused(tmp_path: Path, header: str) -> None:
    with pytest.raises(ConfigError, match=r"the header is .* need data_name,mask_id,mask,pos_mask_ids"):
        read_split_csv(write(tmp_path / "split.csv", header=header), NAMES)


def test_repeated_sample_and_modality_nobody_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)split\.csv.*more than once.*no sample has modality"):
        read_split_csv(write(tmp_path / "split.csv", ROWS[0], ROWS[0]), NAMES)


@pytest.mark.parametrize("names", [("ct", "pet", "t1"), ("a", "b", "c", "d", "e"), ("a", "a", "b", "c"), "abcd"])
def test_format_is_for_four_named_modalities_only(tmp_path: Path, names: tuple[str, ...]) -> None:
    path = write(tmp_path / "split.csv", *ROWS)
    with pytest.raises(ConfigError, match=r"exactly four|more than once|at least one name"):
        read_split_csv(path, names)


def test_table_of_three_modalities_cannot_be_written(tmp_path: Path) -> None:
    table = PresenceTable.from_array([[1, 1, 1]], ("ct", "pet", "t1"))
    with pytest.raises(ConfigError, match=r"PresenceTable\.save"):
        write_split_csv(table, tmp_path / "split.csv")
    assert not (tmp_path / "split.csv").exists()
