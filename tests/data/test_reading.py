"""Files are read as data or refused: presence tables, split files, results and lists of names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from passion_plugin.cli import main
from passion_plugin.data import PresenceTable, read_split_csv, write_split_csv
from passion_plugin.errors import ConfigError, PassionError
from passion_plugin.evaluation import SubsetResults

NAMES = ("flair", "t1ce", "t1", "t2")
SPLIT = 'data_name,mask_id,mask,pos_mask_ids\ncase,14,"[True, True, True, True]","[{all}]"\n'.format(
    all=", ".join(map(str, range(15)))
)
TABLE = "# seed: 3\n# nominal_rates: a=0.5,b=0.0\nsample_id,a,b\np1,1,1\np2,0,1\n"
RESULTS = (
    "subset,has_t1,has_t2,sample,target,metric,value,status,unit,both_empty,one_empty\n"
    "t1,1,0,p1,WT,dice,0.5,ok,fraction,,0.0\n"
    "t1+t2,1,1,p1,WT,dice,,both empty,fraction,,0.0\n"
)

Reader = Callable[[Path], Any]
READERS: dict[str, tuple[Reader, str]] = {
    "split": (lambda path: read_split_csv(path, NAMES), SPLIT),
    "table": (PresenceTable.load, TABLE),
    "results": (SubsetResults.from_csv, RESULTS),
}
each_reader = pytest.mark.parametrize("name", sorted(READERS))


def read(name: str, path: Path, content: bytes | None = None) -> Any:
    if content is not None:
        path.write_bytes(content)
    return READERS[name][0](path)


def refusal(name: str, path: Path, content: bytes) -> str:
    """Message of the error that reading must raise: ours, short, and with the name of the file in it."""
    with pytest.raises(ConfigError) as caught:
        read(name, path, content)
    message = str(caught.value)
    assert path.name in message
    assert len(message) < 5000
    return message


@each_reader
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
def test_a_byte_order_mark_and_any_line_end_change_nothing(name: str, end: str, tmp_path: Path) -> None:
    text = READERS[name][1]
    plain = read(name, tmp_path / "plain.csv", text.encode())
    assert read(name, tmp_path / "marked.csv", ("\ufeff" + text.replace("\n", end)).encode()) == plain


@each_reader
@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_another_encoding_is_refused(name: str, encoding: str, tmp_path: Path) -> None:
    content = READERS[name][1].replace("p1", "pé").replace("case", "casé").encode(encoding)
    assert "not UTF-8 text" in refusal(name, tmp_path / "file.csv", content)


@each_reader
def test_a_missing_file_and_a_folder_are_errors_of_the_system(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(name, tmp_path / "nothing.csv")
    with pytest.raises(OSError, match=r"directory|Permission"):
        read(name, tmp_path)


@each_reader
def test_a_row_that_comes_twice_is_refused(name: str, tmp_path: Path) -> None:
    text = READERS[name][1]
    assert "more than once" in refusal(name, tmp_path / "file.csv", (text + text.splitlines()[-1] + "\n").encode())


@each_reader
def test_a_stray_quote_spoils_its_line_only_and_many_are_a_short_message(name: str, tmp_path: Path) -> None:
    text = READERS[name][1]
    message = refusal(name, tmp_path / "file.csv", (text + '"\n' * 1000).encode())
    assert f"line {text.count(chr(10)) + 1}: not CSV" in message
    assert "and 980 more" in message


@pytest.mark.parametrize("value", ["nan", "inf", "1e999", "0x1", "True", "[0.5]", "__import__('os')"])
def test_a_score_must_be_a_finite_number(value: str, tmp_path: Path) -> None:
    message = refusal("results", tmp_path / "file.csv", RESULTS.replace(",0.5,", f",{value},").encode())
    assert "line 2:" in message


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        (",ok,", ",fine,", "status is 'fine'"),
        ("has_t1", "has_t2", "more than once"),
        ("t1,1,0,p1", "t1,1,0", "line 2:"),
        ("t1,1,0,p1", "t1,1,0,p1,p1", "line 2:"),
        ("empty,fraction", "empty,mm", "line 3: 'dice' has another convention"),
        ("WT,dice,0.5", '"W\nT",dice,0.5', "not CSV"),
    ],
)
def test_results_that_contradict_themselves_are_refused(old: str, new: str, match: str, tmp_path: Path) -> None:
    assert match in refusal("results", tmp_path / "file.csv", RESULTS.replace(old, new, 1).encode())


IDS = ("-1", "=A1", "../../etc/passwd", "C:\\x", "a;b", "<b>", "p (2)", "ü", "p,1", 'p"1', "#1")


@pytest.mark.parametrize("sample", IDS)
def test_ids_are_kept_to_the_letter_and_never_used_as_paths(
    sample: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table = PresenceTable.from_array([[1, 1, 1, 1]], NAMES, [sample])
    table.save("table.csv")
    assert PresenceTable.load("table.csv") == table
    write_split_csv(table, "split.csv")
    assert read_split_csv("split.csv", NAMES) == table
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["split.csv", "table.csv"]


@pytest.mark.parametrize("seed", ["9" * 5000, "1.0", "0x10", "None"])
def test_a_seed_that_is_no_whole_number_is_refused(seed: str, tmp_path: Path) -> None:
    assert "line 1: seed" in refusal("table", tmp_path / "file.csv", TABLE.replace("seed: 3", f"seed: {seed}").encode())


@pytest.fixture
def split_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command on a file of names: exit code and lines of errors."""
    monkeypatch.chdir(tmp_path)

    def command(content: bytes | str) -> tuple[int, list[str]]:
        path = content if isinstance(content, str) else "names.txt"
        if isinstance(content, bytes):
            Path(path).write_bytes(content)
        code = main(["split", path, "--rates", "a=0.5,b=0", "--seed", "0", "--table", "out.csv"])
        return code, capsys.readouterr().err.splitlines()

    return command


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"p1\np\x002\n", "printable"),
        ("p1\np2\n".encode("utf-16"), "not UTF-8 text"),
        (b"p1\n" * 1000, "more than once: 'p1'"),
        (".", "Is a directory"),
        ("missing.txt", "No such file"),
    ],
    ids=["nul", "encoding", "repeated", "folder", "missing"],
)
def test_a_list_of_names_is_checked_like_a_table(split_command: Any, content: Any, match: str) -> None:
    code, errors = split_command(content)
    assert code == 2
    assert match in errors[0]
    assert len(errors[0]) < 300
    assert not Path("out.csv").exists()


