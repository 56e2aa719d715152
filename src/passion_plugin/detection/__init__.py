"""Find out by experiment how to run a backbone.

* `_inspect`: :func:`inspect_backbone` prints what was found, :func:`detect_spec` returns the spec or raises. They ask
  `_checks` (mask, batch, layers), `_encoders` and `_classifier` (search), `_student_modes` and `_gradients` (students
  against true runs);
* `_prepare`: what the engine does when a backbone is wrapped, and with the first batch;
* `_probe` runs the backbone, as `_convention` says, in a `_sandbox`; `_report` holds and prints the answers.
"""

from passion_plugin.detection._convention import example_call
from passion_plugin.detection._inspect import detect_spec, inspect_backbone, inspect_call
from passion_plugin.detection._prepare import check_setup, example_heads, initial_spec, prepare_backbone
from passion_plugin.detection._report import BackboneReport

__all__ = [
    "BackboneReport",
    "check_setup",
    "detect_spec",
    "example_call",
    "example_heads",
    "initial_spec",
    "inspect_backbone",
    "inspect_call",
    "prepare_backbone",
]
