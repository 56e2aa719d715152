"""Where the time of a training step goes, by kind of work, for the plain step and those with PASSION.

python -m benchmarks.profile --backbone my_module:factory --shape 1,4,80,80,80
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks import tables
from benchmarks.problems import Problem
from benchmarks.results import Row, command_line, run, with_progress
from benchmarks.step import backbone_options, checked_problem, chosen_candidates, points
from benchmarks.training import Candidate, build
from passion_plugin.backbone import active_students

__all__ = ["KINDS", "main", "measure"]

_LOSSES = "losses of PASSION"
_OTHER = "everything else"
_PARTS_OF_NAMES = {
    "convolutions": ("conv",),
    "normalisation": ("norm",),
    "padding and interpolation": ("pad", "upsample"),
    "matrix products": ("mm", "linear", "attention"),
}

KINDS = (_LOSSES, *_PARTS_OF_NAMES, _OTHER)
"""Kinds of work, in the order of the table. Losses of PASSION are our operators, whatever they call themselves."""


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for every candidate and kind of work of every backbone: seconds of a step, mean over the draws."""
    for point in with_progress([point for point in points(options) if point.sweep == "backbones"]):
        problem = checked_problem(point, options)
        students = sum(int(active_students(batch.mask).sum()) for batch in problem.batches) / len(problem.batches)
        for name in chosen_candidates(options):
            times = _profiled(build(name, problem), problem)
            for kind in KINDS:
                yield {
                    **point.columns(),
                    "students": f"{students:g}",
                    "candidate": name,
                    "kind": kind,
                    "seconds": f"{times[kind] / len(problem.batches):.4g}",
                }


def _profiled(candidate: Candidate, problem: Problem) -> Counter[str]:
    """Return the seconds of one step on every batch, by kind of work."""
    times: Counter[str] = Counter()
    for batch in problem.batches:
        candidate.step(batch)  # memory that is used for the first time is slower
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            candidate.step(batch)
        for event in profiler.events() or ():
            times[_kind(event)] += event.self_cpu_time_total / 1e6
    return times


def _kind(event: Any) -> str:
    ancestor = event
    while ancestor is not None:
        if "passion_plugin" in ancestor.name:
            return _LOSSES
        ancestor = ancestor.cpu_parent
    name = event.name.lower()
    return next((kind for kind, parts in _PARTS_OF_NAMES.items() if any(part in name for part in parts)), _OTHER)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run; returns the exit status."""
    parser = command_line("profile", __doc__)
    backbone_options(parser)
    options = parser.parse_args(arguments)
    if options.device.type != "cpu":
        parser.error("operators are timed on the CPU: use torch.profiler with a trace viewer for a GPU")
    return run("profile", options, measure, tables.profile)


if __name__ == "__main__":
    raise SystemExit(main())
