"""Choices that several rooms share, as types."""

from __future__ import annotations

from typing import Literal

Mode = Literal["default", "official"]
Modulation = Literal["distillation", "encoder", "none"]
Memory = Literal["default", "low"]
Backend = Literal["auto", "eager", "triton"]
Outputs = Literal["softmax", "sigmoid"]
StudentMode = Literal["auto", "replay", "mixed", "rerun", "heads"]