def test_a_list_of_names_may_have_a_byte_order_mark(split_command: Any) -> None:
    assert split_command("\ufeffp1\r\np2\r\n".encode()) == (0, [])
    assert PresenceTable.load("out.csv").sample_ids == ("p1", "p2")


PIECES = st.sampled_from([*'",\n\r#[]=+-@\0;', "True", "\ufeff", "1", "0", "sample_id", "1e999", "seed:", "x" * 300])


@given(data=st.data(), name=st.sampled_from(sorted(READERS)))
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_whatever_is_in_a_file_it_is_read_or_refused(tmp_path: Path, data: st.DataObject, name: str) -> None:
    """Any bytes, and right files with pieces put in, cut out and doubled."""
    text = READERS[name][1]
    if data.draw(st.booleans()):
        content = data.draw(st.binary(max_size=200))
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(text))] * 2)))
            text = text[:start] + data.draw(st.sampled_from(["", text[start:stop] * 2]) | PIECES) + text[stop:]
        content = text.encode()
    path = tmp_path / "file.csv"
    path.write_bytes(content)
    found, message = None, ""
    try:
        found = read(name, path)
    except PassionError as error:
        message = str(error)
    assert len(message) < 5000
    if found is not None:
        save = {"split": lambda: write_split_csv(found, path), "table": lambda: found.save(path)}
        save.get(name, lambda: found.to_csv(path))()
        assert read(name, path) == found
