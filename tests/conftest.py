"""Fixtures and switches that every test shares."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

GOLDEN = Path(__file__).parent / "golden"

# Shared runners are slow and uneven: a time limit per example fails for reasons that are not ours.
# In CI the examples are the same on every run, so that a red run can be repeated.
settings.register_profile("dev", deadline=None)
settings.register_profile(
    "ci", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
# Many more cases than any change needs: before a release, and after changes to what users hand over.
settings.register_profile(
    "fuzz",
    deadline=None,
    max_examples=500,
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_configure(config: pytest.Config) -> None:
    """One thread: shapes are tiny, results repeat bit for bit, and xdist workers do not fight for cores."""
    torch.set_num_threads(1)
    os.environ.setdefault("MPLBACKEND", "Agg")
    # Read when cuBLAS starts, which PyTorch demands of deterministic algorithms on a GPU.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Read when a kernel is defined. Without a GPU the kernels are tested in Triton's interpreter.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what asks for real data, skip what needs a GPU where there is none."""
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "data_dir" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.data)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with the real patients; skips where it is not there."""
    named = os.environ.get("PASSION_DATA")
    if not named:
        pytest.skip("real patients are not part of the repository: set PASSION_DATA to their folder")
    path = Path(named).expanduser().resolve()
    if not path.is_dir():
        pytest.skip(f"PASSION_DATA={named!r} is not a folder")
    return path


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, torch.Tensor]]:
    """Loader of reference figures: ``golden("pixel_b1_T4")["loss"]``, with the dtypes as stored."""

    def load(name: str) -> dict[str, torch.Tensor]:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
            return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays.files}

    return load
