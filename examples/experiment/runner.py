"""Run the cells of an experiment that are not finished."""

from __future__ import annotations

import functools
import hashlib
import importlib
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from examples.backbones import BACKBONES, RFNetLike, rfnet_spec
from examples.data import Cohort, phantom_cohort
from examples.experiment.cells import Cell
from examples.experiment.recipes import parse_recipe
from examples.experiment.store import Store, Study
from examples.experiment.views import Batches, predict_whole
from examples.folders import ms4_cohort, sts_slices
from examples.training import TASKS, train
from passion_plugin import __version__
from passion_plugin.baselines import SlowWeights
from passion_plugin.data import PresenceTable, draw_presence
from passion_plugin.errors import ConfigError
from passion_plugin.evaluation import SubsetResults, evaluate_subsets

__all__ = ["load", "patients_of", "presence_of", "run", "train_cell"]

_EPOCHS_KEPT = 15
_PHANTOMS = {"phantom": (32, 12, 40), "phantom-tiny": (4, 2, 16)}


def load(data: str, fold: int, held_out: str | None = None) -> Cohort:
    """Read the cohort that ``--data`` names.

    Args:
        data: ``"phantom"`` or ``"phantom-tiny"``, where every fold is made of patients of its own; a folder in
            one of the formats of :mod:`examples.folders`; or ``"module:function"``, called with ``fold=``.
        fold: test fold.
        held_out: a folder of other patients to test on, where ``data`` is one with ``index.json``; then all
            of that are trained on, whatever the fold.

    Raises:
        ConfigError: it is none of these, the folder is not as it should be or has no such fold, or ``held_out`` does
            not go with it.
    """
    folder = Path(data)
    try:
        if held_out is not None:
            return sts_slices(folder, fold, Path(held_out))
        if data in _PHANTOMS:
            return replace(phantom_cohort(fold, *_PHANTOMS[data]), name=data)
        if (folder / "index.json").is_file():
            return sts_slices(folder, fold)
        if any(folder.glob("ms_*.npz")):
            return ms4_cohort(folder, fold)
    except (ValueError, OSError) as error:
        given = f"--data {data!r}" if held_out is None else f"--held-out {held_out!r} with --data {data!r}"
        raise ConfigError(f"{given}: {error}") from error
    module, colon, name = data.partition(":")
    if colon and not folder.exists():
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"--data {data!r}: {error}; pass module:function that returns a Cohort") from error
        cohort = function(fold=fold)
        if not isinstance(cohort, Cohort):
            raise ConfigError(f"--data {data!r} returned {type(cohort).__name__}; it must be an examples.data.Cohort")
        return cohort
    raise ConfigError(
        f"--data {data!r} is not one of {', '.join(map(repr, _PHANTOMS))}, no folder with index.json or ms_*.npz "
        "files, and no module:function"
    )


def presence_of(cohort: Cohort, cell: Cell) -> PresenceTable:
    """Which training patient has what; the same for all strategies, networks and batch sizes."""
    digits = [round(1000 * rate) for rate in cell.rates.values()]
    seed = int(np.random.SeedSequence((cell.fold, cell.seed, *digits)).generate_state(1)[0])
    return draw_presence(cohort.train.ids, cell.rates, seed=seed, modalities=cohort.modalities)


def patients_of(cohort: Cohort) -> str:
    """A digest of the names of training and test patients, by which the results of others are told apart."""
    names = "\n".join([*map(str, cohort.train.ids), "", *map(str, cohort.test.ids)])
    return hashlib.sha1(names.encode(), usedforsecurity=False).hexdigest()[:12]


