"""The benchmarks run, measure what they say, and refuse to report what is wrong. No time is asserted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import (
    losses,
    memory,
    naive,
    operations,
    plots,
    problems,
    profile,
    report,
    results,
    step,
    tables,
    training,
)
from benchmarks.cases import Case, check_parity, draw_inputs, parity_case, too_large
from benchmarks.floor import Work, floor
from benchmarks.measure import ParityError, interleaved, machine_facts, peak_memory, relative_error
from benchmarks.operations import OPERATIONS, forward_backward
from examples.backbones import UHeMISLike
from passion_plugin.backbone import BackboneSpec
from passion_plugin.config import PassionConfig
from passion_plugin.testing import references

CPU = torch.device("cpu")
TINY = Case("prototype", side=8, classes=3, channels=4)


@pytest.fixture(autouse=True)
def _not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes many seconds for each size; the candidate is then the plain definition itself."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.fixture(autouse=True)
def _quick_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates of the machine are not what is tested here."""
    monkeypatch.setattr(losses, "floor", lambda *_: (1e-6, "bandwidth"))


def factory() -> nn.Module:
    return UHeMISLike(("a", "b", "c"), num_classes=3, ndim=2, widths=(4, 4))


def factory_with_spec() -> tuple[nn.Module, BackboneSpec]:
    return factory(), BackboneSpec(encoders={name: f"encoders.{name}" for name in "abc"}, classifier="classifier")


def own_backbone(name: str = "factory") -> list[str]:
    return f"--backbone {__name__}:{name} --shape 1,3,8,8 --modalities a,b,c --rates 0.2,0.4,0.6 --draws 5".split()


def own_problem(arguments: Sequence[str]) -> problems.Problem:
    parser = results.command_line("step", None)
    step.backbone_options(parser)
    chosen = parser.parse_args(arguments)
    return step.problem_of(step.points(chosen)[0], chosen)


def read(path: Path) -> dict[str, dict[str, str]]:
    return {row["candidate"]: row for row in results.read(path)}


# Naive formulas


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("scale_factor", [1, 2])
def test_naive_pixel_distillation_is_the_reference(official: bool, scale_factor: int) -> None:
    student, teacher = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    expected = references.pixel_distillation(
        student, teacher, mode="official" if official else "default", scale_factor=scale_factor
    )
    if official or scale_factor == 1:
        found = naive.pixel_distillation(student, teacher, official=official, scale_factor=scale_factor)
        assert found.tolist() == pytest.approx(expected.tolist())


@pytest.mark.parametrize("cosine", [naive.cosine, naive.cosine_by_sums])
def test_naive_prototype_distillation_is_the_reference(cosine: naive.Cosine) -> None:
    student, teacher = torch.randn(2, 2, 4, 3, 4, dtype=torch.float64)
    labels = torch.randint(3, (2, 3, 4))
    labels[0] = labels[0].clamp(max=1)  # class 2 is absent from one sample
    found = naive.prototype_distillation(student, teacher, labels, 4, cosine)
    for value, expected in zip(found, references.prototype_distillation(student, teacher, labels, 4), strict=True):
        assert value.tolist() == pytest.approx(expected.tolist())


def test_naive_segmentation_loss_is_the_reference() -> None:
    logits, labels = torch.randn(2, 4, 3, 4, dtype=torch.float64), torch.randint(3, (2, 3, 4))
    expected = references.weighted_cross_entropy(logits, labels) + references.dice_loss(logits, labels)
    assert naive.segmentation_loss(logits, labels).tolist() == pytest.approx(expected.tolist())


def test_naive_gates_are_the_reference() -> None:
    presence = torch.tensor([[True, True, True], [True, False, True], [False, True, False]])
    distance = torch.rand(3, 3, dtype=torch.float64)
    assert naive.gates(distance, presence).tolist() == references.gate(distance, presence).tolist()


def test_naive_objective_is_the_reference() -> None:
    config, rates = PassionConfig(), (0.2, 0.5)
    presence = torch.tensor([[True, True], [False, True]])
    teacher, *students = (list(torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)) for _ in range(3))
    labels = torch.randint(3, (2, 4, 4))
    pixel, prototype, distance, unimodal = [], [], [], []
    for logits, features in students:
        pixel.append(references.pixel_distillation(logits, teacher[0]))
        P, D = references.prototype_distillation(features, teacher[1], labels, 3)
        prototype.append(P)
        distance.append(D)
        unimodal.append(references.weighted_cross_entropy(logits, labels) + references.dice_loss(logits, labels))
    columns = [torch.tensor(list(zip(*values, strict=True))) for values in (pixel, prototype, distance, unimodal)]
    active = presence & (presence.sum(1, keepdim=True) > 1)
    expected = references.total_loss(
        columns[0],
        columns[1],
        columns[3],
        active,
        rarity=[1 / (1 - rate) for rate in rates],
        beta=[1.0, 1.0],
        gate=references.gate(columns[2], presence),
    )
    found = naive.objective(naive.terms(teacher, students, labels, config), presence, rates, config)
    assert float(found) == pytest.approx(expected)


