"""Balancing rules to compare with, each from its paper, beside the same backbone and engine.

=========================== ==================================================================================
``strategy=``               rule
=========================== ==================================================================================
None                        PASSION as ``config`` says: :class:`PassionRule`
``"plain"``                 :class:`Plain`: the user's own loss on imperfect data, nothing else
``"ogm-ge"``                :class:`OGMGE`: hold back the encoder that is ahead, add noise (CVPR 2022)
``"agm"``                   :class:`AGM`: scale encoders by Shapley shares and their running mean (ICCV 2023)
``"pmr"``                   :class:`PMR`: prototype cross-entropy for the slow modality (CVPR 2023)
``"redcore"``               :class:`RedCore`: uni-modal losses weighted by relative advantage (AAAI 2024)
``"passion"``               PASSION (ACM MM 2024); the same as None without a ``config``
``"passion-official"``      as the published code
``"passion-students"``      students trained on the labels alone, without distillation
``"passion-pixel"``         pixel distillation only
``"passion-prototype"``     prototype distillation only, without its gate
``"passion-both"``          both, without gate and beta
``"passion-gate"``          both and the gate; with beta it is ``"passion"``
=========================== ==================================================================================

Modality dropping (:func:`~passion_plugin.missing.drop_modalities`) and even drawing of combinations
(:class:`~passion_plugin.missing.EvenSubsets`) belong to the data and go with any of them; :class:`SlowWeights` follows
the optimizer. A rule of one's own is a subclass of :class:`Strategy`.

Example:
    >>> from passion_plugin.strategies import OGMGE, strategy_names
    >>> OGMGE(alpha=0.8).students
    'scored'
    >>> "passion-gate" in strategy_names()
    True
"""

from __future__ import annotations

from passion_plugin.baselines._agm import AGM
from passion_plugin.baselines._named import named_strategy, passion_variant, strategy_names
from passion_plugin.baselines._ogm import OGMGE
from passion_plugin.baselines._pmr import PMR
from passion_plugin.baselines._redcore import RedCore
from passion_plugin.baselines._slow_weights import SlowWeights

__all__ = [
    "AGM",
    "OGMGE",
    "PMR",
    "RedCore",
    "SlowWeights",
    "named_strategy",
    "passion_variant",
    "strategy_names",
]