def train_cell(
    cell: Cell, cohort: Cohort, study: Study, *, device: str = "cpu", quiet: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """Train one network.

    Returns:
        The bare backbone, and ``{"run": facts, "history": preference by epoch}``.

    Raises:
        FloatingPointError: the training diverged.
    """
    recipe, presence = parse_recipe(cell.strategy), presence_of(cohort, cell)
    torch.manual_seed(cell.seed)
    model = BACKBONES[cell.backbone](cohort.modalities, cohort.num_classes, ndim=study.ndim, widths=study.widths)
    model.to(device)
    rfnet = isinstance(model, RFNetLike)
    # Other networks: None, the spec is detected from the first batch.
    spec = rfnet_spec(cohort.modalities, levels=len(study.widths)) if rfnet else None
    batches = Batches(
        cohort.train,
        presence,
        recipe.drawing,
        (study.patch,) * study.ndim,
        batch_size=cell.batch_size,
        steps=study.steps,
        seed=int(np.random.SeedSequence((cell.fold, cell.seed)).generate_state(1)[0]),
        device=device,
    )
    start = time.perf_counter()
    if rfnet:
        model.is_training = True
    slow = SlowWeights(model, every=2 ** len(cohort.modalities) - 1) if recipe.slow else None
    history = train(
        model,
        batches,
        steps=study.steps,
        steps_per_epoch=max(1, len(presence) // cell.batch_size),
        wrap=recipe.wrap(presence, spec, TASKS[study.task]),
        lr=study.lr,
        task=study.task,
        name=cell.strategy,
        quiet=quiet,
        after_step=slow.step if slow else None,
    )
    if rfnet:
        model.is_training = False
    seconds = time.perf_counter() - start
    kept = sorted({round(i) for i in np.linspace(0, len(history) - 1, _EPOCHS_KEPT)}) if history else []
    return model, {
        "run": {
            "status": "ok",
            "missing": ",".join(f"{name}={rate:.4g}" for name, rate in presence.missing_rates.items()),
            "patients": patients_of(cohort),
            "training_seconds": round(seconds, 2),
            "steps": study.steps,
            "patch": study.patch,
            "weights": sum(p.numel() for p in model.parameters()),
            "drawing": recipe.drawing + "+slow" * recipe.slow,
            "rule": recipe.rule,
            "parameters": recipe.parameters,
            "threads": torch.get_num_threads(),
            "device": device,
            "package": _package(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "history": [
            [history[i].epoch, *_rounded(history[i].beta), *_rounded(history[i].relative_preference)] for i in kept
        ],
    }


def evaluate(model: nn.Module, cohort: Cohort, study: Study) -> SubsetResults:
    """Score every subset of modalities on the whole test patients."""
    items = (cohort.test[index] for index in range(len(cohort.test)))
    return evaluate_subsets(
        model,
        ({key: [value] if key == "id" else value[None] for key, value in item.items()} for item in items),
        modalities=cohort.modalities,
        num_classes=cohort.num_classes,
        regions=cohort.regions,
        hd95=study.hd95,
        predict=predict_whole((study.patch,) * study.ndim),
    )


def run_cell(
    cell: Cell, cohort: Cohort, study: Study, store: Store, *, device: str, keep_models: bool, quiet: bool
) -> dict[str, Any]:
    """Train and evaluate one cell, and store it. A training that diverged is a result too."""
    try:
        model, record = train_cell(cell, cohort, study, device=device, quiet=quiet)
    except FloatingPointError as error:
        record = {"run": {"status": f"failed: {error}"}, "history": [], "scores": []}
    else:
        start = time.perf_counter()
        results = evaluate(model, cohort, study)
        record["run"]["evaluation_seconds"] = round(time.perf_counter() - start, 2)
        digits = {"dice": 4, "hd95": 1}
        record["scores"] = [
            [*row[:4], None if row.value is None else round(row.value, digits[row.metric]), row.status]
            for row in results.rows
        ]
        if keep_models:
            path = store.model_path(cell)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), path)
    store.save(cell, record)
    return record


def run(
    cells: Sequence[Cell],
    cohort_of: Callable[[int], Cohort],
    study: Study,
    store: Store,
    *,
    device: str = "cpu",
    keep_models: bool = True,
) -> int:
    """Run what is not finished yet, in the order given, and pack the results into CSV files.

    Args:
        cells: what is wanted.
        cohort_of: the cohort of a fold.
        study: what all cells share.
        store: where results go.
        device: where to train.
        keep_models: store trained weights too.

    Returns:
        How many cells were trained.

    Raises:
        ConfigError: the folder holds results with other settings or of other patients.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    store.claim(study)
    cohort_of = functools.lru_cache(maxsize=2)(cohort_of)
    trained = 0
    with tqdm(cells, desc="cells", unit="cell", smoothing=0.1) as bar:
        for cell in bar:
            # Looked up now and not in advance: another process may have finished it meanwhile.
            cohort = cohort_of(cell.fold)
            if store.has(cell, patients_of(cohort)):
                continue
            record = run_cell(cell, cohort, study, store, device=device, keep_models=keep_models, quiet=True)
            trained += 1
            dice = [score[4] for score in record["scores"] if score[3] == "dice" and score[4] is not None]
            facts = record["run"]
            outcome = f"Dice {100 * np.mean(dice):.1f}" if dice else facts["status"]
            tqdm.write(f"{cell.key}: {outcome}, {facts.get('training_seconds', 0):.0f} s")
    store.pack()
    return trained


@functools.cache
def _package() -> str:
    """Version of this package, and in a clone the commit: ``"0.1.0+g1a2b3c4"``, with ``-dirty`` if it was changed."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return __version__
    return f"{__version__}+g{found.stdout.strip()}"


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
