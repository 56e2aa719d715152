"""The reconstruction network of Hafner et al. (2022): fused and classified in the script, outside ``forward``."""

from __future__ import annotations

from pathlib import Path

import torch

from passion_plugin.backbone import BackboneSpec
from tools.backbones.dual_stream import COMMIT, CONFIGURATION, DATE, SOURCE, make, networks
from tools.backbones.trial import Trial

__all__ = ["COMMIT", "DATE", "SOURCE", "build"]


def build(checkout: Path) -> Trial:
    """Build the network with the topology of its debug configuration."""
    torch.manual_seed(0)
    parts = [torch.randn(2, 2, 32, 32), torch.randn(2, 4, 32, 32)]
    return Trial(
        model=networks(checkout).ReconstructionNetV1(CONFIGURATION),
        inputs=tuple(parts),
        modalities=("s1", "s2"),
        spec=BackboneSpec(classifier="outc.conv", input_argument=(0, 1), mask_argument=None),
        written='`spec=BackboneSpec(classifier="outc.conv", input_argument=(0, 1), mask_argument=None)`',
        traps="`forward` returns features; the script puts them together, with reconstructed ones where a sensor is "
        "missing, and classifies them itself: move that into `forward`",
        expect="refused",
        reason="'outc.conv' was called 0 times in one pass",
        target=(torch.rand(2, 1, 32, 32) > 0.7).float(),
        images=parts,
        make=make,
        call={"passion_presence": torch.ones(2, 2, dtype=torch.bool)},
        size="16 and 32 channels, 32²",
    )
