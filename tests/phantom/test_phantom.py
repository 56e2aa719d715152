"""The phantom: reproducible, and its contrasts say what the physics says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from passion_plugin.phantom import (
    CLASSES,
    MODALITIES,
    PROTOCOL,
    TISSUES,
    PhantomDataset,
    Tissue,
    inversion_recovery,
    make_case,
    spin_echo,
    spoiled_gradient_echo,
    standardise,
)

SHAPE = (32, 36, 40)
FLAIR, T1CE, T1, T2 = range(4)


@pytest.fixture(scope="module")
def cases() -> list[tuple[np.ndarray, np.ndarray]]:
    return [make_case(seed, SHAPE) for seed in range(8)]


def test_a_seed_gives_the_same_case_and_another_seed_another() -> None:
    first, second, other = make_case(3, SHAPE), make_case(3, SHAPE), make_case(4, SHAPE)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_shapes_dtypes_and_values(cases: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for image, label in cases:
        assert image.shape == (4, *SHAPE)
        assert image.dtype == np.float32
        assert label.shape == SHAPE
        assert label.dtype == np.int64
        assert np.isfinite(image).all()
        assert image.min() >= 0


def test_every_case_has_every_part_and_a_lesion_is_a_small_part_of_the_volume(
    cases: list[tuple[np.ndarray, np.ndarray]],
) -> None:
    for _, label in cases:
        counts = np.bincount(label.ravel(), minlength=4)
        assert len(counts) == len(CLASSES) == 4
        assert (counts > 0).all()
        assert 0.01 < (label > 0).mean() < 0.25


def test_background_outside_the_brain_is_zero_in_all_modalities_and_never_labelled(
    cases: list[tuple[np.ndarray, np.ndarray]],
) -> None:
    for image, label in cases:
        outside = (image == 0).all(axis=0)
        assert 0.2 < outside.mean() < 0.9
        assert ((image == 0).any(axis=0) == outside).all()
        assert (label[outside] == 0).all()


def test_physics_orders_the_tissues_as_radiologists_expect() -> None:
    signal = {m: {name: f(tissue) for name, tissue in TISSUES.items()} for m, f in PROTOCOL.items()}
    assert signal["t1"]["white"] > signal["t1"]["grey"] > signal["t1"]["csf"]
    assert signal["t2"]["csf"] > signal["t2"]["oedema"] > signal["t2"]["grey"] > signal["t2"]["white"]
    assert signal["flair"]["oedema"] > 1.5 * signal["flair"]["grey"]
    assert signal["flair"]["csf"] < 0.05 * signal["flair"]["white"]
    assert signal["t1ce"]["enhancing"] > 1.4 * signal["t1ce"]["white"]
    assert signal["t1"]["enhancing"] < signal["t1"]["white"]
    # Contrast agent changes only what takes it up.
    unchanged = [name for name, tissue in TISSUES.items() if not tissue.uptake]
    assert [signal["t1ce"][name] for name in unchanged] == [signal["t1"][name] for name in unchanged]


def test_distractors_are_ambiguous_in_the_modality_they_are_made_for() -> None:
    def signal(modality: str, name: str) -> float:
        return PROTOCOL[modality](TISSUES[name])

    assert signal("t2", "csf") == pytest.approx(signal("t2", "necrosis"), rel=0.1)
    assert signal("flair", "necrosis") == pytest.approx(signal("flair", "white"), rel=0.1)
    assert signal("flair", "gliosis") > 1.5 * signal("flair", "grey")
    assert signal("t1ce", "blood") == pytest.approx(signal("t1ce", "enhancing"), rel=0.1)
    assert signal("t1", "blood") > 2 * signal("t1", "enhancing")
    assert signal("t1ce", "vessel") > signal("t1ce", "enhancing")


def test_signal_equations_by_hand() -> None:
    # exp(-TR / T1) = 1/2 and no T2 decay.
    tissue = Tissue(pd=0.8, t1=100 / math.log(2), t2=1e12)
    assert spin_echo(tissue, tr=100, te=10) == pytest.approx(0.8 * 0.5)
    # At TI = T1 ln 2 and a long TR the inversion is just passing through zero.
    assert inversion_recovery(tissue, tr=1e9, te=10, ti=100) == pytest.approx(0, abs=1e-9)
    assert spoiled_gradient_echo(tissue, tr=100, te=0, flip=90) == pytest.approx(0.8 * 0.5)
    assert Tissue(1, 1000, 100, uptake=0.5).enhanced(4).t1 == pytest.approx(1000 / 3)


def test_measured_contrasts_of_lesion_parts(cases: list[tuple[np.ndarray, np.ndarray]]) -> None:
    # White matter is not labelled; unlabelled voxels bright in T1 and dark in T2 are white matter.
    for image, label in cases:
        plain = (label == 0) & (image[0] > 0)
        dark = image[T2] < np.quantile(image[T2][plain], 0.4)
        white = plain & dark

        def median(modality: int, where: np.ndarray, image: np.ndarray = image) -> float:
            return float(np.median(image[modality][where]))

        assert median(FLAIR, label == 2) > 1.4 * median(FLAIR, white)
        assert median(T2, label == 2) > 1.4 * median(T2, white)
        assert median(T1CE, label == 2) < 1.1 * median(T1CE, white)
        assert median(T1CE, label == 3) > 1.15 * median(T1CE, white)
        assert median(T1, label == 3) < median(T1, white)


def test_noise_is_the_share_of_white_matter_that_was_asked_for() -> None:
    clean, label = make_case(0, SHAPE, noise=0.0)
    noisy, same = make_case(0, SHAPE, noise=0.1)
    assert np.array_equal(label, same)
    inside = clean[T2] > np.median(clean[T2][clean[T2] > 0])
    white = 1000 * PROTOCOL["t2"](TISSUES["white"])
    gain = np.median(noisy[T2][inside] / clean[T2][inside])
    spread = float((noisy[T2] - clean[T2])[inside].std())
    assert gain == pytest.approx(1, abs=0.05)
    assert 0.8 * 0.1 * white < spread < 1.25 * 0.1 * white


@pytest.mark.parametrize("shape", [(32, 32), (8, 32, 32), ()])
def test_a_shape_that_is_too_small_or_not_3d_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="three sizes of at least 16"):
        make_case(0, shape)


def test_standardise_uses_only_the_modality_itself() -> None:
    image, _ = make_case(0, (16, 16, 16))
    alone = standardise(image[:1])
    damaged = image.copy()
    damaged[1:] = np.nan
    assert np.array_equal(standardise(image)[:1], alone)
    assert np.array_equal(standardise(damaged)[:1], alone)
    inside = image[0] != 0
    assert alone[0][inside].mean() == pytest.approx(0, abs=1e-5)
    assert alone[0][inside].std() == pytest.approx(1, abs=1e-4)
    assert (alone[0][~inside] == 0).all()
    assert (standardise(np.zeros_like(image)) == 0).all()


def test_dataset_items() -> None:
    data = PhantomDataset(3, (16, 16, 16), seed=2)
    item = data[2]
    image, label = make_case(2002, (16, 16, 16))
    assert item["id"] == "phantom_2002"
    assert torch.equal(item["image"], torch.from_numpy(standardise(image)))
    assert torch.equal(item["label"], torch.from_numpy(label))
    assert [entry["id"] for entry in data] == data.ids
    assert len(data) == 3
    assert data[-1]["id"] == data[2]["id"]
    with pytest.raises(IndexError):
        data[3]


def test_changing_an_item_in_place_does_not_change_the_dataset() -> None:
    data = PhantomDataset(1, (16, 16, 16))
    before = data[0]["image"].clone()
    data[0]["image"].zero_()
    assert torch.equal(data[0]["image"], before)


def test_data_sets_of_different_seeds_share_no_patient() -> None:
    assert not set(PhantomDataset(1000, seed=0).ids) & set(PhantomDataset(1000, seed=1).ids)
    with pytest.raises(ValueError, match="1 to 1000"):
        PhantomDataset(1001)


def test_modalities_are_named_in_channel_order() -> None:
    assert MODALITIES == tuple(PROTOCOL) == ("flair", "t1ce", "t1", "t2")