# Measuring


def test_interleaved_rounds_go_through_all_candidates_in_turn() -> None:
    order: list[str] = []
    calls = {name: [lambda name=name: order.append(name)] * 2 for name in "ab"}
    times = interleaved(calls, device=CPU, rounds=3, seconds=60)
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert order[:2] == ["a", "b"], "one call each that is not timed"
    timed = order[2:]
    assert len(timed) == 2 * 2 * 3, "two calls of two candidates, in three rounds"
    assert {tuple(timed[start : start + 2]) for start in range(0, len(timed), 2)} == {("a", "b"), ("b", "a")}


def test_no_further_round_begins_after_the_time_is_over() -> None:
    times = interleaved({"a": [lambda: None]}, device=CPU, rounds=1000, seconds=0)
    assert len(times["a"]) == 3


def test_peak_memory_counts_what_lives_at_one_time() -> None:
    def call() -> None:
        for _ in range(3):
            first = torch.ones(1000)
            second = first + 1
            del first, second

    assert peak_memory(call, CPU) == pytest.approx(2 * 4000, rel=0.01)


def test_peak_memory_sees_temporaries_of_custom_operators() -> None:
    @torch.library.custom_op("passion_plugin_tests::wasteful", mutates_args=())
    def wasteful(x: torch.Tensor) -> torch.Tensor:
        return torch.ones(10_000).sum() + x

    x = torch.zeros(())
    assert peak_memory(lambda: wasteful(x), CPU) >= 40_000


def test_relative_error_of_nan_is_nan() -> None:
    one = torch.ones(2)
    assert relative_error(1.1 * one, one) == pytest.approx(0.1)
    assert relative_error(one * torch.nan, one) != relative_error(one * torch.nan, one)


def test_the_slowest_limit_is_named() -> None:
    assert floor(Work(bytes=1, flops=10**15), 1 << 16, CPU)[1] == "arithmetic"
    assert floor(Work(bytes=10**15), 1 << 16, CPU)[1] == "bandwidth"


def test_machine_facts_have_no_empty_value() -> None:
    assert all(machine_facts(CPU).values())


# Loss terms


