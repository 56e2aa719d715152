"""Find out by experiment how to run a backbone.

* :func:`inspect_backbone` prints what was found; :func:`detect_spec` returns the spec or raises.
* :func:`prepare_backbone` is what the engine calls with the first batch.
"""

from passion_plugin.detection._inspect import (
    check_setup,
    detect_spec,
    example_call,
    example_heads,
    initial_spec,
    inspect_backbone,
    prepare_backbone,
)
from passion_plugin.detection._report import BackboneReport
from passion_plugin.detection._sandbox import reseed

__all__ = [
    "BackboneReport",
    "check_setup",
    "detect_spec",
    "example_call",
    "example_heads",
    "initial_spec",
    "inspect_backbone",
    "prepare_backbone",
    "reseed",
]
