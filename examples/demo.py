"""Train one small network twice on incomplete data, plain and with PASSION, and compare every subset.

    python -m examples.demo                          # the synthetic phantom
    python -m examples.demo --data FOLDER --fold 0   # real patients, see examples/README.md

Both runs see the same initial weights, batches and hyper-parameters. What a training patient lacks is really
removed; the test patients are complete and are shown to the network subset by subset. The folder ``--out``
gets ``table.md`` and ``summary.csv``, the pictures ``preference.png``, ``heatmap.png`` and ``overlays.png``, and what a
run consists of (``metrics.jsonl``, ``results-plain.csv`` and ``results-PASSION.csv`` with every score, ``overlays/``,
``run.json``, see docs/pictures.md) with the page made of it, ``report.html``.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from examples import figures
from examples.backbones import BACKBONES, RFNetLike, rfnet_spec
from examples.data import Cohort, RandomPatches
from examples.folders import load_cohort
from examples.markdown import aligned
from examples.training import train
from passion_plugin.config import PassionConfig
from passion_plugin.data import IncompleteDataset, PresenceTable, draw_presence
from passion_plugin.errors import ConfigError
from passion_plugin.evaluation import SubsetResults, evaluate_subsets
from passion_plugin.report import RunLog, plot_preference, write_report
from passion_plugin.training import EpochReport
from passion_plugin.wrapper import PassionWrapper

__all__ = ["Run", "compare", "main", "parser", "run", "table", "write"]


@dataclass(frozen=True)
class Run:
    """What one training left.

    Attributes:
        model: the bare backbone.
        results: Dice on every subset of the test patients.
        history: the preference after every epoch; empty for the plain run.
        seconds: wall-clock of the training alone.
    """

    model: nn.Module
    results: SubsetResults
    history: list[EpochReport]
    seconds: float


def run(
    cohort: Cohort, presence: PresenceTable, options: argparse.Namespace, *, passion: bool, log: RunLog | None = None
) -> Run:
    """Train and evaluate once; all random numbers come from ``options.seed``, the same for both runs."""
    torch.manual_seed(options.seed)
    model = BACKBONES[options.backbone](cohort.modalities, cohort.num_classes)
    incomplete = IncompleteDataset(cohort.train, presence)
    patches = RandomPatches(incomplete, (options.patch,) * 3, options.steps * options.batch_size, seed=options.seed)
    config = PassionConfig(**dict(options.config))

    # None: the spec is detected from the first batch.
    spec = rfnet_spec(cohort.modalities) if isinstance(model, RFNetLike) else None

    def wrap(backbone: nn.Module) -> PassionWrapper:
        return PassionWrapper(backbone, modalities=cohort.modalities, presence=presence, spec=spec, config=config)

    name = "PASSION" if passion else "plain"
    start = time.perf_counter()
    if isinstance(model, RFNetLike):
        model.is_training = True
    history = train(
        model,
        DataLoader(patches, batch_size=options.batch_size),
        steps=options.steps,
        steps_per_epoch=max(1, len(incomplete) // options.batch_size),
        wrap=wrap if passion else None,
        lr=options.lr,
        name=name,
        log=log,
    )
    seconds = time.perf_counter() - start
    if isinstance(model, RFNetLike):
        model.is_training = False
    results = evaluate_subsets(
        model,
        DataLoader(cohort.test, batch_size=1),
        modalities=cohort.modalities,
        num_classes=cohort.num_classes,
        regions=cohort.regions,
        progress=True,
    )
    return Run(model, results, history, seconds)


def table(plain: SubsetResults, passion: SubsetResults) -> tuple[str, list[dict[str, Any]]]:
    """Dice in percent of both runs and their paired difference, mean ± sd over test patients.

    Returns:
        An aligned Markdown table of the mean over regions, and the same as records with one line per
        subset or group and region besides.
    """
    difference = passion.compare(plain)
    columns = {"plain": plain, "passion": passion, "difference": difference}
    groups = plain.groups("subset")
    groups |= {f"contains {name}": members for name, members in plain.groups("modality").items()}
    groups["all subsets"] = plain.subsets
    targets = {"mean": plain.targets, **({t: (t,) for t in plain.targets} if len(plain.targets) > 1 else {})}
    records: list[dict[str, Any]] = []
    for group, members in groups.items():
        for target, names in targets.items():
            record: dict[str, Any] = {"subset": group, "target": target}
            for column, results in columns.items():
                summary = results.summary(subsets=members, targets=names)
                record |= {f"{column}_mean": 100 * summary.mean, f"{column}_sd": 100 * summary.sd}
                record["n"] = summary.n
            records.append(record)
    lines = [["modalities", "plain", "PASSION", "difference", "n"]]
    for record in records:
        if record["target"] == "mean":
            cells = [
                f"{record[f'{column}_mean']:{'+' if column == 'difference' else ''}.1f} ± {record[f'{column}_sd']:.1f}"
                for column in columns
            ]
            lines.append([record["subset"], *cells, str(record["n"])])
    return aligned(lines), records


def compare(cohort: Cohort, options: argparse.Namespace) -> dict[str, Run]:
    """Both runs, and everything that ``options.out`` is to hold."""
    # Files of an earlier demo in the same folder are replaced, not added to.
    Path(options.out, "metrics.jsonl").unlink(missing_ok=True)
    presence = draw_presence(cohort.train.ids, cohort.missing_rates, seed=options.seed, modalities=cohort.modalities)
    runs = {
        "plain": run(cohort, presence, options, passion=False),
        "PASSION": run(cohort, presence, options, passion=True, log=RunLog(options.out)),
    }
    write(cohort, presence, options, runs)
    return runs


def write(cohort: Cohort, presence: PresenceTable, options: argparse.Namespace, runs: dict[str, Run]) -> None:
    """Write tables and pictures to ``options.out`` and print the table."""
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    plain, passion = runs["plain"], runs["PASSION"]
    text, records = table(plain.results, passion.results)
    real = presence.missing_rates
    caption = (
        f"Dice (%) on {cohort.name}, mean over {', '.join(cohort.regions)}, mean ± sd over test patients; "
        f"{options.backbone} network, {options.steps} steps of {options.batch_size} patches of "
        f"{options.patch}^3, seed {options.seed}. Missing in training: "
        + ", ".join(f"{name} {rate:.0%}" for name, rate in real.items())
        + f". Training took {plain.seconds:.0f} s plain and {passion.seconds:.0f} s with PASSION."
        + (f" Data: {cohort.credit}." if cohort.credit else "")
    )
    details = "".join(f"\n## {name}\n\n{each.results.to_markdown(digits=1)}" for name, each in runs.items())
    (out / "table.md").write_text(f"{caption}\n\n{text}{details}", encoding="utf-8")
    with (out / "summary.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    (out / "overlays").mkdir(exist_ok=True)
    for name, each in runs.items():
        each.results.to_csv(out / f"results-{name}.csv")
        figures.all_predictions(each.model, cohort, out / "overlays" / f"{name}.png")
    facts = {
        "options": {**vars(options), "out": str(out)},
        "config": asdict(PassionConfig(**dict(options.config))),
        "missing_rates": {"nominal": dict(cohort.missing_rates), "real": real},
        "seconds": {name: each.seconds for name, each in runs.items()},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    (out / "run.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
    if passion.history:
        plot_preference(passion.history, missing_rates=real).savefig(out / "preference.png", dpi=150)
    figures.heat_maps(plain.results, passion.results, out / "heatmap.png", credit=cohort.credit)
    figures.overlays({name: each.model for name, each in runs.items()}, cohort, out / "overlays.png")
    page, _ = write_report(out, command="python -m examples.demo")
    print(f"\n{caption}\n\n{text}\nTables and pictures are in {out}/, all of it on one page in {page}")


def parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    result = argparse.ArgumentParser(
        prog="python -m examples.demo", description=__doc__.splitlines()[0] if __doc__ else None
    )
    add = result.add_argument
    add("--data", default="phantom", help="'phantom' or a folder with real patients (default: phantom)")
    add("--out", default="demo_output", help="folder for tables and pictures (default: demo_output)")
    add("--backbone", choices=sorted(BACKBONES), default="uhemis")
    add("--steps", type=int, help="optimizer steps of each run (default: the data's own, 200 or 400)")
    add("--batch-size", type=int, default=2, help="patches per step (default: 2)")
    add("--patch", type=int, help="voxels of a patch per axis, a multiple of 8 (default: the data's own, 24 or 32)")
    add("--lr", type=float, default=3e-3, help="peak learning rate (default: 0.003)")
    add("--seed", type=int, default=0)
    add("--fold", type=int, default=0, help="test fold of a folder that has folds (default: 0)")
    add("--smoke", action="store_true", help="a few steps on tiny phantoms: does everything run?")
    add(
        "--config",
        nargs="*",
        default=[],
        type=lambda text: (text.split("=")[0], float(text.split("=")[1])),
        metavar="NAME=NUMBER",
        help="hyper-parameters of PassionConfig, as in --config temperature=2 unimodal_weight=0.5",
    )
    return result


def main(arguments: Sequence[str] | None = None) -> dict[str, Run]:
    """Parse the command line and run."""
    command = parser()
    options = command.parse_args(arguments)
    try:
        cohort = load_cohort(options.data, seed=options.seed, fold=options.fold, smoke=options.smoke)
    except (ConfigError, OSError) as error:
        command.error(str(error))
    options.steps = options.steps or (4 if options.smoke else cohort.steps)
    options.patch = options.patch or (16 if options.smoke else cohort.patch)
    return compare(cohort, options)


if __name__ == "__main__":
    main()
