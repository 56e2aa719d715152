"""Everything that knows how to talk to a backbone."""

from __future__ import annotations

from passion_plugin.backbone._adapter import BackboneAdapter, CallFormat
from passion_plugin.backbone._calls import (
    Argument,
    BackboneCall,
    batch_size,
    blank,
    channel_share,
    check_images,
    first_image,
    join,
    locate_argument,
    split,
    vector_hint,
)
from passion_plugin.backbone._features import FeatureCache, OutputCapture, resolve_module
from passion_plugin.backbone._heads import UnimodalHead, build_heads, feature_maps
from passion_plugin.backbone._masks import MaskCodec
from passion_plugin.backbone._passes import (
    FusedPass,
    Skip,
    Student,
    concatenate_students,
    fused_pass,
    passes_reentrant,
    reentrant_problem,
    run_students,
    student_pass,
)
from passion_plugin.backbone._patching import (
    CONTAINERS,
    Handler,
    ModuleState,
    is_uninitialized,
    patched_forward,
    preserved_buffers,
    preserved_rng_state,
    restore_containers,
)
from passion_plugin.backbone._prediction import PREDICTION_KEYS, Prediction, maps_in, prediction_of, rival_predictions
from passion_plugin.backbone._presets import PRESETS, find_preset, preset
from passion_plugin.backbone._sharding import has_collective_forward, is_distributed, is_sharded
from passion_plugin.backbone._skipping import zero_with_graph
from passion_plugin.backbone._spec import BackboneSpec
from passion_plugin.backbone._student_inputs import StudentInput, active_students, random_subsets, with_dummy_students

__all__ = [
    "CONTAINERS",
    "PREDICTION_KEYS",
    "PRESETS",
    "Argument",
    "BackboneAdapter",
    "BackboneCall",
    "BackboneSpec",
    "CallFormat",
    "FeatureCache",
    "FusedPass",
    "Handler",
    "MaskCodec",
    "ModuleState",
    "OutputCapture",
    "Prediction",
    "Skip",
    "Student",
    "StudentInput",
    "UnimodalHead",
    "active_students",
    "batch_size",
    "blank",
    "build_heads",
    "channel_share",
    "check_images",
    "concatenate_students",
    "feature_maps",
    "find_preset",
    "first_image",
    "fused_pass",
    "has_collective_forward",
    "is_distributed",
    "is_sharded",
    "is_uninitialized",
    "join",
    "locate_argument",
    "maps_in",
    "passes_reentrant",
    "patched_forward",
    "prediction_of",
    "preserved_buffers",
    "preserved_rng_state",
    "preset",
    "random_subsets",
    "reentrant_problem",
    "resolve_module",
    "restore_containers",
    "rival_predictions",
    "run_students",
    "split",
    "student_pass",
    "vector_hint",
    "with_dummy_students",
    "zero_with_graph",
]