@pytest.mark.parametrize("name", list(OPERATIONS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_candidates_of_a_loss_agree(name: str, dtype: str) -> None:
    case = dataclasses.replace(TINY, operation=name, dtype=dtype, batch=2)
    inputs = draw_inputs(case, CPU)
    assert inputs.labels.unique().tolist() == [0, 1, 2]
    found, missing = losses.runnable(case, inputs, CPU)
    assert next(iter(found)) == "naive"
    assert list(found)[-2:] == ["compiled", "ours"]
    assert not missing
    check_parity(case, found, CPU)


def test_quick_sweep_varies_one_number_at_a_time() -> None:
    parser = results.command_line("losses", None)
    losses.case_options(parser)
    quick = losses.cases(parser.parse_args([]))
    assert len(set(quick)) == len(quick)
    assert {case.side for case in quick if (case.classes, case.channels) == (4, 0)} == {32, 64, 80, 128, 160}
    assert sum(case.operation == "pixel" for case in quick) == 5 + 2, "five sizes, and two other numbers of classes"
    assert sum(case.operation == "prototype" for case in quick) == 5 + 2 + 2, "and two other numbers of channels"
    full = losses.cases(parser.parse_args(["--full"]))
    assert {case.operation for case in full} == set(OPERATIONS)
    assert {case.side for case in full} >= {32, 64, 80, 128, 160}
    chosen = losses.cases(parser.parse_args(["--operations", "pixel", "--sides", "16", "--classes", "2", "16"]))
    assert chosen == [Case("pixel", 16, 2, 0), Case("pixel", 16, 16, 0)]


def test_losses_write_a_row_for_every_candidate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "losses.csv"
    assert losses.main([*["--operations", "prototype", "--sides", "8", "--seconds", "0", "--out"], str(out)]) == 0
    rows = read(out)
    assert list(rows) == ["naive", "naive, own cosine", "compiled", "ours"]
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert float(rows["ours"]["ratio"]) == 1
    assert float(rows["naive"]["seconds_q1"]) <= float(rows["naive"]["seconds"]) <= float(rows["naive"]["seconds_q3"])
    assert rows["ours"]["torch"] == torch.__version__
    assert "| prototype | 8³ | 4 | 8 |" in capsys.readouterr().out


def test_results_are_only_written_when_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    assert losses.main(["--operations", "pixel", "--sides", "4", "--seconds", "0"]) == 0
    assert not list(tmp_path.iterdir())
    assert losses.main(["--operations", "pixel", "--sides", "4", "--seconds", "0", "--out"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["losses.csv"]


def wrong(operation: str, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    right = OPERATIONS[operation].ours
    broken = dataclasses.replace(OPERATIONS[operation], ours=lambda x: factor * right(x))
    monkeypatch.setitem(operations.OPERATIONS, operation, broken)


@pytest.mark.parametrize("command", [losses.main, memory.main])
@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_wrong_results_are_not_reported(
    command: Any, factor: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong("pixel", monkeypatch, factor)
    out = tmp_path / "out.csv"
    what = ["--what", "losses"] if command is memory.main else ["--seconds", "0"]
    assert command([*["--operations", "pixel", "--sides", "8"], *what, "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert "'ours' does not compute what it should" in said.err
    assert "Nothing is reported" in said.err
    assert not said.out
    assert not out.exists()


def test_a_wrong_gradient_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = OPERATIONS["pixel"].ours
    case = dataclasses.replace(TINY, operation="pixel")

    def same_value(x: operations.Inputs) -> torch.Tensor:
        value = right(x)
        return 2 * value - value.detach()

    with pytest.raises(ParityError, match="gradient"):
        check_parity(case, {"ours": same_value}, CPU)


def test_what_cannot_be_compiled_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        def call(*_: Any) -> Any:
            raise RuntimeError("no compiler")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    out = tmp_path / "losses.csv"
    assert losses.main(["--operations", "pixel", "--sides", "8", "--seconds", "0", "--out", str(out)]) == 0
    assert read(out)["compiled"]["status"] == "not available: RuntimeError"
    assert "| not available |" in tables.losses(results.read(out))


def test_naive_is_skipped_where_memory_is_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inputs = draw_inputs(dataclasses.replace(TINY, operation="pixel", side=32), CPU)
    needed = inputs.nbytes + peak_memory(lambda: forward_backward(OPERATIONS["pixel"].naive, inputs), CPU)
    monkeypatch.setattr("benchmarks.cases.available_bytes", lambda _: 3 * needed)
    large = dataclasses.replace(TINY, operation="pixel", side=64)
    assert "GiB" in too_large(large, CPU)
    assert not too_large(dataclasses.replace(large, side=32), CPU)
    assert parity_case(large, CPU).side == 32


# Training steps


def test_step_on_an_own_backbone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "step.csv"
    assert step.main([*own_backbone(), "--seconds", "0", "--out", str(out)]) == 0
    rows = results.read(out)
    trained = {row["candidate"] for row in rows if row["stage"] == "training"}
    assert trained == {"plain", "naive", *training.CONFIGS}
    assert {row["candidate"] for row in rows if row["stage"] == "evaluation"} == {"plain", "ours"}
    assert {(row["backbone"], row["shape"], row["missing"]) for row in rows} == {("factory", "1x3x8x8", "0.2 0.4 0.6")}
    assert "Prediction in `eval()`" in capsys.readouterr().out


def test_some_candidates_compared_on_smaller_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[tuple[int, ...], list[str]]] = []

    def note(problem: problems.Problem, names: Sequence[str]) -> None:
        compared.append((tuple(problem.batches[0].x.shape), list(names)))

    monkeypatch.setattr(step, "check_parity", note)
    out = tmp_path / "step.csv"
    chosen = ["--candidates", "ours, low memory", "--parity-shape", "1,3,4,4", "--seconds", "0", "--out", str(out)]
    assert step.main([*own_backbone(), *chosen]) == 0
    assert compared == [((1, 3, 4, 4), ["ours, low memory"])]
    assert [row["candidate"] for row in results.read(out)] == ["plain", "ours, low memory"]


def test_a_factory_may_bring_its_spec() -> None:
    assert step.main([*own_backbone("factory_with_spec"), "--seconds", "0"]) == 0


@pytest.mark.parametrize("name", ["uhemis", "rfnet", "mmformer"])
def test_naive_and_ours_add_the_same_to_the_loss(name: str) -> None:
    problem = own_problem(["--backbone", name, "--shape", "2,4,16,16", "--draws", "4"])
    training.check_parity(problem, list(training.CONFIGS))


def test_all_candidates_see_the_same_draws_at_the_given_rates() -> None:
    problem = own_problem(own_backbone())
    masks = torch.cat([batch.mask for batch in problem.batches])
    assert (1 - masks.double().mean(0)).tolist() == pytest.approx([0.2, 0.4, 0.6])
    for batch in problem.batches:
        assert (batch.x[~batch.mask] == 0).all()


def test_a_step_changes_no_weight_but_runs_the_optimizer() -> None:
    problem = own_problem(own_backbone())
    for name in ("plain", "naive", "ours"):
        candidate = training.build(name, problem)
        candidate.step(problem.batches[0])
        assert candidate.optimizer.state
        assert candidate.backbone is not problem.backbone
        for own, original in zip(candidate.backbone.parameters(), problem.backbone.parameters(), strict=True):
            assert torch.equal(own, original)


@pytest.mark.parametrize("command", [step.main, memory.main])
def test_a_step_that_differs_is_not_reported(
    command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(training.CONFIGS, "ours", PassionConfig(temperature=3.0))
    out = tmp_path / "out.csv"
    what = ["--what", "step"] if command is memory.main else ["--seconds", "0"]
    assert command([*own_backbone(), *what, "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert "'ours' differs from naive PASSION" in said.err
    assert not said.out
    assert not out.exists()


def test_memory_of_losses_and_steps(tmp_path: Path) -> None:
    out = tmp_path / "memory.csv"
    assert memory.main([*own_backbone(), *["--operations", "prototype", "--sides", "16", "--out"], str(out)]) == 0
    rows = results.read(out)
    terms, steps = (
        {row["candidate"]: row for row in rows if row["what"] == what and row["status"] == "ok"}
        for what in ("loss", "step")
    )
    assert int(terms["ours"]["peak_bytes"]) < int(terms["naive"]["peak_bytes"])
    assert int(terms["ours"]["gradient_bytes"]) == 4 * 8 * 16**3
    assert float(steps["plain"]["ratio"]) == 1
    assert float(steps["naive"]["ratio"]) > float(steps["ours"]["ratio"])


def test_profile_of_steps_by_kind_of_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "profile.csv"
    assert profile.main([*own_backbone(), "--candidates", "ours", "--out", str(out)]) == 0
    seconds = {(row["candidate"], row["kind"]): float(row["seconds"]) for row in results.read(out)}
    assert list(seconds) == [(name, kind) for name in ("plain", "ours") for kind in profile.KINDS]
    assert seconds["plain", "losses of PASSION"] == 0 < seconds["ours", "losses of PASSION"]
    assert seconds["plain", "convolutions"] > 0 < seconds["ours", "everything else"]
    problem = own_problem(own_backbone())
    several = [int(batch.mask.sum()) for batch in problem.batches if batch.mask.sum() > 1]
    assert f"{sum(several) / len(problem.batches):.3g} students a step" in capsys.readouterr().out


def test_profiles_are_of_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        profile.main([*own_backbone(), "--device", "cuda"])
    assert "trace viewer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backbone", "no_such_backbone"], "module:factory"),
        (["--shape", "1,3,8,8", "--modalities", "a,b"], "channels"),
    ],
)
def test_wrong_options_are_explained(arguments: Sequence[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        step.main(arguments)


# BackboneReport


def test_the_page_says_what_the_results_say() -> None:
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.filled(page, report.blocks()) == page, "run python -m benchmarks.report"


def small_results(folder: Path) -> None:
    chosen = ["--operations", "prototype", "--sides", "8", "--seconds", "0", "--out"]
    assert losses.main([*chosen, str(folder / "losses.csv")]) == 0
    assert step.main([*own_backbone(), "--seconds", "0", "--out", str(folder / "step.csv")]) == 0


def test_tables_and_picture_come_from_the_results(tmp_path: Path) -> None:
    small_results(tmp_path)
    picture = tmp_path / "cost.png"
    plots.draw(tmp_path, picture)
    texts = report.blocks(tmp_path, picture)
    assert picture.stat().st_size > 1000
    row = read(tmp_path / "losses.csv")["ours"]
    assert f"{1e3 * float(row['seconds']):.3g} (" in texts["losses"]
    assert "| factory | 1x3x8x8 | 0.2 0.4 0.6 |" in texts["step"]
    assert texts["memory"] == "Not yet measured."
    assert texts["losses cuda"] == "Not yet measured on a GPU."
    assert "images/cost.png" in texts["plots"]


def test_check_fails_on_a_page_of_other_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "performance.md"
    page.write_text(report.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(report, "PAGE", page)
    assert report.main([]) == 0
    assert report.main(["--check"]) == 0
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("<!-- begin: plots -->", "<!-- begin: plots -->\nold"), encoding="utf-8")
    assert report.main(["--check"]) == 1
    assert "python -m benchmarks.report" in capsys.readouterr().err
    assert report.main([]) == 0
    assert "old" not in page.read_text(encoding="utf-8").partition("<!-- begin: plots -->")[2]


def test_unknown_markers_are_refused() -> None:
    with pytest.raises(ValueError, match="markers"):
        report.filled("<!-- begin: other -->\n<!-- end: other -->", {"losses": "text"})
