"""The loop over a loader and over the subsets of modalities: what the model is given, and what it returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from passion_plugin._validate import describe, modality_problems
from passion_plugin.backbone import prediction_of, rival_predictions
from passion_plugin.data import all_subsets, blank_missing, parse_subset, subset_mask, subset_name
from passion_plugin.errors import BackboneError, ConfigError, InputError, raise_problems, require, shortlist
from passion_plugin.evaluation._metrics import BRATS_PENALTY, Scorer
from passion_plugin.evaluation._results import STATUS, Row, SubsetResults

Predict: TypeAlias = Callable[[Any, Any, Tensor], Tensor]
"""``predict(model, x, mask)`` -> scores (B, K, *spatial); ``mask`` is bool (B, M), True = present."""


def call_model(model: Any, x: Any, mask: Tensor) -> Tensor:
    """Call ``model(x, mask)`` and find the scores in what it returns, as training does: ``prediction_of``."""
    output = model(x, mask)
    hint = "Pass predict=lambda model, x, mask: ... that returns the scores as (B, K, *spatial)."
    if rivals := rival_predictions(output):
        raise InputError(f"the model returns {shortlist(rivals)}, and any of them may be the prediction. {hint}")
    try:
        return prediction_of(output)
    except BackboneError as error:
        raise InputError(f"{error} {hint}") from error


def sliding_window_predict(
    roi_size: int | Sequence[int],
    *,
    sw_batch_size: int = 4,
    overlap: float = 0.5,
    blend: Literal["constant", "gaussian"] = "constant",
    predict: Predict = call_model,
) -> Predict:
    """Make a ``predict`` that runs MONAI's sliding-window inference.

    Windows of several samples meet in one window batch; each is sent with the mask row of the sample it was
    cut from. Scores of overlapping windows are averaged before argmax or sigmoid.

    Args:
        roi_size: size of a window, one number or one per spatial axis.
        sw_batch_size: windows per call of the model.
        overlap: overlap of neighbouring windows, as a fraction of the window, in [0, 1).
        blend: ``"constant"`` weights all voxels of a window alike, ``"gaussian"`` its centre more.
        predict: how one batch of windows is run.

    Returns:
        A function for ``evaluate_subsets(..., predict=...)``; its ``x`` must be a tensor (B, M·C, *spatial).

    Raises:
        ImportError: MONAI is not installed.
    """
    sliding_window = require("monai.inferers", extra="monai", purpose="sliding_window_predict").sliding_window_inference

    def predict_by_windows(model: Any, x: Any, mask: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise InputError(f"sliding_window_predict needs a tensor (B, M·C, *spatial), not a {type(x).__name__}.")

        def run(windows: Tensor, coordinates: Sequence[Sequence[slice]]) -> Tensor:
            # The first slice of a window's coordinates picks its sample: the order of windows is MONAI's.
            rows = torch.tensor([window[0].start for window in coordinates], device=mask.device)
            # MONAI weights the scores in place; a model may have returned a view of its input.
            return predict(model, windows, mask[rows]).to(x.dtype, copy=True)

        scores: Tensor = sliding_window(x, roi_size, sw_batch_size, run, overlap=overlap, mode=blend, with_coord=True)
        return scores

    return predict_by_windows


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
        model: called as ``model(x, mask)`` with mask bool (B, M) and x as in training: (B, M·C, *spatial), C channels
            for each modality, or a list of M tensors, or a mapping from modality to tensor. Other containers are
            passed on as they are: the mask alone then says what is absent.
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
    chosen = _chosen(subsets, modalities)
    scorer = Scorer(num_classes, regions, outputs, apply_sigmoid, threshold, empty, hd95, hd95_empty, hd95_penalty)
    if device is None and isinstance(model, nn.Module):
        device = next((parameter.device for parameter in model.parameters()), None)
    if progress:
        loader = require("tqdm", extra="examples", purpose="progress=True").tqdm(loader, "evaluation", unit="batch")
    # Per subset and sample: its rows, or None when the sample lacks a modality of the subset.
    scored: dict[str, dict[str, list[Row] | None]] = {name: {} for name in chosen}
    seen: set[str] = set()
    units: set[str] = set()
    with _evaluating(model):
        for item in loader:
            item = item if batch is None else batch(item)
            current = _read_batch(item, modalities, first=len(seen), device=device, spacing=spacing)
            for name in current.ids:
                if name in seen:
                    raise InputError(f"sample id {name!r} comes twice; every sample needs its own.")
                seen.add(name)
            units.add("voxels" if current.spacing is None else "mm")
            for name, mask in chosen.items():
                scored[name] |= _score(model, predict, current, name, mask, modalities, scorer)
    template = next((rows for found in scored.values() for rows in found.values() if rows), [])
    problems = [] if seen else ["the loader is empty (or a generator that has been used up)."]
    if hd95 and len(units) > 1:
        problems.append("some batches have a spacing and some have none; pass spacing= for all.")
    if seen and not template:
        problems.append(f"no sample has all modalities of any of the subsets {list(scored)}.")
    raise_problems(problems, what="evaluate_subsets", error=InputError)
    rows: list[Row] = []
    for name, found in scored.items():
        for sample, own in found.items():
            rows += own or [Row(name, sample, row.target, row.metric, None, "missing") for row in template]
    return SubsetResults(modalities, tuple(rows), scorer.conventions(units.pop()))


class _Batch(NamedTuple):
    x: Any  # a tensor (B, M·C, *spatial), or a container of tensors with B rows
    label: Tensor  # (B, ...)
    presence: Tensor  # bool (B, M), which modalities each sample really has
    ids: tuple[str, ...]
    spacing: tuple[tuple[float, ...], ...] | None  # voxel size in mm per sample and axis


def _score(
    model: Callable[..., Any],
    predict: Predict,
    batch: _Batch,
    subset: str,
    mask: Tensor,
    modalities: tuple[str, ...],
    scorer: Scorer,
) -> dict[str, list[Row] | None]:
    """Rows of every sample of a batch for one subset; None for a sample that lacks one of its modalities."""
    mask = mask.to(batch.presence.device)
    found: dict[str, list[Row] | None] = dict.fromkeys(batch.ids)
    rows = (batch.presence | ~mask).all(dim=1).nonzero().flatten()
    ids = [batch.ids[row] for row in rows.tolist()]
    if not ids:
        return found
    scores = predict(model, _inputs(batch.x, rows, mask, modalities), mask.expand(len(rows), -1).clone())
    where = f"subset {subset!r}, samples {ids}"
    if not isinstance(scores, Tensor) or scores.ndim < 3 or len(scores) != len(ids):
        found_shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(f"{where}: the scores are {found_shape}; they must be (B, K, *spatial) with B = {len(ids)}.")
    if bool(scores.isnan().any()):
        raise InputError(f"{where}: the model's scores contain NaN. Is a modality of the input NaN?")
    spacing = None if batch.spacing is None else [batch.spacing[row] for row in rows.tolist()]
    label = batch.label[rows]
    values, empties = scorer.values(scores.to(label.device), label, spacing)
    names = scorer.names(scores.shape[1])
    for b, sample in enumerate(ids):
        found[sample] = [
            Row(subset, sample, name, metric, None if math.isnan(value) else value, STATUS[empty])
            for metric, table in values.items()
            for name, value, empty in zip(names, table[b].tolist(), empties[b].tolist(), strict=True)
        ]
    return found


def _inputs(x: Any, rows: Tensor, mask: Tensor, modalities: Sequence[str]) -> Any:
    """Rows of ``x`` in which every modality outside the mask (M,) is zero, whatever was there."""
    # Taking rows copies, so a model that works in place cannot spoil the next subset.
    taken = _map_tensors(x, lambda tensor: tensor[rows])
    if isinstance(taken, Tensor):
        return blank_missing(taken, mask.expand(len(rows), -1))
    if isinstance(taken, Mapping):
        keep = dict(zip(modalities, mask.tolist(), strict=True))
        return {
            name: part if keep.get(name, True) else _map_tensors(part, torch.zeros_like) for name, part in taken.items()
        }
    if isinstance(taken, (list, tuple)) and len(taken) == len(modalities):
        kept = zip(taken, mask.tolist(), strict=True)
        return type(taken)(part if keep else _map_tensors(part, torch.zeros_like) for part, keep in kept)
    return taken


def _read_batch(
    item: Any,
    modalities: Sequence[str],
    *,
    first: int,
    device: torch.device | str | None,
    spacing: Sequence[float] | None,
) -> _Batch:
    """Read one item of a loader; ``first`` is the number of its first sample, ``spacing`` goes before its own."""
    fields = _fields(item)
    x = _map_tensors(fields["image"], lambda tensor: tensor.to(device))
    label = _as_tensor(fields["label"], "label", device)
    size = len(label) if label.ndim else 0
    if isinstance(x, Tensor) and (x.ndim < 3 or len(x) != size or x.shape[1] % len(modalities) != 0):
        raise InputError(
            f"image has shape {tuple(x.shape)}, label {tuple(label.shape)}; image must be (B, M·C, *spatial) "
            f"with the label's B and C channels for each of {', '.join(modalities)}."
        )
    missing = [name for name in modalities if name not in x] if isinstance(x, Mapping) else []
    if 0 < len(missing) < len(modalities):
        raise InputError(
            f"image has entries {shortlist(x)} and none for {shortlist(missing)}; name an entry like each "
            "modality, so that what a subset lacks can be blanked, or none of them"
        )
    presence = fields.get("mask")
    presence = torch.ones(size, len(modalities)) if presence is None else _as_tensor(presence, "mask")
    if presence.shape != (size, len(modalities)) or not bool(((presence == 0) | (presence == 1)).all()):
        raise InputError(
            f"mask is {presence.dtype} of shape {tuple(presence.shape)}; it must be (B, M) = "
            f"({size}, {len(modalities)}), True where the sample has the modality."
        )
    ids = fields.get("id")
    ids = range(first, first + size) if ids is None else [ids] if isinstance(ids, str) else list(ids)
    if len(ids) != size:
        raise InputError(f"the batch has {size} samples and {len(ids)} ids; give one per sample.")
    return _Batch(
        x=x,
        label=label,
        presence=presence.bool().to(label.device),
        ids=tuple(str(name.item() if isinstance(name, Tensor) else name) for name in ids),
        spacing=_spacings(spacing if spacing is not None else fields.get("spacing"), size),
    )


def _fields(item: Any) -> Mapping[str, Any]:
    found = describe(item)
    if isinstance(item, Mapping):
        if {"image", "label"} <= set(item):
            return item
        found = f"a mapping with keys {sorted(map(str, item))}"
    elif isinstance(item, (tuple, list)):
        if len(item) in (2, 3):
            return {"image": item[0], "mask": item[1] if len(item) == 3 else None, "label": item[-1]}
        found += f" of {len(item)}"
    raise InputError(
        f"the loader yields {found}; it must yield a mapping with 'image' and 'label' (and 'mask', 'id', "
        "'spacing'), (x, label) or (x, mask, label). Pass batch=function to turn yours into one of these."
    )


def _spacings(spacing: Any, size: int) -> tuple[tuple[float, ...], ...] | None:
    if spacing is None:
        return None
    if isinstance(spacing, (list, tuple)) and all(isinstance(part, Tensor) and part.ndim == 1 for part in spacing):
        # Of a tuple of numbers in each item the default collate function makes a tensor (B,) for each axis.
        spacing = torch.stack(list(spacing), dim=1 if all(len(part) == size for part in spacing) else 0)
    values = torch.as_tensor(spacing, dtype=torch.float64)
    if values.ndim == 1:
        values = values.expand(size, -1)
    if values.ndim != 2 or len(values) != size:
        raise InputError(f"spacing has shape {tuple(values.shape)}; give (axes,) for all samples or (B, axes), in mm.")
    return tuple(tuple(row) for row in values.tolist())


def _as_tensor(value: Any, name: str, device: torch.device | str | None = None) -> Tensor:
    try:
        return torch.as_tensor(value).to(device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} is a {type(value).__name__} that is no tensor: {error}") from error


def _map_tensors(structure: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``function`` to every tensor in nested mappings, lists and tuples."""
    if isinstance(structure, Tensor):
        return function(structure)
    if isinstance(structure, Mapping):
        return {key: _map_tensors(value, function) for key, value in structure.items()}
    if isinstance(structure, (list, tuple)):
        parts = [_map_tensors(value, function) for value in structure]
        return parts if isinstance(structure, list) else tuple(parts)
    return structure


def _chosen(subsets: Iterable[str | Sequence[str]] | None, modalities: tuple[str, ...]) -> dict[str, Tensor]:
    """Turn the ``subsets`` argument into names and masks (M,), each once."""
    wanted = all_subsets(modalities) if subsets is None else [subsets] if isinstance(subsets, str) else subsets
    problems: list[str] = []
    chosen: dict[str, Tensor] = {}
    for subset in wanted:
        try:
            members = parse_subset(subset, modalities)
            chosen[subset_name(members)] = subset_mask(members, modalities)
        except ConfigError as error:
            problems.append(str(error))
    if not chosen and not problems:
        problems.append("no subset is given; leave the argument out for all of them.")
    raise_problems(problems, what="subsets", error=ConfigError)
    return chosen


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
