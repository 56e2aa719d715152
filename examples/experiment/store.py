"""The folder of an experiment: what all its cells share, and one file for every cell that is finished.

Files appear complete or not at all (written under another name, then renamed), so that several processes may
share a folder and any of them may be killed at any time.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from examples.experiment import packing
from examples.experiment.cells import Cell
from passion_plugin.errors import ConfigError, raise_problems

__all__ = ["Store", "Study"]


@dataclass(frozen=True)
class Study:
    """What all cells of a folder have in common.

    Attributes:
        name: of the data.
        credit: to be quoted with every figure.
        modalities: in mask order.
        classes: names of the labels.
        regions: what is scored: name to labels.
        ndim: 2: slice by slice.
        steps: optimizer steps of every training.
        patch: voxels of a training patch, per axis.
        lr: peak learning rate.
        widths: channels of the networks, by level.
        task: the user's own loss.
        hd95: whether the 95 % Hausdorff distance was computed too.
        unit: of that distance, ``"mm"`` or ``"voxels"``.
        primary: the regions that tables average; empty: all of them.
        held_out: whether the test patients come from a folder of their own; folds are then repetitions.
    """

    name: str
    credit: str
    modalities: list[str]
    classes: list[str]
    regions: dict[str, list[int]]
    ndim: int
    steps: int
    patch: int
    lr: float
    widths: list[int]
    task: str
    hd95: bool
    unit: str = "mm"
    primary: list[str] = field(default_factory=list)
    held_out: bool = False


class Store:
    """A folder with results; created when something is written."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def study(self) -> Study:
        """What the cells have in common.

        Raises:
            ConfigError: the folder holds no experiment.
        """
        path = self.folder / "study.json"
        if not path.is_file():
            raise ConfigError(f"{self.folder} has no study.json; an experiment writes it there: --results FOLDER")
        return Study(**json.loads(path.read_text(encoding="utf-8")))

    def claim(self, study: Study) -> None:
        """Note what the cells have in common, or check that it is what it was.

        Raises:
            ConfigError: the folder belongs to an experiment with other settings.
        """
        path = self.folder / "study.json"
        if not path.is_file():
            _write(path, json.dumps(asdict(study), indent=2))
        old, new = asdict(self.study()), asdict(study)
        problems = [f"{name} was {old[name]!r} and is {new[name]!r} now" for name in new if old[name] != new[name]]
        raise_problems(problems, what=f"{self.folder} belongs to another experiment; choose another folder")

    def model_path(self, cell: Cell) -> Path:
        """Where the trained weights are put; ``*.pt`` files are not committed."""
        return self.folder / "models" / f"{cell.key}.pt"

    def has(self, cell: Cell, patients: str) -> bool:
        """Whether a cell is finished.

        Args:
            cell: one training.
            patients: digest of those that it is about to be trained and tested on.

        Raises:
            ConfigError: it is finished, with other patients.
        """
        path = self._path(cell)
        if path.is_file():
            facts = json.loads(path.read_text(encoding="utf-8"))["run"]
        elif cell.key in self._packed:
            facts = self._packed[cell.key]
        else:
            return False
        # Results of earlier versions do not tell.
        if facts.get("patients", patients) != patients:
            raise ConfigError(
                f"{self.folder} has the results of {cell.key}, trained or tested on other patients than those given "
                "now; choose another folder for these"
            )
        return True

    def save(self, cell: Cell, record: dict[str, Any]) -> None:
        """Add a finished cell."""
        _write(self._path(cell), json.dumps({"cell": asdict(cell), **record}, separators=(",", ":")))

    def records(self) -> list[dict[str, Any]]:
        """All finished cells, ``{"cell", "run", "history", "scores"}`` each, in a fixed order."""
        found = packing.unpack(self.folder)
        for path in self.folder.glob("cells/*.json"):
            record = json.loads(path.read_text(encoding="utf-8"))
            found[Cell(**record["cell"]).key] = record
        return [found[key] for key in sorted(found)]

    def pack(self) -> None:
        """Write all finished cells as the CSV files that are committed; what is in them counts as finished."""
        for name, content in packing.pack(self.records(), self.study().modalities).items():
            _write(self.folder / name, content)

    @functools.cached_property
    def _packed(self) -> dict[str, dict[str, Any]]:
        """Facts of the packed cells by key; their scores are not kept in memory."""
        return {key: record["run"] for key, record in packing.unpack(self.folder).items()}

    def _path(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell.key}.json"


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)
