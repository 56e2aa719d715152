"""The command line: see ``python -m examples.experiment --help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch

from examples.backbones import BACKBONES
from examples.data import Cohort
from examples.experiment import report, runner
from examples.experiment.cells import assignments, grid, parse_rates, shard
from examples.experiment.recipes import ALIASES, parse_recipe
from examples.experiment.store import Store, Study
from examples.experiment.views import DRAWINGS
from examples.training import TASKS
from passion_plugin.baselines import strategy_names
from passion_plugin.data import draw_presence
from passion_plugin.errors import ConfigError, PassionError, raise_problems, short, suggest

__all__ = ["main", "parser"]


def parser() -> argparse.ArgumentParser:
    """The options of a run."""
    result = argparse.ArgumentParser(
        prog="python -m examples.experiment",
        description="Train networks with several strategies on incomplete data and score them on every subset of "
        "modalities. What is finished is never computed again: give the same command to go on. "
        "'python -m examples.experiment report --help' makes tables and pictures.",
        epilog=f"Rules: {', '.join(strategy_names())}. Drawings: {', '.join(DRAWINGS)}; {', '.join(ALIASES)} alone are "
        f"plain with that drawing. Networks: {', '.join(BACKBONES)}.",
    )
    add = result.add_argument
    add("--data", default="phantom", help="'phantom', 'phantom-tiny', a folder, or module:function(fold=) -> Cohort")
    add("--results", default="runs/experiment", help="folder of results (default: runs/experiment)")
    add("--backbone", nargs="+", default=["uhemis"], help="networks (default: uhemis)")
    add("--strategies", nargs="+", default=["plain", "passion"], metavar="RULE[@DRAWING[+slow]][:NAME=VALUE,...]")
    add("--rates", nargs="+", help="missing rates, '.2,.5,.8' in order or 'ct=.2,pet=.8,t1=.5' (default: the data's)")
    add("--assignments", choices=("given", "all"), default="given", help="all: the rates in every order of modalities")
    add("--held-out", metavar="FOLDER", help="test on these patients instead, train on all of --data (sarcoma files)")
    add("--folds", nargs="+", type=int, default=[0])
    add("--seeds", nargs="+", type=int, default=[0])
    add("--batch-size", nargs="+", type=_positive, help="several are several cells (default: the data's own)")
    add("--steps", type=_positive, help="optimizer steps of every training (default: the data's own)")
    add("--patch", type=_positive, help="voxels of a training patch per axis (default: the data's own)")
    add("--lr", type=float, default=3e-3, help="peak learning rate (default: 0.003)")
    add("--widths", nargs="+", type=_positive, help="channels of the networks by level (default: the data's own)")
    add("--loss", choices=TASKS, default="ce+dice", help="the user's own loss (default: ce+dice)")
    add("--no-hd95", action="store_true", help="Dice only")
    add("--no-models", action="store_true", help="do not keep trained weights (needed for overlays)")
    add("--device", default="cpu")
    add("--threads", type=_positive, help="CPU threads (default: PyTorch's own choice)")
    add("--shard", default="1/1", metavar="I/N", help="every N-th draw of what is missing, from the I-th (from 1)")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns how many cells were trained, or how many blocks reported."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["report"]:
        return report.main(arguments[1:])
    command = parser()
    options = command.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        return _run(options)
    except PassionError as error:
        command.error(str(error))


def _run(options: argparse.Namespace) -> int:
    def cohort_of(fold: int) -> Cohort:
        return runner.load(options.data, fold, options.held_out)

    # All folds now, so that none is found missing after hours of training.
    studies = {fold: _study(cohort_of(fold), options) for fold in options.folds}
    cohort, study = cohort_of(options.folds[0]), studies[options.folds[0]]
    rates = [parse_rates(text, cohort.modalities) for text in options.rates or []] or [dict(cohort.missing_rates)]
    for each in rates:
        draw_presence(cohort.train.ids, each, seed=0)  # refuses what cannot be drawn
    problems = []
    for fold, other in studies.items():
        changed = [name for name, value in asdict(study).items() if asdict(other)[name] != value]
        if changed:
            problems.append(f"folds {options.folds[0]} and {fold} of the data differ in {', '.join(changed)}")
    for name in study.primary:
        if name not in study.regions:
            problems.append(
                f"the primary region {name!r} of the data is none of its regions.{suggest(name, study.regions)}"
            )
    for name in options.backbone:
        problems += _network_problems(name, study)
    for name in options.strategies:
        try:
            recipe = parse_recipe(name)
        except ConfigError as error:
            problems.append(str(error))
            continue
        if recipe.parameters.get("subset_students") and len(study.modalities) < 3:
            problems.append(f"strategy {name!r} needs three modalities, and the data has {', '.join(study.modalities)}")
    part, slash, parts = options.shard.partition("/")
    if not (slash and part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        problems.append(f"--shard {options.shard!r}: write I/N with I from 1 to N")
    raise_problems(problems, what="experiment")
    cells = grid(
        backbones=options.backbone,
        assignments=assignments(rates, permuted=options.assignments == "all"),
        folds=options.folds,
        seeds=options.seeds,
        batch_sizes=options.batch_size or [cohort.batch_size],
        strategies=options.strategies,
    )
    trained = runner.run(
        shard(cells, int(part), int(parts)),
        cohort_of,
        study,
        Store(options.results),
        device=options.device,
        keep_models=not options.no_models,
    )
    print(f"{trained} cells trained. Tables: python -m examples.experiment report --results {options.results}")
    return trained


def _study(cohort: Cohort, options: argparse.Namespace) -> Study:
    """What all cells share, by one fold of the data and the command line."""
    return Study(
        name=cohort.name,
        credit=cohort.credit,
        modalities=list(cohort.modalities),
        classes=list(cohort.classes),
        regions={name: list(labels) for name, labels in cohort.regions.items()},
        ndim=cohort.ndim,
        steps=options.steps or cohort.steps,
        patch=options.patch or cohort.patch,
        lr=options.lr,
        widths=options.widths or list(cohort.widths),
        task=options.loss,
        hd95=not options.no_hd95,
        unit="mm" if "spacing" in cohort.test[0] else "voxels",
        primary=list(cohort.primary),
        held_out=options.held_out is not None,
    )


def _network_problems(name: str, study: Study) -> list[str]:
    """Say why a network cannot be trained on patches of this size, by a first pass; empty when it can."""
    if name not in BACKBONES:
        return [f"no network {name!r}.{suggest(name, BACKBONES)}"]
    count = len(study.modalities)
    try:
        model = BACKBONES[name](tuple(study.modalities), len(study.classes), ndim=study.ndim, widths=study.widths)
        with torch.no_grad():
            model(torch.zeros(1, count, *[study.patch] * study.ndim), torch.ones(1, count, dtype=torch.bool))
    except (RuntimeError, ValueError) as error:
        return [f"network {name!r} with --widths {study.widths} and --patch {study.patch}: {short(error)}"]
    return []


def _positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


if __name__ == "__main__":
    main()
