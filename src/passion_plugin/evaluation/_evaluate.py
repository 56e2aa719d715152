"""The loop over a loader and over the subsets of modalities."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from passion_plugin.data import all_subsets, modality_problems, parse_subset, subset_mask, subset_name
from passion_plugin.errors import ConfigError, InputError, raise_problems, require
from passion_plugin.evaluation._batches import Batch, read_batch
from passion_plugin.evaluation._inference import Predict, call_model
from passion_plugin.evaluation._metrics import BRATS_PENALTY
from passion_plugin.evaluation._results import SubsetResults
from passion_plugin.evaluation._rows import Convention, Row
from passion_plugin.evaluation._scoring import Scorer
from passion_plugin.evaluation._targets import Targets

__all__ = ["evaluate_subsets"]


def evaluate_subsets(
    model: Callable[..., Any],
    loader: Iterable[Any],
    *,
    modalities: Sequence[str],
    num_classes: int | None = None,
    regions: Mapping[str, Sequence[int]] | None = None,
    subsets: Iterable[str | Sequence[str]] | None = None,
    outputs: Literal["softmax", "sigmoid"] = "softmax",
    apply_sigmoid: bool = True,
    threshold: float = 0.5,
    empty: Literal["skip", "one"] = "skip",
    hd95: bool = False,
    hd95_empty: Literal["zero", "skip"] = "zero",
    hd95_penalty: float = BRATS_PENALTY,
    spacing: Sequence[float] | None = None,
    predict: Predict = call_model,
    batch: Callable[[Any], Any] | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> SubsetResults:
    """Score a model on every subset of its modalities.

    For each subset the channels outside it are set to zero and their mask columns to False. A sample that
    lacks a modality of the subset is left out of that subset, and the results count it. The model runs in
    ``eval()`` without gradients; the training flag of every sub-module and the CPU random state are put
    back afterwards, also after an error.

    Args:
        model: called as ``model(x, mask)`` with x (B, M, *spatial) and mask bool (B, M).
        loader: yields mappings with ``"image"`` and ``"label"``, and optionally ``"mask"`` (what the sample
            really has), ``"id"`` and ``"spacing"`` (mm); or tuples (x, label) or (x, mask, label).
        modalities: names in mask order.
        num_classes: score channels K, checked when given.
        regions: name -> labels in it, such as :data:`BRATS_REGIONS`; None scores classes 1..K-1, or with
            ``outputs="sigmoid"`` every channel against its own mask.
        subsets: names such as ``"flair+t1ce"`` or sequences of modalities; None means all 2^M - 1.
        outputs: ``"softmax"`` takes the argmax, ``"sigmoid"`` thresholds channel k for target k.
        apply_sigmoid: False when a sigmoid model returns probabilities.
        threshold: probability above which a sigmoid target is predicted.
        empty: Dice when both masks are empty: ``"skip"`` leaves the sample out of the mean, ``"one"`` counts
            1. Exactly one mask empty gives 0.
        hd95: also compute the 95 % Hausdorff distance (needs the ``monai`` extra).
        hd95_empty: HD95 when both masks are empty: ``"zero"`` or ``"skip"``.
        hd95_penalty: HD95 when exactly one mask is empty; 373.13 mm is the BraTS convention, the published
            code gives 1.0.
        spacing: voxel size in mm per spatial axis, for HD95; None takes the batch's, or counts in voxels.
        predict: ``predict(model, x, mask)`` -> scores (B, K, *spatial), for models that are called another
            way or return something else; see :func:`sliding_window_predict`.
        batch: turns an item of the loader into one of the forms above.
        device: where to run; None takes the device of the model's first parameter.
        progress: show a tqdm bar.

    Returns:
        The results, rows ordered by subset, sample, metric and target.

    Raises:
        ConfigError: an argument is wrong, such as an unknown modality in ``subsets``.
        InputError: the loader is empty, or a batch or the model's output does not fit.
        ImportError: ``hd95`` or ``progress`` needs a package that is not installed.

    Example:
        >>> x = torch.tensor([[[0.0, 9.0, 9.0], [9.0, 9.0, 0.0]]])  # two modalities, three voxels
        >>> label = torch.tensor([[0, 1, 1]])
        >>> def model(x, mask):
        ...     return torch.stack([torch.full_like(x[:, 0], 5.0), x.sum(1)], dim=1)
        >>> results = evaluate_subsets(model, [(x, label)], modalities=("flair", "t1"))
        >>> [(row.subset, row.target, round(row.value, 2)) for row in results.rows]
        [('flair', 'class 1', 1.0), ('t1', 'class 1', 0.5), ('flair+t1', 'class 1', 0.8)]
    """
    raise_problems(modality_problems(modalities), what="evaluate_subsets", error=ConfigError)
    modalities = tuple(modalities)
    chosen = _resolve(subsets, modalities)
    scorer = Scorer(
        Targets(num_classes, regions, outputs, apply_sigmoid, threshold),
        empty,
        hd95,
        hd95_empty,
        hd95_penalty,
    )
    if device is None and isinstance(model, nn.Module):
        device = next((parameter.device for parameter in model.parameters()), None)
    # Per subset and sample: its rows, or None when the sample lacks a modality of the subset.
    scored: dict[str, dict[str, list[Row] | None]] = {subset_name(subset): {} for subset in chosen}
    seen: set[str] = set()
    units: set[str] = set()
    with _evaluating(model):
        for item in _bar(loader, progress):
            item = item if batch is None else batch(item)
            current = read_batch(item, modalities, first=len(seen), device=device, spacing=spacing)
            for name in current.ids:
                if name in seen:
                    raise InputError(f"sample id {name!r} comes twice; every sample needs its own.")
                seen.add(name)
            units.add("voxels" if current.spacing is None else "mm")
            for subset in chosen:
                scored[subset_name(subset)] |= _score_batch(model, predict, current, subset, modalities, scorer)
    _check_run(len(seen), units if hd95 else set(), scored)
    return _collect(scored, modalities, scorer.conventions(unit=units.pop()))


def _score_batch(
    model: Callable[..., Any],
    predict: Predict,
    batch: Batch,
    subset: tuple[str, ...],
    modalities: tuple[str, ...],
    scorer: Scorer,
) -> dict[str, list[Row] | None]:
    """Rows of every sample of a batch for one subset; None for a sample that lacks one of its modalities."""
    wanted = subset_mask(subset, modalities).to(batch.presence.device)
    complete = (batch.presence | ~wanted).all(dim=1)
    found: dict[str, list[Row] | None] = dict.fromkeys(batch.ids)
    rows = complete.nonzero().flatten()
    if not len(rows):
        return found
    ids = [batch.ids[row] for row in rows.tolist()]
    label = batch.label[rows]
    scores = predict(model, batch.inputs(rows, wanted, modalities), wanted.expand(len(rows), -1).clone())
    where = f"subset {subset_name(subset)!r}, samples {ids}"
    if not isinstance(scores, Tensor) or scores.ndim < 3 or len(scores) != len(rows):
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(f"{where}: the scores are {shape}; they must be (B, K, *spatial) with B = {len(rows)}.")
    if bool(scores.isnan().any()):
        raise InputError(f"{where}: the model's scores contain NaN. Is a modality of the input NaN?")
    spacing = None if batch.spacing is None else [batch.spacing[row] for row in rows.tolist()]
    return found | scorer.rows(scores.to(label.device), label, ids, subset_name(subset), spacing)


def _resolve(subsets: Iterable[str | Sequence[str]] | None, modalities: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Turn the ``subsets`` argument into tuples in mask order, each once."""
    if subsets is None:
        return list(all_subsets(modalities))
    if isinstance(subsets, str):
        subsets = [subsets]
    problems: list[str] = []
    chosen: dict[tuple[str, ...], None] = {}
    for subset in subsets:
        try:
            chosen[parse_subset(subset, modalities)] = None
        except ConfigError as error:
            problems.append(str(error))
    if not chosen and not problems:
        problems.append("no subset is given; leave the argument out for all of them.")
    raise_problems(problems, what="subsets", error=ConfigError)
    return list(chosen)


