"""The house: what lies at the root of the package, and which parts of it import without which others."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import passion_plugin

PACKAGE = Path(passion_plugin.__file__).parent
LEAVES = ("baselines", "integrations", "phantom", "report", "testing")
ROOMS = {"backbone", "data", "detection", "evaluation", "losses", "training", *LEAVES}
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)
# Packages that a module or room imports at its top.
NEEDED = {
    "passion_plugin.integrations.lightning": "lightning",
    "passion_plugin.losses.kernels": "triton",
    "passion_plugin.testing": "hypothesis",
}


def python(code: str) -> str:
    """Run code in a new process that imports the package from where it is here; return its output."""
    path = os.pathsep.join([str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_root_holds_rooms_and_little_else() -> None:
    names = {path.name for path in PACKAGE.iterdir()} - {"__pycache__"}
    files = {"__init__", "__main__", "_types", "_validate", "cli", "config", "errors", "wrapper"}
    assert names == {*(f"{name}.py" for name in files), "py.typed", *ROOMS}


TRAIN = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(tuple(f"passion_plugin.{leaf}" for leaf in LEAVES)):
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
for name in CORE:
    importlib.import_module(name)

import torch
from torch import nn
from passion_plugin import PassionWrapper

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.t1_encoder, self.t2_encoder = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 4, 3, padding=1)
        self.classifier = nn.Conv2d(4, 2, 1)

    def forward(self, x, mask):
        features = torch.stack([self.t1_encoder(x[:, :1]), self.t2_encoder(x[:, 1:])], dim=1).relu()
        weight = mask[:, :, None, None, None].float()
        return self.classifier((features * weight).sum(1) / weight.sum(1))

torch.manual_seed(0)
model = PassionWrapper(Net(), modalities=("t1", "t2"), missing_rates={"t1": 0.2, "t2": 0.8})
target = torch.randint(2, (2, 8, 8))
prediction = model(torch.rand(2, 2, 8, 8), torch.tensor([[True, True], [True, False]]))
loss = nn.functional.cross_entropy(prediction, target) + model.passion_loss(target)
loss.backward()
model.end_epoch()
print(all(parameter.grad is not None for parameter in model.parameters()), loss.isfinite().item())
print(*[name for name in sys.modules if name.split(".")[:1] == ["passion_plugin"] and name.split(".")[1:2] and
        name.split(".")[1] in LEAVES])
"""


def test_the_core_trains_without_the_leaf_rooms() -> None:
    above = {"passion_plugin.__main__", "passion_plugin.cli"}
    core = [
        name
        for name in MODULES
        if name not in above and not name.startswith(tuple(f"passion_plugin.{leaf}" for leaf in LEAVES))
        if "losses.kernels" not in name  # Needs triton; has a test of its own below.
    ]
    assert len(core) > 40
    said = python(f"LEAVES, CORE = {LEAVES!r}, {core!r}\n{TRAIN}")
    assert said.splitlines() == ["True True", ""]


EACH_FIRST = """
import importlib, os, sys, traceback
import torch

for name in MODULES:
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(name)
        except BaseException:
            print(f"--- {name}", traceback.format_exc(limit=-6), flush=True)
            os._exit(1)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="torch may not survive a fork on this system")
def test_every_module_can_be_imported_first() -> None:
    missing = [prefix for prefix, needed in NEEDED.items() if importlib.util.find_spec(needed) is None]
    modules = [name for name in MODULES if not name.startswith(tuple(missing))]
    assert len(modules) > 60
    assert python(f"MODULES = {modules!r}\n{EACH_FIRST}") == ""
