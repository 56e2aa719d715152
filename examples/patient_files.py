"""Files of patients, read whole and checked, so that what is wrong with a folder is known before any training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from passion_plugin.errors import ConfigError, raise_problems, short

__all__ = ["array_names", "read_folds", "read_patients"]

Arrays = dict[str, NDArray[Any]]


def read_folds(folder: Path) -> dict[str, int]:
    """The fold of every patient in ``index.json``, in the order of their names.

    Raises:
        ConfigError: there is no such file, or it is not ``{"subjects": {name: {"fold": number}}}``.
    """
    path = folder / "index.json"
    what = f'{path} must hold {{"subjects": {{name: {{"fold": 0}}, ...}}}}, see examples/README.md'
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{what}: {short(error)}") from error
    subjects = content.get("subjects") if isinstance(content, dict) else None
    if not isinstance(subjects, dict) or not subjects:
        found = f"the keys {', '.join(content)}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ConfigError(f"{what}: no subjects found, but {found}")
    folds: dict[str, Any] = {
        name: entry.get("fold") if isinstance(entry, dict) else None for name, entry in sorted(subjects.items())
    }
    raise_problems(
        [f"the fold of {name!r} is {fold!r}, no whole number" for name, fold in folds.items() if type(fold) is not int],
        what=what,
    )
    return folds


def array_names(path: Path) -> list[str]:
    """What the arrays of an ``.npz`` file are called, in the order in which they were saved.

    Raises:
        ConfigError: it is no such file.
    """
    return _read(path, ())[0]


def read_patients(
    paths: Mapping[str, Path], *, images: Sequence[str], labels: Mapping[str, int], spacing: bool
) -> dict[str, Arrays]:
    """Read one ``.npz`` file per patient into memory; arrays of other names in it are left alone.

    Args:
        paths: file by patient.
        images: names of arrays (z, y, x) of finite numbers.
        labels: names of arrays (z, y, x) of whole numbers 0..K-1, and their K.
        spacing: whether there must be an array ``spacing`` (3,) of positive numbers, mm along z, y and x.

    Returns:
        Arrays by patient and name, with the dtypes of the file.

    Raises:
        ConfigError: with all that is wrong in any of the files.
    """
    needed = [*images, *labels, *["spacing"] * spacing]
    found: dict[str, Arrays] = {}
    problems = []
    for name, path in paths.items():
        try:
            names, found[name] = _read(path, needed)
        except ConfigError as error:
            problems.append(str(error))
            continue
        if missing := [key for key in needed if key not in names]:
            problems.append(f"{path}: {', '.join(missing)} missing; it has {', '.join(names) or 'nothing'}")
        problems += [f"{path}: {problem}" for problem in _array_problems(found[name], labels)]
    what = f"each patient is an .npz file with {', '.join([*images, *labels])}, arrays (z, y, x)"
    raise_problems(problems, what=f"{what}{', and spacing (3,)' * spacing}; see examples/README.md")
    return found


def _read(path: Path, needed: Sequence[str]) -> tuple[list[str], Arrays]:
    """The names of all arrays of a file, and those that are needed."""
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file")
    try:
        with np.load(path) as file:
            return file.files, {key: file[key] for key in needed if key in file.files}
    except Exception as error:  # archive, compression, header, pickle: a dozen classes, and always the file's fault
        raise ConfigError(f"{path}: not an .npz file that can be read ({short(error)})") from error


def _array_problems(arrays: Arrays, labels: Mapping[str, int]) -> list[str]:
    """What is wrong with the arrays of one patient."""
    problems = []
    shapes = {key: array.shape for key, array in arrays.items() if key != "spacing"}
    if len(set(shapes.values())) > 1 or any(len(shape) != 3 or 0 in shape for shape in shapes.values()):
        each = ", ".join(f"{key} {shape}" for key, shape in shapes.items())
        problems.append(f"arrays must be (z, y, x), all of one shape, and are {each}")
    for key, array in arrays.items():
        if array.dtype.kind not in "buif":
            problems.append(f"{key} has dtype {array.dtype}; it must hold numbers")
        elif not np.isfinite(array).all():
            problems.append(f"{key} has values that are NaN or infinite")
        elif key in labels and not np.isin(array, np.arange(labels[key])).all():
            problems.append(f"{key} has values other than the whole numbers 0 to {labels[key] - 1}")
        elif key == "spacing" and (array.shape != (3,) or (array <= 0).any()):
            problems.append(f"spacing must be three positive numbers, mm along z, y and x, and is {array.tolist()}")
    return problems
