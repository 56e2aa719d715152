"""The reference networks, the data of the examples and the demo."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from examples import demo, floors, three_lines
from examples.backbones import BACKBONES, rfnet_spec
from examples.backbones.blocks import keep_present
from examples.backbones.uhemis_like import mean_and_variance
from examples.data import Cases, RandomPatches, pad_to, phantom_cohort
from examples.folders import sts_cohort
from examples.training import criterion, train
from passion_plugin.config import PassionConfig
from passion_plugin.data import draw_presence
from passion_plugin.losses import dice_loss, weighted_cross_entropy
from passion_plugin.wrapper import PassionWrapper
from patients import fake_sts

NAMES = ("ct", "pet", "t1")
SUBSETS = [[True, False, False], [False, True, True], [True, True, True]]


def network(name: str, ndim: int = 2) -> nn.Module:
    torch.manual_seed(0)
    model = BACKBONES[name](NAMES, num_classes=3, ndim=ndim, widths=(4, 4, 8, 8))
    if name == "rfnet":
        model.is_training = True
    return model


def tensors(output: object) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else [t for part in output for t in tensors(part)]


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("name", BACKBONES)
class TestBackbone:
    def test_logits_have_the_shape_of_the_input_at_any_multiple_of_8(self, name: str, ndim: int) -> None:
        model = network(name, ndim)
        for shape in ((16,) * ndim, (24, 16, 32)[:ndim]):
            logits = tensors(model(torch.randn(2, 3, *shape), torch.ones(2, 3, dtype=torch.bool)))[0]
            assert logits.shape == (2, 3, *shape)

    def test_content_of_an_absent_modality_changes_nothing_bit_for_bit(self, name: str, ndim: int) -> None:
        model = network(name, ndim)
        mask = torch.tensor(SUBSETS[:2])
        x = torch.randn(2, 3, *[16] * ndim)
        outputs = []
        for garbage in (0.0, 7.0, math.nan, math.inf):
            filled = x.clone()
            filled[~mask] = garbage
            outputs.append(tensors(model(filled, mask)))
        for other in outputs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(outputs[0], other, strict=True))

    def test_a_present_modality_changes_the_output(self, name: str, ndim: int) -> None:
        model = network(name, ndim)
        x = torch.randn(1, 3, *[16] * ndim)
        mask = torch.ones(1, 3, dtype=torch.bool)
        before = tensors(model(x, mask))[0]
        for m in range(3):
            changed = x.clone()
            changed[:, m] = torch.randn_like(changed[:, m])
            assert not torch.allclose(tensors(model(changed, mask))[0], before)

    def test_every_subset_gives_finite_logits_and_a_different_prediction(self, name: str, ndim: int) -> None:
        model = network(name, ndim)
        x = torch.randn(1, 3, *[16] * ndim).expand(7, -1, *[-1] * ndim)
        masks = torch.tensor([[bool(i & 1), bool(i & 2), bool(i & 4)] for i in range(1, 8)])
        logits = tensors(model(x, masks))[0]
        assert torch.isfinite(logits).all()
        for i in range(7):
            for j in range(i):
                assert not torch.allclose(logits[i], logits[j])

    def test_a_batch_of_mixed_masks_equals_one_by_one(self, name: str, ndim: int) -> None:
        model = network(name, ndim).double()
        x, masks = torch.randn(3, 3, *[16] * ndim, dtype=torch.float64), torch.tensor(SUBSETS)
        together = tensors(model(x, masks))[0]
        alone = [tensors(model(x[b : b + 1], masks[b : b + 1]))[0] for b in range(3)]
        torch.testing.assert_close(together, torch.cat(alone))

    def test_gradient_reaches_the_encoders_of_present_modalities_and_no_other(self, name: str, ndim: int) -> None:
        model = network(name, ndim)
        if name == "rfnet":
            model.is_training = False
        x, mask = torch.randn(1, 3, *[16] * ndim), torch.tensor([[True, False, True]])
        x[~mask] = math.nan
        logits = model(x, mask)
        (logits * torch.randn_like(logits)).sum().backward()
        for modality, present in zip(NAMES, mask[0].tolist(), strict=True):
            gradients = [p.grad for p in model.encoders[modality].parameters() if p.grad is not None]
            norm = sum(float(g.abs().sum()) for g in gradients)
            assert norm > 0 if present else norm == 0

    def test_it_is_small(self, name: str, ndim: int) -> None:
        model = BACKBONES[name](num_classes=4, ndim=ndim)
        assert 30_000 < sum(p.numel() for p in model.parameters()) < 450_000


def test_rfnet_returns_auxiliary_outputs_only_while_is_training() -> None:
    model = network("rfnet")
    x, mask = torch.randn(2, 3, 32, 32), torch.tensor(SUBSETS[:2])
    logits, unimodal, coarse = model(x, mask)
    assert [tuple(t.shape) for t in unimodal] == [(2, 3, 32, 32)] * 3
    assert [tuple(t.shape) for t in coarse] == [(2, 3, s, s) for s in (32, 16, 8, 4)]
    model.is_training = False
    assert torch.equal(model(x, mask), logits)


def test_mean_and_variance_by_hand_and_zero_variance_of_one_modality() -> None:
    stack = torch.tensor([[[1.0], [5.0], [9.0]], [[2.0], [8.0], [3.0]]])
    mask = torch.tensor([[True, False, True], [False, True, False]])
    moments = mean_and_variance(keep_present(stack, mask), mask)
    assert moments.tolist() == [[5.0, 16.0], [8.0, 0.0]]


def test_padding_is_at_the_end_and_never_crops() -> None:
    x = torch.ones(2, 3, 5)
    padded = pad_to(x, (4, 4))
    assert padded.shape == (2, 4, 5)
    assert torch.equal(padded[:, :3], x)
    assert padded[:, 3].abs().sum() == 0


class TestPatches:
    def cases(self) -> Cases:
        def read(name: str) -> tuple[np.ndarray, np.ndarray]:
            label = np.zeros((20, 12, 24), dtype=np.int64)
            label[15:18, 8:10, 20:22] = 1
            return np.stack([label, label + 10.0]).astype(np.float32), label

        return Cases(["a", "b", "c"], read)

    def test_image_and_label_stay_together(self) -> None:
        patches = RandomPatches(self.cases(), (16, 16, 16), 12, seed=1)
        found = 0
        for i in range(12):
            item = patches[i]
            assert item["image"].shape == (2, 16, 16, 16)
            assert item["label"].shape == (16, 16, 16)
            assert torch.equal(item["image"][0], item["label"].float())
            found += int(item["label"].any())
        assert found >= 6

    def test_same_seed_same_patches_other_seed_other_patches(self) -> None:
        one, two, three = (RandomPatches(self.cases(), (8, 8, 8), 6, seed=seed) for seed in (1, 1, 2))
        same = [torch.equal(one[i]["image"], two[i]["image"]) for i in range(6)]
        other = [torch.equal(one[i]["image"], three[i]["image"]) for i in range(6)]
        assert all(same)
        assert not all(other)

    def test_every_epoch_draws_every_patient_once(self) -> None:
        patches = RandomPatches(self.cases(), (8, 8, 8), 9)
        drawn = [patches[i]["id"] for i in range(9)]
        assert [sorted(drawn[k : k + 3]) for k in (0, 3, 6)] == [["a", "b", "c"]] * 3

    def test_iteration_ends(self) -> None:
        with pytest.raises(IndexError):
            RandomPatches(self.cases(), (8, 8, 8), 2)[2]


def test_phantom_cohort_shares_no_patient_between_training_and_test() -> None:
    cohorts = [phantom_cohort(seed, 3, 2, 16) for seed in (0, 1)]
    ids = [name for cohort in cohorts for part in (cohort.train, cohort.test) for name in part.ids]
    assert len(set(ids)) == len(ids) == 10


def test_a_floor_takes_the_threshold_of_the_training_patients() -> None:
    truths = [torch.tensor([False, False, True, True]), torch.tensor([False, True, True, True])]
    scores = [torch.tensor([0.1, 0.4, 0.6, 0.9]), torch.tensor([0.2, 0.6, 0.7, 0.9])]
    assert floors.best_threshold(scores, truths, (0.3, 0.5, 0.8)) == 0.5
    assert floors.mean_dice(scores, truths, 0.5) == 1
    assert floors.mean_dice(scores, truths, 0.8) == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_a_floor_needs_no_network_and_sees_no_test_patient(tmp_path: Path) -> None:
    outline = np.zeros((20, 13, 18), dtype=np.uint8)
    outline[5:15, 4:9, 6:12] = 1
    fake_sts(tmp_path)
    for path in tmp_path.glob("*.npz"):
        with np.load(path) as file:
            stored = dict(file)
        test = path.stem in ("sts_001", "sts_003")
        moved = np.roll(outline, 10, axis=0) if test else outline
        np.savez(path, **{**stored, "gtv": moved, "pet": 100 * moved.astype(np.uint8)})
    found = floors.floors(tmp_path, 1)
    # The shape of the training patients is elsewhere in the test patients, the uptake follows the tumour.
    assert found["PET"] == 100
    assert found["shape"] == 0
    assert floors.floors(tmp_path, 0)["PET"] == 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, demo.Run]:
    return demo.main(["--smoke", "--out", str(folder)])


class TestDemo:
    def test_it_leaves_every_file(self, runs: dict[str, demo.Run], folder: Path) -> None:
        expected = {
            *("table.md", "summary.csv", "results-plain.csv", "results-PASSION.csv", "run.json", "metrics.jsonl"),
            *("preference.png", "heatmap.png", "overlays.png", "overlays", "report.html"),
        }
        assert {path.name for path in folder.iterdir()} == expected
        pictures = sorted(folder.rglob("*.png"))
        assert [path.name for path in pictures if path.parent != folder] == ["PASSION.png", "plain.png"]
        for path in pictures:
            assert path.read_bytes().startswith(b"\x89PNG")

    def test_what_was_logged_is_what_the_epochs_said(self, runs: dict[str, demo.Run], folder: Path) -> None:
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [record["epoch"] for record in records] == [0, 1]
        for record, report in zip(records, runs["PASSION"].history, strict=True):
            assert [record[f"beta/{name}"] for name in report.modalities] == report.beta.tolist()

    def test_the_table_has_every_subset_and_both_runs(self, runs: dict[str, demo.Run], folder: Path) -> None:
        text = (folder / "table.md").read_text()
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
        subsets = [line[0] for line in lines if len(line) == 5][2:]
        assert len(runs["plain"].results.subsets) == 15
        assert subsets == [
            *runs["plain"].results.subsets,
            *(f"contains {name}" for name in ("flair", "t1ce", "t1", "t2")),
            "all subsets",
        ]

    def test_the_summary_is_the_difference_of_the_scores(self, runs: dict[str, demo.Run], folder: Path) -> None:
        with (folder / "summary.csv").open() as file:
            rows = {(row["subset"], row["target"]): row for row in csv.DictReader(file)}
        plain, passion = runs["plain"].results, runs["PASSION"].results
        row = rows["flair+t2", "WT"]
        assert float(row["plain_mean"]) == pytest.approx(100 * plain.mean(subsets="flair+t2", targets="WT"))
        expected = 100 * (passion.mean(subsets="t2") - plain.mean(subsets="t2"))
        assert float(rows["t2", "mean"]["difference_mean"]) == pytest.approx(expected, abs=1e-9)
        everything = rows["all subsets", "mean"]
        assert float(everything["passion_mean"]) == pytest.approx(100 * passion.mean())

    def test_only_the_passion_run_has_a_preference(self, runs: dict[str, demo.Run]) -> None:
        assert runs["plain"].history == []
        assert len(runs["PASSION"].history) == 2
        assert runs["PASSION"].history[-1].modalities == ("flair", "t1ce", "t1", "t2")

    def test_the_two_runs_differ_and_the_models_are_bare(self, runs: dict[str, demo.Run]) -> None:
        plain, passion = runs["plain"].model, runs["PASSION"].model
        assert type(plain) is type(passion) is BACKBONES["uhemis"]
        pairs = zip(plain.parameters(), passion.parameters(), strict=True)
        assert not all(torch.equal(a, b) for a, b in pairs)

    def test_the_credit_of_real_data_is_in_the_table_and_regions_are_its_own(
        self, runs: dict[str, demo.Run], tmp_path: Path
    ) -> None:
        fake_sts(tmp_path)
        cohort = sts_cohort(tmp_path, 1)
        presence = draw_presence(cohort.train.ids, dict.fromkeys(cohort.modalities, 0.3), seed=0)
        options = demo.parser().parse_args(["--smoke", "--out", str(tmp_path / "out"), "--steps", "1", "--patch", "16"])
        plain = demo.run(cohort, presence, options, passion=False)
        demo.write(cohort, presence, options, {"plain": plain, "PASSION": plain})
        assert plain.results.samples == ("sts_001", "sts_003")
        assert plain.results.targets == ("GTV",)
        assert len(plain.results.subsets) == 7
        table = (tmp_path / "out" / "table.md").read_text()
        assert "CC BY 3.0" in table
        assert "+0.0 ± 0.0" in table


def batches(steps: int) -> list[dict[str, torch.Tensor]]:
    """Two 2-D samples per step; the second lacks a modality."""
    random = torch.Generator().manual_seed(0)
    mask = torch.tensor([[True, True, True], [True, False, True]])
    return [
        {
            "image": torch.randn(2, 3, 16, 16, generator=random) * mask[:, :, None, None],
            "mask": mask,
            "label": torch.randint(3, (2, 16, 16), generator=random),
        }
        for _ in range(steps)
    ]


def wrapper(**config: float) -> Callable[[nn.Module], PassionWrapper]:
    rates = {"ct": 0.2, "pet": 0.5, "t1": 0.4}
    return lambda model: PassionWrapper(model, modalities=NAMES, missing_rates=rates, config=PassionConfig(**config))


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_trains_in_the_loop_of_the_demo_and_comes_out_bare(name: str) -> None:
    model = network(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = set(vars(model))
    history = train(model, batches(3), steps=3, steps_per_epoch=2, wrap=wrapper())
    assert [entry.epoch for entry in history] == [0, 1]
    assert history[0].counts.tolist() == [4, 2, 4]
    assert set(vars(model)) == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_all_weights_zero_is_the_plain_run_bit_for_bit() -> None:
    # Same weights, same batches, same random numbers: whatever differs otherwise is the loss.
    def trained(wrap: Callable[[nn.Module], PassionWrapper] | None) -> list[torch.Tensor]:
        model = network("uhemis")
        train(model, batches(3), steps=3, steps_per_epoch=3, wrap=wrap)
        return list(model.parameters())

    plain = trained(None)
    zero = trained(wrapper(pixel_weight=0, prototype_weight=0, unimodal_weight=0))
    untrained = network("uhemis").parameters()
    assert all(torch.equal(a, b) for a, b in zip(plain, zero, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(plain, untrained, strict=True))


def test_auxiliary_outputs_are_supervised_where_their_modality_is_present() -> None:
    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return weighted_cross_entropy(logits, labels) + dice_loss(logits, labels)

    labels, mask = torch.randint(3, (2, 8, 8)), torch.tensor([[True, False], [True, True]])
    logits, *unimodal = torch.randn(3, 2, 3, 8, 8)
    coarse = (torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4))
    total = criterion((logits, tuple(unimodal), coarse), labels, mask)
    expected = loss(logits, labels).sum() + loss(unimodal[0], labels).sum() + loss(unimodal[1], labels)[1]
    expected = expected + 0.5 * loss(coarse[0], labels).sum() + 0.25 * loss(coarse[1], labels[:, ::2, ::2]).sum()
    assert float(total) == pytest.approx(float(expected / 2), rel=1e-5)
    assert float(criterion(logits, labels, mask)) == pytest.approx(float(loss(logits, labels).mean()))


def test_rfnet_spec_agrees_with_detection_and_adds_the_coarse_outputs() -> None:
    model, batch = network("rfnet"), batches(1)[0]
    terms = {}
    for name, spec in (("by hand", rfnet_spec(NAMES)), ("detected", None)):
        rates = dict.fromkeys(NAMES, 0.2)
        wrapped = PassionWrapper(model, modalities=NAMES, missing_rates=rates, spec=spec)
        wrapped(batch["image"], batch["mask"])
        wrapped.passion_loss(batch["label"])
        terms[name] = wrapped.passion.loss_terms()
        wrapped.unwrap()
    by_hand, detected = terms["by hand"], terms["detected"]
    assert torch.equal(by_hand.active, batch["mask"])
    assert torch.equal(by_hand.distance, detected.distance)
    assert (by_hand.pixel > detected.pixel)[by_hand.active].all()


def test_three_lines_train() -> None:
    losses = three_lines.main(epochs=2, patients=4, size=16)
    assert len(losses) == 4
    assert all(math.isfinite(loss) for loss in losses)