@contextmanager
def _evaluating(model: object) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards everything is as it was."""
    flags = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    # no_grad, not inference_mode: a model may cache a tensor that its next training step has to use.
    # fork_rng: a DataLoader draws a seed when it starts, which would change the training that goes on.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            if isinstance(model, nn.Module):
                model.eval()
            yield
        finally:
            for module, training in flags:
                module.training = training


def _bar(loader: Iterable[Any], progress: bool) -> Iterable[Any]:
    if not progress:
        return loader
    bar: Iterable[Any] = require("tqdm", extra="examples", purpose="progress=True").tqdm(
        loader, desc="evaluation", unit="batch"
    )
    return bar


def _check_run(samples: int, units: set[str], scored: Mapping[str, Mapping[str, Any]]) -> None:
    problems = []
    if not samples:
        problems.append("the loader is empty (or a generator that has been used up).")
    if len(units) > 1:
        problems.append("some batches have a spacing and some have none; pass spacing= for all.")
    if samples and not any(rows for found in scored.values() for rows in found.values()):
        problems.append(f"no sample has all modalities of any of the subsets {list(scored)}.")
    raise_problems(problems, what="evaluate_subsets", error=InputError)


def _collect(
    scored: Mapping[str, Mapping[str, list[Row] | None]],
    modalities: tuple[str, ...],
    conventions: Mapping[str, Convention],
) -> SubsetResults:
    template = next(rows for samples in scored.values() for rows in samples.values() if rows)
    rows = []
    for subset, samples in scored.items():
        for sample, found in samples.items():
            rows += found or [Row(subset, sample, row.target, row.metric, None, "missing") for row in template]
    return SubsetResults(modalities, tuple(rows), conventions)
