"""One training step: forward, students, loss, epoch.

:class:`PassionEngine` runs a step, a :class:`Strategy` decides which students it has and what the loss is;
:class:`PassionRule` is PASSION itself, :class:`Plain` does nothing. Subclass :class:`Strategy` for a rule of your own.
"""

from passion_plugin.training._distributed import all_reduce_sum
from passion_plugin.training._engine import (
    PassionEngine,
    attach,
    find_engine,
    get_passion_state_dict,
    set_passion_state_dict,
)
from passion_plugin.training._frequencies import ModalityFrequencies
from passion_plugin.training._gradient_scaling import scale_gradient
from passion_plugin.training._metrics import EPOCH_QUANTITIES, by_modality, epoch_records, is_of_an_epoch
from passion_plugin.training._objective import LossTerms, UnimodalLoss, passion_objective
from passion_plugin.training._preference import EpochReport, PreferenceEstimator, project_beta
from passion_plugin.training._state import cpu_copies, state_problems
from passion_plugin.training._step import TrainingStep
from passion_plugin.training._strategy import PassionRule, Plain, Strategy

__all__ = [
    "EPOCH_QUANTITIES",
    "EpochReport",
    "LossTerms",
    "ModalityFrequencies",
    "PassionEngine",
    "PassionRule",
    "Plain",
    "PreferenceEstimator",
    "Strategy",
    "TrainingStep",
    "UnimodalLoss",
    "all_reduce_sum",
    "attach",
    "by_modality",
    "cpu_copies",
    "epoch_records",
    "find_engine",
    "get_passion_state_dict",
    "is_of_an_epoch",
    "passion_objective",
    "project_beta",
    "scale_gradient",
    "set_passion_state_dict",
    "state_problems",
]
