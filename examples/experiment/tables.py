"""Results as Markdown tables. Dice in percent, differences in points; intervals are 95 %."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from examples.experiment.comparison import Comparison, complete_set, rarest
from examples.experiment.stats import Interval, Select, by_patient, by_run, seed_means
from examples.markdown import aligned
from passion_plugin.evaluation import BRATS_PENALTY

__all__ = ["TABLES"]


def summary(of: Comparison) -> str:
    """Mean over all subsets, by target, and for the rarest modality alone; gain against the baseline; cost."""
    header = ["network", "strategy", f"Dice of {of.about}", *of.apart]
    header += ["rarest alone", f"gain on {of.baseline}", "on the rarest alone", "time", "runs"]
    lines = []
    for group in of.groups:
        for name in of.shown(group):
            level = by_patient(of.scores().level(name, of.within(group)))
            if not level.runs:
                continue
            line = [of.label(group), name, _percent(level.mean)]
            for target in of.apart:
                chosen = of.within(group, target=target)
                line.append(_percent(by_patient(of.scores().level(name, chosen)).mean))
            line.append(_percent(by_patient(of.scores().level(name, of.within(group, rarest))).mean))
            line += [_gain(of, name, of.baseline, group), _gain(of, name, of.baseline, group, rarest)]
            line += [_ratio(of, name, group), str(level.runs)]
            lines.append(line)
    return aligned([header, *lines])


def gains(of: Comparison) -> str:
    """The focus against every other strategy, over patients and over pairs of fold and seed; see ``best_other``."""
    header = ["network", f"{of.focus} minus", "all subsets", "by fold × seed", "each seed"]
    header += ["rarest alone", "complete set", "patients", "runs"]
    lines = []
    for group in of.groups:
        best = of.best_other(group)
        for name in of.shown(group):
            if name == of.focus:
                continue
            samples = of.scores().difference(of.focus, name, of.within(group))
            overall = by_patient(samples)
            if not overall.units:
                continue
            mark = " (best other)" if name == best else ""
            lines.append(
                [
                    *(of.label(group), name + mark, _points(overall), _points(by_run(samples))),
                    ", ".join(f"{100 * mean:+.1f}" for mean in seed_means(samples).values()),
                    *(_gain(of, of.focus, name, group, select) for select in (rarest, complete_set)),
                    *(str(overall.units), str(overall.runs)),
                ]
            )
    return aligned([header, *lines])


def variations(of: Comparison) -> str:
    """The focus with other hyper-parameters or another drawing, against the focus as it is."""
    header = ["network", f"{of.focus} with", "all subsets", "rarest alone", "complete set", "runs"]
    lines = []
    for group in of.groups:
        for name in of.variations:
            runs = by_patient(of.scores().difference(name, of.focus, of.within(group))).runs
            if runs:
                gains = (_gain(of, name, of.focus, group, select) for select in (None, rarest, complete_set))
                lines.append([of.label(group), name, *gains, str(runs)])
    return aligned([header, *lines]) if lines else f"No variation of {of.focus} was run.\n"


def subsets(of: Comparison) -> str:
    """Dice by subset, and the gain of the focus; the last line is the subset that gains least.

    Strategies are those that were run as often as any. The best other is the one that the table ``gains`` marks.
    """
    fully_run = {group: of.fully_run(group) for group in of.groups}
    shown = [name for name in of.strategies if any(name in names for names in fully_run.values())]
    header = ["network", "modalities", *shown, f"{of.focus} − {of.baseline}", f"{of.focus} − best other"]
    lines = []
    for group in of.groups:
        best = of.best_other(group)
        found: dict[str, Interval] = {}
        for subset in of.subsets:
            chosen = of.within(group, lambda cell, name, target, subset=subset: name == subset)
            found[subset] = by_patient(of.scores().difference(of.focus, of.baseline, chosen))
            levels = [
                _percent(by_patient(of.scores().level(name, chosen)).mean) if name in fully_run[group] else "–"
                for name in shown
            ]
            other = "–" if best is None else _points(by_patient(of.scores().difference(of.focus, best, chosen)))
            lines.append([of.label(group), subset, *levels, _points(found[subset]), other])
        if worst := min((s for s in found if found[s].units), key=lambda s: found[s].mean, default=None):
            lines.append([of.label(group), f"least gain: {worst}", *[""] * len(shown), _points(found[worst]), ""])
    return aligned([header, *lines])


def assignments(of: Comparison) -> str:
    """Which modality is rare: baseline, focus, and the gain."""
    header = ["network", "missing rates", of.baseline, of.focus, "gain", "rarest alone", "gain on it", "runs"]
    lines = []
    for group in of.groups:
        for assignment in sorted({cell.assignment for cell in of.cells}):
            chosen = of.within(group, lambda cell, *_, assignment=assignment: cell.assignment == assignment)
            alone = of.within(
                group,
                lambda cell, subset, target, assignment=assignment: (
                    cell.assignment == assignment and rarest(cell, subset, target)
                ),
            )
            gain = by_patient(of.scores().difference(of.focus, of.baseline, chosen))
            if gain.runs:
                levels = [
                    _percent(by_patient(of.scores().level(name, which)).mean)
                    for which, name in ((chosen, of.baseline), (chosen, of.focus), (alone, of.focus))
                ]
                last = by_patient(of.scores().difference(of.focus, of.baseline, alone))
                lines.append(
                    [
                        *(of.label(group), assignment.replace(",", ", "), *levels[:2]),
                        *(_points(gain), levels[2], _points(last), str(gain.runs)),
                    ]
                )
    return aligned([header, *lines])


def distance(of: Comparison) -> str:
    """HD95 by target, lower is better, of strategies that were run as often as any.

    Where one mask is empty it is the penalty; how often that was so, and the difference where it was so with neither
    of two strategies, are about the primary targets, as the first column is.
    """
    scores, measured = of.scores("hd95"), of.scores("hd95", found_only=True)
    if not scores.values:
        return "HD95 was not computed.\n"
    header = ["network", "strategy", f"{of.about}, {of.study.unit}", *of.apart]
    header += [f"minus {of.baseline}", "where both predict", f"one mask empty ({BRATS_PENALTY:.0f})"]
    lines = []
    for group in of.groups:
        for name in of.fully_run(group):
            level = by_patient(scores.level(name, of.within(group)))
            if not level.runs:
                continue
            line = [of.label(group), name, f"{level.mean:.1f}"]
            for target in of.apart:
                chosen = of.within(group, target=target)
                line.append(f"{by_patient(scores.level(name, chosen)).mean:.1f}")
            for which in (scores, measured):
                difference = by_patient(which.difference(name, of.baseline, of.within(group)))
                line.append("–" if name == of.baseline else _points(difference, scale=1))
            lines.append([*line, _empty(of, name, group)])
    return aligned([header, *lines])


def runs(of: Comparison) -> str:
    """Data, credit, budget, number of trainings and failures, as a list."""
    study = of.study
    facts = [record["run"] for record in of.records if record["run"]["status"] == "ok"]
    failed = [record for record in of.records if record["run"]["status"] != "ok"]
    seconds = sum(run["training_seconds"] + run["evaluation_seconds"] for run in facts)
    patients = {score[1] for record in of.records for score in record["scores"]}
    side = "×".join([str(study.patch)] * study.ndim)
    lines = [
        f"Data: {study.name}, {len(patients)} test patients "
        + ("of a folder of their own; all of the other are trained on." if study.held_out else "over all folds.")
        + (f" Credit: {study.credit}." if study.credit else ""),
        f"Scores are those of {of.about} unless another target is named, means over all subsets of the modalities.",
        f"Budget of every training: {study.steps} steps of {_listed({c.batch_size for c in of.cells})} "
        f"{'slices' if study.ndim == 2 else 'patches'} of {side} voxels, AdamW, peak learning rate {study.lr:g}, "
        f"loss {study.task}, channels {', '.join(map(str, study.widths))}.",
        f"Trainings: {len(of.records)} (networks: {_listed({c.backbone for c in of.cells})}; assignments of missing "
        f"rates: {len({c.assignment for c in of.cells})}; folds: {len({c.fold for c in of.cells})}; "
        f"seeds: {len({c.seed for c in of.cells})}; strategies: {len(of.strategies)}).",
        f"Failed trainings: {len(failed)}"
        + "".join(f"; {record['cell']['strategy']}: {record['run']['status']}" for record in failed)
        + ".",
        f"Computing time: {seconds / 3600:.1f} h with {_listed({run['threads'] for run in facts})} thread(s) on "
        f"{_listed({run['device'] for run in facts})}; torch {_listed({run['torch'] for run in facts})}.",
    ]
    return "".join(f"- {line}\n" for line in lines)


TABLES: Mapping[str, Callable[[Comparison], str]] = {
    "runs": runs,
    "summary": summary,
    "gains": gains,
    "variations": variations,
    "subsets": subsets,
    "assignments": assignments,
    "hd95": distance,
}
"""Tables by name."""


def _gain(of: Comparison, first: str, second: str, group: tuple[str, int], select: Select | None = None) -> str:
    if first == second:
        return "–"
    return _points(by_patient(of.scores().difference(first, second, of.within(group, select))))


def _ratio(of: Comparison, name: str, group: tuple[str, int]) -> str:
    """Seconds of training relative to the baseline: the median over blocks."""
    seconds: dict[str, dict[Any, float]] = {}
    for cell, record in zip(of.cells, of.records, strict=True):
        if (cell.backbone, cell.batch_size) == group and record["run"]["status"] == "ok":
            seconds.setdefault(cell.strategy, {})[cell.block] = record["run"]["training_seconds"]
    own, base = seconds.get(name, {}), seconds.get(of.baseline, {})
    ratios = [own[block] / base[block] for block in own if base.get(block)]
    return f"{statistics.median(ratios):.2f}×" if ratios else "–"


def _empty(of: Comparison, name: str, group: tuple[str, int]) -> str:
    found = [
        score[5] == "one empty"
        for cell, record in zip(of.cells, of.records, strict=True)
        if cell.strategy == name and (cell.backbone, cell.batch_size) == group
        for score in record["scores"]
        if score[3] == "hd95" and score[2] in of.primary
    ]
    return f"{sum(found) / len(found):.1%}" if found else "–"


def _percent(value: float) -> str:
    return "–" if value != value else f"{100 * value:.1f}"


def _points(interval: Interval, scale: float = 100) -> str:
    if not interval.units:
        return "–"
    mean, low, high = (scale * value for value in interval[:3])
    return f"{mean:+.1f}" + ("" if low != low else f" [{low:+.1f}, {high:+.1f}]")


def _listed(values: Any) -> str:
    return ", ".join(map(str, sorted(values)))
