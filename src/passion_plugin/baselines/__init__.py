"""Other balancing rules to compare with, each from its paper, on the same backbone and engine.

=========================== ==================================================================================
name                        ``strategy=``
=========================== ==================================================================================
``"plain"``                 :class:`~passion_plugin.training.Plain`: the user's own loss on incomplete data
``"ogm-ge"``                :class:`OGMGE`: slow the encoder that is ahead, add noise (CVPR 2022)
``"agm"``                   :class:`AGM`: scale encoders by Shapley shares and their running mean (ICCV 2023)
``"pmr"``                   :class:`PMR`: prototype cross-entropy for the slow modality (CVPR 2023)
``"redcore"``               :class:`RedCore`: uni-modal losses weighted by relative advantage (AAAI 2024)
``"passion"``               PASSION (ACM MM 2024), :class:`~passion_plugin.training.PassionRule`, the default
``"passion-official"``      as the published code
``"passion-students"``      students trained on the labels alone, without distillation
``"passion-pixel"``         pixel distillation only
``"passion-prototype"``     prototype distillation only, without its gate
``"passion-both"``          both, without gate and beta
``"passion-gate"``          both and the gate; with beta it is ``"passion"``
=========================== ==================================================================================

Pass an object, ``strategy=OGMGE()``; scripts that know names call :func:`named_strategy`. Dropping modalities
(:func:`~passion_plugin.data.drop_modalities`) and drawing combinations evenly
(:class:`~passion_plugin.data.EvenSubsets`) belong to the data and go with any strategy; :class:`SlowWeights` follows
the optimizer. A rule of your own is a subclass of :class:`~passion_plugin.training.Strategy`.

Example:
    >>> from passion_plugin.baselines import named_strategy, strategy_names
    >>> strategy, config = named_strategy("passion-pixel")
    >>> config.prototype_weight
    0.0
    >>> "ogm-ge" in strategy_names()
    True
"""

from passion_plugin.baselines._extra_losses import PMR, RedCore
from passion_plugin.baselines._gradient_modulation import AGM, OGMGE
from passion_plugin.baselines._named import named_strategy, strategy_names
from passion_plugin.baselines._slow_weights import SlowWeights

__all__ = ["AGM", "OGMGE", "PMR", "RedCore", "SlowWeights", "named_strategy", "strategy_names"]
