"""Sources of public backbones that are changed while they are imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools.backbones.checkout import load
from tools.backbones.sources import edited, replacing


def test_a_source_is_changed_in_memory_only(tmp_path: Path) -> None:
    (tmp_path / "layers.py").write_text("width = 256\n")
    text = "from layers import width\n\ndevice = 'cuda'\n"
    (tmp_path / "network.py").write_text(text)
    finders = list(sys.meta_path)
    with edited({"network": replacing(("'cuda'", "'cpu'")), "layers": replacing(("256", "64"))}):
        module = load(tmp_path, "network")
    assert (module.device, module.width) == ("cpu", 64)
    assert (tmp_path / "network.py").read_text() == text
    assert sys.meta_path == finders
    assert load(tmp_path, "network").device == "cuda"


def test_a_text_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "network.py").write_text("device = 'cuda'\n")
    with edited({"network": replacing(("cuda:0", "cpu"))}), pytest.raises(LookupError, match="is it another commit"):
        load(tmp_path, "network")


def test_packages_that_are_not_installed_are_stood_in_for(tmp_path: Path) -> None:
    (tmp_path / "network.py").write_text("import math\nfrom absent_package.deep import Thing\n")
    with edited(absent=("absent_package", "math")):
        module = load(tmp_path, "network")
    assert isinstance(module.Thing, type)
    assert module.math.pi > 3, "what is installed is not replaced"
    assert "absent_package" not in sys.modules
    with pytest.raises(ModuleNotFoundError, match="absent_package"):
        load(tmp_path, "network")
