"""Time of every loss term, forward and backward: naive, compiled, ours, and the hardware's limit.

python -m benchmarks.losses --operations prototype --sides 80 --classes 4 --channels 8
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Iterator, Sequence

import torch

from benchmarks import tables
from benchmarks.cases import Case, candidates, check_parity, draw_inputs, parity_case, too_large
from benchmarks.floor import floor
from benchmarks.measure import interleaved
from benchmarks.operations import OPERATIONS, Inputs, Loss, forward_backward
from benchmarks.results import Row, command_line, rows_of_times, run, timing_options, with_progress

__all__ = ["case_options", "cases", "main", "measure", "runnable"]

_QUICK = {"sides": (32, 64, 80, 128, 160), "classes": (2, 4, 16), "channels": (8, 16, 32)}
_FULL = {**_QUICK, "sides": (32, 48, 64, 80, 96, 128, 160)}
_QUICK_OPERATIONS = ("pixel", "prototype", "segmentation")
_BASE = {"sides": 80, "classes": 4, "channels": 8}


def case_options(parser: argparse.ArgumentParser) -> None:
    """Add what restricts the sweep."""
    add = parser.add_argument
    add("--operations", nargs="*", choices=list(OPERATIONS), metavar="NAME", help=f"of {', '.join(OPERATIONS)}")
    add("--sides", type=int, nargs="*", help=f"voxels along each axis (default: {_QUICK['sides']})")
    add("--classes", type=int, nargs="*", help=f"K (default: {_QUICK['classes']})")
    add("--channels", type=int, nargs="*", help=f"C of the features (default: {_QUICK['channels']})")
    add("--batch", type=int, default=1, help="B (default: 1)")
    add("--dtypes", nargs="*", choices=("float32", "bfloat16"), default=["float32"], metavar="DTYPE")


def cases(options: argparse.Namespace) -> list[Case]:
    """Return the points of the sweep.

    All combinations with ``--full`` or where the user named values; otherwise one number at a time is varied
    around 80^3 voxels, K = 4, C = 8.
    """
    chosen = {name: getattr(options, name) for name in _QUICK}
    if options.full or any(chosen.values()):
        values = {name: chosen[name] or (_FULL[name] if options.full else (_BASE[name],)) for name in _QUICK}
        points = [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]
    else:
        points = [{**_BASE, name: value} for name in _QUICK for value in _QUICK[name]]
    operations = options.operations or (OPERATIONS if options.full else _QUICK_OPERATIONS)
    found = [
        Case(
            operation,
            point["sides"],
            point["classes"],
            point["channels"] if OPERATIONS[operation].on_features else 0,
            options.batch,
            dtype,
        )
        for operation, dtype, point in itertools.product(operations, options.dtypes, points)
    ]
    # The base point occurs in every direction, and C makes no difference to operations on logits.
    return list(dict.fromkeys(found))


def runnable(case: Case, inputs: Inputs, device: torch.device) -> tuple[dict[str, Loss], dict[str, str]]:
    """Return the candidates that can be run, and for the others the reason why not."""
    found, missing = candidates(case, device), {}
    reason = too_large(case, device)
    for name in ("naive", *OPERATIONS[case.operation].others) if reason else ():
        missing[name] = f"skipped: {reason}"
        del found[name]
    try:
        forward_backward(found["compiled"], inputs)
    except Exception as error:  # no C++ compiler, an unsupported Python, ...: the reasons are many
        missing["compiled"] = f"not available: {type(error).__name__}"
        del found["compiled"]
    return found, missing


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for every candidate of every point."""
    for case in with_progress(cases(options)):
        inputs = draw_inputs(case, options.device)
        found, missing = runnable(case, inputs, options.device)
        check_parity(parity_case(case, options.device), found, options.device)
        calls = {name: [functools.partial(forward_backward, loss, inputs)] for name, loss in found.items()}
        times = interleaved(calls, device=options.device, rounds=options.rounds, seconds=options.seconds)
        least, limit = floor(OPERATIONS[case.operation].work(inputs), inputs.nbytes, options.device)
        point = {name: str(value) for name, value in vars(case).items()}
        for row in rows_of_times(times, baseline="ours"):
            yield {**point, **row, "floor_seconds": f"{least:.4g}", "floor_limit": limit}
        for name, status in missing.items():
            yield {**point, "candidate": name, "status": status}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run; returns the exit status."""
    parser = command_line("losses", __doc__)
    case_options(parser)
    timing_options(parser, rounds=21, seconds=3)
    return run("losses", parser.parse_args(arguments), measure, tables.losses)


if __name__ == "__main__":
    raise SystemExit(main())
