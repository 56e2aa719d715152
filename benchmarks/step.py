"""Time of a whole training step: plain, with naive PASSION, with ours; and what the wrapper costs in eval().

python -m benchmarks.step --backbone my_module:factory --shape 1,4,80,80,80
"""

from __future__ import annotations

import argparse
import functools
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks import tables
from benchmarks.measure import interleaved
from benchmarks.problems import Problem, pose
from benchmarks.results import Row, command_line, rows_of_times, run, timing_options, with_progress
from benchmarks.training import CANDIDATES, CONFIGS, build, check_parity
from examples.backbones import BACKBONES, rfnet_spec

__all__ = ["Point", "backbone_options", "checked_problem", "chosen_candidates", "main", "measure", "points"]

_NAMES = ("flair", "t1ce", "t1", "t2", "pd", "dwi")
_RATES = (0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True)
class Point:
    """One point of a sweep.

    Attributes:
        sweep: what is varied: ``"backbones"``, ``"modalities"`` or ``"rate"``.
        backbone: a name of the examples, or ``module:factory``.
        shape: (B, M, *spatial).
        modalities: M names.
        rates: M missing rates.
    """

    sweep: str
    backbone: str
    shape: tuple[int, ...]
    modalities: tuple[str, ...]
    rates: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.backbone} {'x'.join(map(str, self.shape))}, missing {','.join(map('{:g}'.format, self.rates))}"

    def columns(self) -> Row:
        """Return it as the first columns of a row."""
        return {
            "sweep": self.sweep,
            "backbone": self.backbone.partition(":")[2] or self.backbone,
            "shape": "x".join(map(str, self.shape)),
            "modalities": str(len(self.modalities)),
            "missing": " ".join(f"{rate:g}" for rate in self.rates),
        }


def backbone_options(parser: argparse.ArgumentParser) -> None:
    """Add which backbones are measured, on what."""
    add = parser.add_argument
    add("--backbone", help="one of the examples, or module:factory of your own (default: all examples)")
    add("--shape", type=_numbers(int), help="B,M,*spatial of the images (default: 1,4,48,48,48; --full: 1,4,80,80,80)")
    add("--modalities", type=lambda text: tuple(text.split(",")), help="M names (default: flair,t1ce,t1,t2)")
    add("--rates", type=_numbers(float), help="M missing rates (default: 0.2,0.4,0.6,0.8)")
    add("--candidates", nargs="*", choices=CANDIDATES, metavar="NAME", help="what is measured (default: all)")
    add(
        "--parity-shape",
        type=_numbers(int),
        help="B,M,*spatial of the images that candidates are compared on first; naive PASSION, the reference, needs "
        "several times the memory of the others (default: as --shape)",
    )
    add("--draws", type=int, help="batches, each with a presence of its own (default: 5; --full: 20)")


def _numbers(kind: type) -> Any:
    def parse(text: str) -> tuple[Any, ...]:
        return tuple(kind(part) for part in text.split(","))

    parse.__name__ = f"list of {kind.__name__}"
    return parse


def points(options: argparse.Namespace) -> list[Point]:
    """Return the backbones; unless the user named one, also sweeps over M and over the rate of missing modalities."""
    names = options.modalities or _NAMES[: options.shape[1] if options.shape else 4]
    side = 80 if options.full else 48
    shape = options.shape or (1, len(names), side, side, side)
    rates = options.rates or (_RATES if len(names) == 4 else _even_rates(len(names)))
    if not shape[1] == len(names) == len(rates):
        raise SystemExit(f"{shape[1]} channels in --shape, {len(names)} --modalities, {len(rates)} --rates")
    if options.backbone is not None:
        return [Point("backbones", options.backbone, shape, names, rates)]
    found = [Point("backbones", name, shape, names, rates) for name in BACKBONES]
    small = shape[2:] if options.full else tuple(min(size, 32) for size in shape[2:])
    for count in (2, 4, 6):
        images = (shape[0], count, *small)
        found.append(Point("modalities", "uhemis", images, _NAMES[:count], _even_rates(count)))
    for rate in (0.0, 0.25, 0.5, 0.75):
        found.append(Point("rate", "uhemis", (shape[0], 4, *small), _NAMES[:4], (rate,) * 4))
    return found


def _even_rates(count: int) -> tuple[float, ...]:
    return tuple(round(0.2 + 0.6 * index / max(1, count - 1), 3) for index in range(count))


def problem_of(point: Point, options: argparse.Namespace) -> Problem:
    """Build the backbone and the batches of a point."""
    draws = options.draws or (20 if options.full else 5)
    rates = dict(zip(point.modalities, point.rates, strict=True))
    return pose(functools.partial(_make, point), point.shape, rates, draws=draws, device=options.device)


def _make(point: Point) -> Any:
    if ":" in point.backbone:
        module, _, factory = point.backbone.partition(":")
        return getattr(importlib.import_module(module), factory)()
    if point.backbone not in BACKBONES:
        raise SystemExit(f"--backbone {point.backbone!r}: pass one of {sorted(BACKBONES)} or module:factory")
    backbone: Any = BACKBONES[point.backbone](point.modalities, ndim=len(point.shape) - 2)
    if point.backbone != "rfnet":
        return backbone
    # As in its own training script: uni-modal and coarse predictions are supervised too.
    backbone.is_training = True
    return backbone, rfnet_spec(point.modalities)


def checked_problem(point: Point, options: argparse.Namespace) -> Problem:
    """Build the backbone and the batches of a point, and compare what is measured with naive PASSION.

    Raises:
        ParityError: a candidate computes something else.
    """
    problem = problem_of(point, options)
    compared = problem
    if options.parity_shape:
        compared = problem_of(replace(point, shape=options.parity_shape), options)
    check_parity(compared, [name for name in chosen_candidates(options) if name in CONFIGS])
    return problem


def chosen_candidates(options: argparse.Namespace) -> list[str]:
    """Return the candidates of training steps that are asked for; plain training, the baseline, always."""
    return [name for name in CANDIDATES if name == "plain" or name in (options.candidates or CANDIDATES)]


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for every candidate of every point, in training and in evaluation."""
    for point in with_progress(points(options)):
        problem = checked_problem(point, options)
        found = {name: build(name, problem) for name in chosen_candidates(options)}
        calls = {
            name: [functools.partial(candidate.step, batch) for batch in problem.batches]
            for name, candidate in found.items()
        }
        limits = {"device": options.device, "rounds": options.rounds, "seconds": options.seconds}
        for row in rows_of_times(interleaved(calls, **limits), baseline="plain"):
            yield {**point.columns(), "stage": "training", **row}
        if point.sweep == "backbones" and "ours" in found:
            calls = {
                name: [functools.partial(found[name].evaluate, batch) for batch in problem.batches]
                for name in ("plain", "ours")
            }
            for row in rows_of_times(interleaved(calls, **limits), baseline="plain"):
                yield {**point.columns(), "stage": "evaluation", **row}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run; returns the exit status."""
    parser = command_line("step", __doc__)
    backbone_options(parser)
    timing_options(parser, rounds=7, seconds=20)
    return run("step", parser.parse_args(arguments), measure, tables.step)


if __name__ == "__main__":
    raise SystemExit(main())
