"""Every hyper-parameter of the method, with its symbol and its source."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from passion_plugin._types import Backend, Memory, Mode, Modulation
from passion_plugin._validate import is_int, is_number, is_one_of
from passion_plugin.errors import raise_problems

__all__ = ["HOW_PASSES_RUN", "Memory", "Mode", "Modulation", "PassionConfig"]

HOW_PASSES_RUN = ("memory", "skip_missing_encoders", "share_random_state", "backend")
"""Fields that every strategy uses: how passes are run and losses computed, not what is learned from them."""


@dataclass(frozen=True, kw_only=True)
class PassionConfig:
    r"""Hyper-parameters of PASSION (arXiv:2407.14796), immutable and checked on construction.

    The objective that :meth:`PassionWrapper.passion_loss` adds to the user's own loss is

    .. math::
        \frac1B \sum_b \sum_m a_{bm} w_m \left(
            \lambda_{pix} \beta_m K^{pix}_{bm} + \lambda_{proto}\, \omega_{bm} P_{bm} + u\, S_{bm} \right).

    ``subset_students`` adds the same terms of one random subset of the modalities of a sample, without
    :math:`w`, :math:`\beta` and :math:`\omega`.

    Attributes:
        mode: ``"default"`` is the clean mathematics; ``"official"`` reproduces the numbers of the
            published code at batch size 1, including its clamps, its up-sampled coarse outputs, one gate
            per batch, and gate and beta on the uni-modal segmentation term.
        temperature: :math:`T`, softens both sides of the pixel distillation. Paper: 4.
        pixel_weight: :math:`\lambda_{pix}`, weight of the pixel distillation. Published code: 0.5.
        prototype_weight: :math:`\lambda_{proto}`, weight of the prototype distillation. Published code: 0.1.
        unimodal_weight: :math:`u`, weight of the uni-modal segmentation loss. Part of the paper's task loss.
        rarity_weights: whether :math:`w_m = N / N_m`; False: :math:`w_m = 1`, for data that is drawn so that rare
            modalities are seen as often as common ones (:class:`~passion_plugin.data.EvenSubsets`).
        subset_students: whether a sample that has three modalities or more has one student more, which sees a random
            subset of them: two at least and not all. Otherwise training shows what samples have and single
            modalities, and nothing in between. Default mode only.
        eta: :math:`\eta`, step size of the beta update. Published code: 0.01.
        eta_growth: factor on :math:`\eta` at epochs 0, ``eta_every``, 2 ``eta_every``, … Published code: 1.5.
        eta_every: epochs between two growths of :math:`\eta`. Published code: 100.
        beta_min: smallest :math:`\beta_m`. Published code: 0.1.
        beta_max: largest :math:`\beta_m` before it is rescaled. Published code: 4.
        gate: whether :math:`\omega` switches the prototype distillation (official mode: the segmentation term too);
            False: it is always on.
        warmup_epochs: for so many epochs only the uni-modal segmentation term is active and beta rests
            (the published code trains its separate uni-modal decoder first). 0 switches it off.
        modulation: where beta acts, through autograd hooks. ``"distillation"``: on the gradient of each
            modality's pixel distillation, the paper's rule. ``"encoder"``: on everything that reaches the
            parameters of encoder ``m``, as OGM-GE does. ``"none"``: nowhere.
        memory: ``"low"`` recomputes each student pass during backward instead of keeping its activations.
        skip_missing_encoders: do not run the encoder of a modality that is missing, where the checks show that
            nothing the backbone returns, and no gradient, depends on it. ``"auto"``: when no sample of the
            batch has the modality; the result is the same bit for bit, except that dropout in an encoder that
            does not run draws no random numbers. True: encoders run only on the samples that have their
            modality, which saves more and rounds differently; an error where the checks do not allow it.
            False: run everything.
        backend: what computes the losses. ``"auto"``: Triton kernels for CUDA tensors where triton is installed,
            except in double precision; else PyTorch. ``"eager"``: PyTorch. ``"triton"``: the kernels or an error.
        share_random_state: students start from the random state that the fused pass had after its last
            encoder, so that dropout behind the encoders draws the same mask whenever a student runs on the
            whole batch. Off in the published code, where the difference is a noise floor in the distance.

    Raises:
        ConfigError: listing every value that is out of range.

    Example:
        >>> PassionConfig(temperature=2.0).pixel_weight
        0.5
        >>> PassionConfig.official().mode
        'official'
    """

    mode: Mode = "default"
    temperature: float = 4.0
    pixel_weight: float = 0.5
    prototype_weight: float = 0.1
    unimodal_weight: float = 1.0
    rarity_weights: bool = True
    subset_students: bool = False
    eta: float = 0.01
    eta_growth: float = 1.5
    eta_every: int = 100
    beta_min: float = 0.1
    beta_max: float = 4.0
    gate: bool = True
    warmup_epochs: int = 0
    modulation: Modulation = "distillation"
    memory: Memory = "default"
    skip_missing_encoders: bool | Literal["auto"] = "auto"
    share_random_state: bool = False
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be one of {choices}, got {getattr(self, name)!r}"
            for name, choices in (
                ("mode", get_args(Mode)),
                ("modulation", get_args(Modulation)),
                ("memory", get_args(Memory)),
                ("backend", get_args(Backend)),
            )
            if not is_one_of(getattr(self, name), choices)
        ]
        if not isinstance(self.skip_missing_encoders, bool) and not is_one_of(self.skip_missing_encoders, ("auto",)):
            problems.append(f"skip_missing_encoders must be True, False or 'auto', got {self.skip_missing_encoders!r}")
        if is_one_of(self.mode, ("official",)) and self.subset_students is True:
            problems.append("subset_students=True goes with mode='default': the published code has no such students")
        for name in ("rarity_weights", "subset_students", "gate", "share_random_state"):
            if not isinstance(getattr(self, name), bool):
                problems.append(f"{name} must be True or False, got {getattr(self, name)!r}")
        positive = ("temperature", "eta_growth", "beta_min", "beta_max")
        for name in positive:
            if not is_number(getattr(self, name), above=0):
                problems.append(f"{name} must be a positive finite number, got {getattr(self, name)!r}")
        from_zero = ("pixel_weight", "prototype_weight", "unimodal_weight", "eta")
        for name in from_zero:
            if not is_number(getattr(self, name), least=0):
                problems.append(f"{name} must be a finite number, 0 or more, got {getattr(self, name)!r}")
        for name, least in (("warmup_epochs", 0), ("eta_every", 1)):
            value = getattr(self, name)
            if not is_int(value, least=least):
                problems.append(f"{name} must be an integer, {least} or more, got {value!r}")
        if not problems and not self.beta_min <= 1 <= self.beta_max:
            problems.append(
                f"beta starts at 1, which must lie between beta_min={self.beta_min!r} and beta_max={self.beta_max!r}"
            )
        raise_problems(problems, what="PassionConfig")
        # NumPy's numbers would end up in checkpoints, which are read without them.
        for name in (*positive, *from_zero):
            object.__setattr__(self, name, float(getattr(self, name)))
        for name in ("warmup_epochs", "eta_every"):
            object.__setattr__(self, name, int(getattr(self, name)))

    @classmethod
    def official(cls, **overrides: Any) -> PassionConfig:
        """Return the configuration that reproduces the published code at batch size 1.

        Args:
            **overrides: fields to set differently.

        Returns:
            A configuration with ``mode="official"``; every other field keeps its default, which is the
            value of the published code.
        """
        return cls(**{"mode": "official", **overrides})

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a plain dictionary, for logs and checkpoints."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
