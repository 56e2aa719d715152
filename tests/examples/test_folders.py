"""Patients from folders: the formats, and what is said about folders that are not as they should be."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from examples import demo, floors
from examples.experiment.__main__ import main
from examples.folders import load_cohort, ms4_cohort, sts_cohort, sts_slices
from passion_plugin.errors import ConfigError
from patients import change, fake_ms4, fake_sts


def test_a_wrong_data_argument_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"index\.json.*neither"):
        load_cohort(str(tmp_path))
    with pytest.raises(ConfigError, match="no such folder"):
        load_cohort(str(tmp_path / "nowhere"))


def test_sts_folder_is_decoded_as_documented(tmp_path: Path) -> None:
    fake_sts(tmp_path)
    cohort = load_cohort(str(tmp_path), fold=1)
    assert cohort.test.ids == ["sts_001", "sts_003"]
    assert cohort.train.ids == ["sts_000", "sts_002"]
    item = cohort.train[0]
    assert item["image"].shape == (3, 24, 16, 24)
    with np.load(tmp_path / "sts_000.npz") as file:
        ct, pet = file["ct"].astype(float), file["pet"].astype(float)
        hounsfield = item["image"][0, :20, :13, :18] * 100 - 200
        assert np.allclose(hounsfield, 2 * ct - 200, atol=1e-3)
        suv = item["image"][1, :20, :13, :18].double() ** 2
        assert np.allclose(suv, 30 * (pet / 255) ** 2, atol=1e-3)
        assert np.array_equal(item["label"][:20, :13, :18], file["gtv"])
    assert item["image"][2, :5].abs().sum() == 0
    assert item["image"][:, 20:].abs().sum() == 0
    with pytest.raises(ConfigError, match="fold 7"):
        sts_cohort(tmp_path, 7)


def test_held_out_patients_are_tested_and_all_others_trained_on(tmp_path: Path) -> None:
    fake_sts(tmp_path / "known")
    fake_sts(tmp_path / "new", "other")
    cohort = sts_slices(tmp_path / "known", 1, tmp_path / "new")
    assert cohort.train.ids == [f"sts_{i:03d}" for i in range(4)]
    assert cohort.test.ids == [f"other_{i:03d}" for i in range(4)]
    assert cohort.test[3]["image"].shape == (3, 20, 13, 18)
    with pytest.raises(ConfigError, match="sts_000, sts_001, sts_002 are in both folders"):
        sts_slices(tmp_path / "known", 0, tmp_path / "known")
    with pytest.raises(ConfigError, match=r"no \*\.npz files"):
        sts_slices(tmp_path / "known", 0, tmp_path)


@pytest.mark.data
def test_real_folders_can_be_read() -> None:
    if "PASSION_DATA" not in os.environ:
        pytest.skip("PASSION_DATA is not set: the real patients are not part of the repository")
    folder = Path(os.environ["PASSION_DATA"])
    sts = sts_cohort(folder / "sts", 0)
    ms4 = ms4_cohort(folder / "ms4")
    assert len(sts.train.ids) + len(sts.test.ids) == 35
    assert len(ms4.train.ids) == 2
    for cohort in (sts, ms4):
        item = cohort.test[0]
        assert item["image"].shape == (len(cohort.modalities), *item["label"].shape)
        assert torch.isfinite(item["image"]).all()
        assert item["label"].unique().tolist() == [0, 1]
        assert all(size % 8 == 0 for size in item["label"].shape)


def test_the_last_of_the_ms_files_is_tested_on(tmp_path: Path) -> None:
    fake_ms4(tmp_path)
    cohort = ms4_cohort(tmp_path)
    assert (cohort.train.ids, cohort.test.ids) == (["ms_1", "ms_2"], ["ms_3"])
    with np.load(tmp_path / "ms_3.npz") as file:
        assert np.array_equal(cohort.test[0]["label"][:9, :12, :10], file["lesion"])
        inside = cohort.test[0]["image"][1, :9, :12, :10].numpy()
        assert np.corrcoef(inside.ravel(), file["t1c"].ravel())[0, 1] > 0.9


def refused(data: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What the experiment says about a folder, without having started to train."""
    results = data.parent / "results"
    with pytest.raises(SystemExit) as stopped:
        main(["--data", str(data), "--results", str(results), "--steps", "1", *options])
    assert stopped.value.code == 2
    assert not results.exists()
    return capsys.readouterr().err


def listing(folder: Path, content: str) -> None:
    (folder / "index.json").write_text(content)


