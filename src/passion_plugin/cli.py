"""The command line: ``inspect`` a model before it is wrapped, draw a ``split`` of who misses what, ``report`` a run.

Exit code 0; 1 when the model cannot be wrapped, which the report on standard output explains, or when there is no run
that could be reported; 2 for usage errors. Errors are on standard error, all of them at once.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from passion_plugin._validate import modality_problems
from passion_plugin.backbone import PRESETS, preset
from passion_plugin.data import draw_presence, write_split_csv
from passion_plugin.detection import inspect_backbone
from passion_plugin.errors import ConfigError, PassionError, suggest
from passion_plugin.report import write_report

__all__ = ["main"]

_MASKS = {"bool": torch.bool, "int": torch.int64, "float": torch.float32, "none": None}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: words after ``python -m passion_plugin``; those of this process when None.

    Returns:
        The exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        # Names that the terminal cannot show are no reason to fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    words = sys.argv[1:] if arguments is None else [*arguments]
    options = _parser().parse_args(words)
    options.command = shlex.join(["python", "-m", "passion_plugin", *words])
    problems: list[str] = []
    try:
        code = options.run(options, problems)
    except (PassionError, OSError, ImportError) as error:  # ImportError: an extra is not installed.
        problems.append(str(error))
        code = options.failed
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m passion_plugin", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="inspect | split | report")

    look = commands.add_parser("inspect", help="report how a model can be wrapped", allow_abbrev=False)
    look.set_defaults(run=_inspect, failed=2)
    look.add_argument("model", metavar="MODULE:FACTORY", help="what returns the model when called without arguments")
    look.add_argument("--input", required=True, metavar="B,C,*SPATIAL", help="shape of the images: 1,4,80,80,80")
    look.add_argument("--modalities", metavar="NAMES", help="flair,t1ce,t1,t2 in mask-column order; one per channel")
    look.add_argument("--spec", metavar="PRESET", help=f"a known network instead of a search: {', '.join(PRESETS)}")
    look.add_argument("--mask", choices=_MASKS, help="type of the mask, the second argument of the model (bool)")

    draw = commands.add_parser("split", help="draw which sample misses what", allow_abbrev=False)
    draw.set_defaults(run=_split, failed=2)
    draw.add_argument("names", metavar="FILE", help="names of the samples, one per line; - for standard input")
    draw.add_argument("--rates", required=True, metavar="NAME=RATE,…", help="missing rates in mask-column order")
    draw.add_argument("--seed", required=True, metavar="N", help="integer, so that the draw can be repeated")
    draw.add_argument("--out", metavar="CSV", help="write the split file of the published code, for four modalities")
    draw.add_argument("--table", metavar="CSV", help="write a presence table: any modalities, with names and rates")

    page = commands.add_parser("report", help="make one HTML file of a run", allow_abbrev=False)
    page.set_defaults(run=_report, failed=1)
    page.add_argument("folder", metavar="RUN_DIR", help="folder with metrics.jsonl, results.csv and overlays/*.png")
    page.add_argument("--out", metavar="HTML", help="the file to write (RUN_DIR/report.html)")
    return parser


def _inspect(options: argparse.Namespace, problems: list[str]) -> int:
    shape = [_number(int, part) for part in options.input.split(",")]
    if len(shape) < 3 or not all(isinstance(size, int) and size > 0 for size in shape):
        problems.append(
            f"--input: {options.input!r} is no shape; need batch, channels and spatial sizes such as 1,4,80,80,80"
        )
        shape = []  # The other options are checked all the same.
    names = [str(channel) for channel in range(shape[1] if shape else 0)]
    if options.modalities is not None:
        names = [name.strip() for name in options.modalities.split(",")]
        problems += [f"--modalities: {problem}" for problem in modality_problems(names)]
    torch.manual_seed(0)  # The same report each time.
    model = _model(options.model, problems)
    if model is None or problems:
        return 2
    known = {}
    if options.spec is not None:
        known = vars(preset(options.spec, model, names))
    kind = _MASKS[options.mask or "bool"]
    like = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), torch.empty(0))
    present = 0 if known.get("mask_meaning") == "missing" else 1
    mask = None if kind is None else torch.full((shape[0], len(names)), present, dtype=kind, device=like.device)
    images = torch.randn(shape, device=like.device, dtype=like.dtype)
    return 1 if inspect_backbone(model, images, mask, modalities=names, **known).problems else 0


def _split(options: argparse.Namespace, problems: list[str]) -> int:
    names = _names(options.names, problems)
    rates: dict[str, Any] = {}
    for pair in options.rates.split(","):
        name, _, rate = (part.strip() for part in pair.partition("="))
        if name in rates:
            problems.append(f"--rates: {name!r} is named more than once")
        rates[name] = _number(float, rate)
    outputs = [path for path in (options.out, options.table) if path is not None]
    # Before anything is written: both files or none.
    problems += [
        f"{path}: no file can be written there"
        for path in outputs
        if Path(path).is_dir() or not Path(path).parent.is_dir()
    ]
    if len({os.path.realpath(path) for path in (options.names, *outputs)}) < 1 + len(outputs):
        problems.append("FILE, --out and --table name the same file: one would be written over the other")
    if options.out is not None and len(rates) != 4:
        problems.append(f"--out: the format is for four modalities, here are {len(rates)}; use --table for any number")
    try:
        # Without names, any sample will do to find out what else is wrong.
        table = draw_presence(names or ["unknown"], rates, seed=_number(int, options.seed))
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        return 2
    print(table.describe())
    if options.out is not None:
        write_split_csv(table, options.out)
    if options.table is not None:
        table.save(options.table)
    return 0


def _report(options: argparse.Namespace, problems: list[str]) -> int:
    path, run = write_report(options.folder, options.out, command=options.command)
    for note in run.notes:
        print(f"note: {note}", file=sys.stderr)
    print(path)
    return 0


def _model(text: str, problems: list[str]) -> nn.Module | None:
    """Import and call ``module:factory``; a module that is there already is taken as it is."""
    module_name, _, name = text.partition(":")
    if not name.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        problems.append(f"model: {text!r} is not module:factory; that of nets/unet.py is nets.unet:factory")
        return None
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
        if not hasattr(module, name):
            problems.append(f"model: module {module_name!r} has no {name!r}.{suggest(name, vars(module))}")
            return None
        factory = getattr(module, name)
        model = factory if isinstance(factory, nn.Module) else factory()
    # SystemExit: a script that reads its own arguments when it is imported.
    except (Exception, SystemExit) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(f"{type(error).__name__}: {error} (line {frame.lineno} of {frame.filename})".split())
        problems.append(f"model: importing {text} and calling it without arguments failed: {reason}")
        return None
    if not isinstance(model, nn.Module):
        problems.append(f"model: {text} gives {type(model).__name__}; need a torch.nn.Module")
        return None
    return model


def _names(path: str, problems: list[str]) -> list[str]:
    try:
        # utf-8-sig: editors on Windows begin a file with a byte order mark.
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path}: {error.strerror if isinstance(error, OSError) else f'not UTF-8 text ({error})'}")
        return []
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        problems.append(f"{path}: no names in it; need one per line")
    return names


def _number(kind: type[int] | type[float], text: str) -> Any:
    """Return a number, or the text where it is none, for whoever checks it to show."""
    try:
        return kind(text)
    except ValueError:
        return text
