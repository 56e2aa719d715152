"""Peak memory of every loss term, forward and backward, and of a whole training step.

python -m benchmarks.memory --what step --backbone my_module:factory --shape 1,4,80,80,80
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Iterator, Sequence

import torch

from benchmarks import tables
from benchmarks.cases import check_parity, draw_inputs, parity_case
from benchmarks.losses import case_options, cases, runnable
from benchmarks.measure import peak_memory
from benchmarks.operations import forward_backward
from benchmarks.problems import Problem
from benchmarks.results import Row, command_line, run, with_progress
from benchmarks.step import backbone_options, checked_problem, chosen_candidates, points
from benchmarks.training import build

__all__ = ["main", "measure"]


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for every candidate of every point."""
    if options.what in ("losses", "both"):
        yield from _losses(options)
    if options.what in ("step", "both"):
        yield from _steps(options)


def _losses(options: argparse.Namespace) -> Iterator[Row]:
    for case in with_progress(cases(options)):
        inputs = draw_inputs(case, options.device)
        found, missing = runnable(case, inputs, options.device)
        check_parity(parity_case(case, options.device), found, options.device)
        point = {"what": "loss", **{name: str(value) for name, value in vars(case).items()}}
        sizes = {"inputs_bytes": str(inputs.nbytes), "gradient_bytes": str(inputs.student.nbytes)}
        peaks = {
            name: peak_memory(functools.partial(forward_backward, loss, inputs), options.device)
            for name, loss in found.items()
        }
        for name, peak in peaks.items():
            ratio = {"ratio": f"{peak / peaks['naive']:.4g}"} if "naive" in peaks else {}
            yield {**point, "candidate": name, "status": "ok", **sizes, "peak_bytes": str(peak), **ratio}
        for name, status in missing.items():
            yield {**point, "candidate": name, "status": status}


def _steps(options: argparse.Namespace) -> Iterator[Row]:
    for point in with_progress([point for point in points(options) if point.sweep == "backbones"]):
        problem = checked_problem(point, options)
        plain: list[int] = []
        for name in chosen_candidates(options):
            peaks = _step_peaks(name, problem, options.device)
            plain = plain or peaks
            yield {
                "what": "step",
                **point.columns(),
                "candidate": name,
                "status": "ok",
                "peak_bytes": f"{statistics.mean(peaks):.0f}",
                "ratio": f"{statistics.mean(peaks) / statistics.mean(plain):.4g}",
                "largest_bytes": str(max(peaks)),
                "largest_ratio": f"{max(peaks) / max(plain):.4g}",
            }


def _step_peaks(name: str, problem: Problem, device: torch.device) -> list[int]:
    """Return the peak of each batch: what the step allocates, what stays between steps, and the batch."""
    candidate = build(name, problem)
    # The first step allocates the state of the optimizer, which is counted as what stays.
    candidate.step(problem.batches[0])
    stays = candidate.persistent_bytes() + sum(tensor.nbytes for tensor in problem.batches[0])
    return [peak_memory(functools.partial(candidate.step, batch), device) + stays for batch in problem.batches]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run; returns the exit status."""
    parser = command_line("memory", __doc__)
    parser.add_argument("--what", choices=("losses", "step", "both"), default="both")
    case_options(parser)
    backbone_options(parser)
    return run("memory", parser.parse_args(arguments), measure, tables.memory)


if __name__ == "__main__":
    raise SystemExit(main())