VOLUME = np.zeros((20, 13, 18), dtype=np.uint8)
BROKEN: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no mtv, no spacing": (
        lambda folder: change(folder / "sts_001.npz", mtv=None, spacing=None),
        ["sts_001.npz: mtv, spacing missing; it has", "gtv", "ct, pet, t1, gtv, mtv, arrays (z, y, x), and spacing"],
    ),
    "several at once": (
        lambda folder: [change(folder / f"sts_00{i}.npz", pet=None) for i in (0, 3)],
        ["2 problems", "sts_000.npz: pet missing", "sts_003.npz: pet missing"],
    ),
    "no file": (lambda folder: (folder / "sts_002.npz").unlink(), ["sts_002.npz: there is no such file"]),
    "text": (lambda folder: (folder / "sts_002.npz").write_text("text"), ["sts_002.npz: not an .npz file"]),
    "empty": (lambda folder: (folder / "sts_002.npz").write_bytes(b""), ["sts_002.npz: not an .npz file"]),
    "cut short": (
        lambda folder: (folder / "sts_002.npz").write_bytes((folder / "sts_002.npz").read_bytes()[:5000]),
        ["sts_002.npz: not an .npz file"],
    ),
    "other shapes": (
        lambda folder: change(folder / "sts_001.npz", pet=VOLUME[:19]),
        ["sts_001.npz: arrays must be (z, y, x), all of one shape", "pet (19, 13, 18)", "ct (20, 13, 18)"],
    ),
    "two axes": (
        lambda folder: change(folder / "sts_001.npz", **dict.fromkeys(("ct", "pet", "t1", "gtv", "mtv"), VOLUME[0])),
        ["ct (13, 18)"],
    ),
    "pickled": (
        lambda folder: change(folder / "sts_001.npz", ct=np.array([None])),
        ["sts_001.npz: not an .npz file that can be read (ValueError"],
    ),
    "text in an array": (
        lambda folder: change(folder / "sts_001.npz", ct=VOLUME.astype("U1")),
        ["sts_001.npz: ct has dtype <U1"],
    ),
    "nan": (
        lambda folder: change(folder / "sts_001.npz", ct=np.full(VOLUME.shape, np.nan)),
        ["sts_001.npz: ct has values that are NaN"],
    ),
    "outline of 255": (
        lambda folder: change(folder / "sts_001.npz", gtv=VOLUME + 255),
        ["sts_001.npz: gtv has values other than the whole numbers 0 to 1"],
    ),
    "spacing": (
        lambda folder: change(folder / "sts_001.npz", spacing=np.array([1.0, 0])),
        ["sts_001.npz: spacing must be three positive numbers", "[1.0, 0.0]"],
    ),
    "list": (lambda folder: listing(folder, "[]"), ["index.json must hold", "no subjects found, but a list"]),
    "other keys": (lambda folder: listing(folder, '{"patients": {}}'), ["no subjects found, but the keys patients"]),
    "no patients": (lambda folder: listing(folder, '{"subjects": {}}'), ["no subjects found"]),
    "no fold": (
        lambda folder: listing(folder, '{"subjects": {"a": {}, "b": {"fold": "0"}, "c": {"fold": true}, "d": 1}}'),
        ["4 problems", "the fold of 'a' is None", "the fold of 'b' is '0'", "the fold of 'c' is True"],
    ),
    "one fold": (lambda folder: listing(folder, '{"subjects": {"a": {"fold": 0}}}'), ["has the folds [0]"]),
    "no json": (lambda folder: listing(folder, "{"), ["index.json must hold", "JSONDecodeError"]),
    "no text": (lambda folder: (folder / "index.json").write_bytes(b"\xff"), ["index.json", "UnicodeDecodeError"]),
    "endless": (lambda folder: listing(folder, "[" * 100_000), ["index.json must hold", "RecursionError"]),
}


@pytest.mark.parametrize(("spoil", "expected"), BROKEN.values(), ids=BROKEN)
def test_a_folder_that_is_not_as_described_is_refused_before_training(
    spoil: Callable[[Path], object], expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "patients"
    fake_sts(folder)
    spoil(folder)
    message = refused(folder, capsys)
    for part in (f"--data '{folder}'", *expected):
        assert part in message
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--data", str(folder), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    for part in expected:
        assert part in message
    assert not (tmp_path / "out").exists()


def test_floors_refuse_a_bad_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_sts(tmp_path)
    monkeypatch.setattr("sys.argv", ["floors", str(tmp_path)])
    with pytest.raises(SystemExit):
        floors.main()
    assert "fold 2" in capsys.readouterr().err, "five folds are needed, here are two"


def test_held_out_patients_are_checked_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake_sts(tmp_path / "known")
    fake_sts(tmp_path / "new", "other")
    change(tmp_path / "new" / "other_002.npz", gtv=None)
    message = refused(tmp_path / "known", capsys, "--held-out", str(tmp_path / "new"))
    assert "--held-out" in message
    assert "other_002.npz: gtv missing" in message


def test_ms_files_are_checked_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "patients"
    folder.mkdir()
    fake_ms4(folder)
    change(folder / "ms_2.npz", t1c=None)
    assert "ms_2.npz: t1c missing" in refused(folder, capsys)
    (folder / "ms_2.npz").unlink()
    (folder / "ms_3.npz").unlink()
    assert "ms_1 is alone" in refused(folder, capsys)


def test_ms_files_have_one_fold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "patients"
    folder.mkdir()
    fake_ms4(folder)
    assert "fold 1: ms_*.npz files have fold 0 alone, with ms_3 as its test" in refused(
        folder, capsys, "--folds", "0", "1"
    )
    with pytest.raises(SystemExit):
        demo.main(["--data", str(folder), "--fold", "1"])
    assert "fold 0 alone" in capsys.readouterr().err
