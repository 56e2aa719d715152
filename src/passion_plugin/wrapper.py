"""PassionWrapper: a thin module around a backbone and the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from passion_plugin.backbone import BackboneSpec
from passion_plugin.config import PassionConfig
from passion_plugin.errors import UsageError
from passion_plugin.training import EpochReport, PassionEngine, Strategy

__all__ = ["PassionWrapper"]


class PassionWrapper(nn.Module):
    r"""Wrap a multi-encoder segmentation backbone so that it trains well with missing modalities.

    PASSION (Shi et al., ACM MM 2024, arXiv:2407.14796) distils the prediction from all available modalities into
    the prediction from each single one, and uses how far each modality lags behind to gate and weight that.

    In ``eval()`` the wrapper is the backbone: same arguments, same output bit for bit, no further pass. In
    ``train()`` it returns what the backbone returns and runs the students too; add :meth:`passion_loss` to the loss.
    Attributes that the wrapper does not have are those of the backbone, to read and to set.

    Args:
        backbone: any module that takes images and says which modalities are present. It is not edited and
            stays reachable as ``.backbone``.
        modalities: M >= 2 names, in mask-column order.
        presence: which training sample has what: a :class:`~passion_plugin.data.PresenceTable` or a bool
            array (N, M). Either this or ``missing_rates``.
        missing_rates: missing rate in [0, 1) of each modality, by name or in order.
        spec: how to call the backbone; the name of a preset; None: preset or detection.
        config: hyper-parameters.
        strategy: a balancing rule to run in place of PASSION, such as ``OGMGE()`` of :mod:`passion_plugin.baselines`;
            None for PASSION as ``config`` says.
        example_input: images to detect and check with at once instead of at the first training batch.
        example_mask: the mask that goes with it.

    Attributes:
        backbone: the module that was wrapped.
        passion: the engine, with everything else: ``passion.metrics()``, ``passion.loss_terms()``,
            ``passion.preference``, ``passion.disabled()``, … See :class:`~passion_plugin.training.PassionEngine`.

    Raises:
        ConfigError: listing what is wrong with names, rates, spec or strategy.
        BackboneError: the example shows that the backbone cannot be used.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.t1, self.t2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 4, 3, padding=1)
        ...         self.classifier = nn.Conv2d(8, 2, 1)
        ...     def forward(self, x, mask):
        ...         features = torch.stack([self.t1(x[:, :1]), self.t2(x[:, 1:])], dim=1)
        ...         return self.classifier((features * mask[:, :, None, None, None]).flatten(1, 2))
        >>> model = PassionWrapper(Net(), modalities=("t1", "t2"), missing_rates={"t1": 0.2, "t2": 0.6})
        >>> x, target = torch.rand(3, 2, 8, 8), torch.randint(2, (3, 8, 8))
        >>> mask = torch.tensor([[True, True], [True, False], [True, True]])
        >>> prediction = model(x, mask)
        >>> loss = nn.functional.cross_entropy(prediction, target) + model.passion_loss(target)
        >>> loss.backward()
        >>> model.end_epoch().modalities
        ('t1', 't2')
    """

    backbone: nn.Module
    passion: PassionEngine

    def __init__(
        self,
        backbone: nn.Module,
        modalities: Sequence[str],
        *,
        presence: Any = None,
        missing_rates: Any = None,
        spec: BackboneSpec | str | None = None,
        config: PassionConfig | None = None,
        strategy: Strategy | None = None,
        example_input: Any = None,
        example_mask: Any = None,
    ) -> None:
        super().__init__()
        passion = PassionEngine(
            backbone,
            modalities=modalities,
            presence=presence,
            missing_rates=missing_rates,
            spec=spec,
            config=config,
            strategy=strategy,
            example_input=example_input,
            example_mask=example_mask,
        )
        self.passion = passion
        self.backbone = backbone
        self.training = backbone.training

    def forward(
        self,
        *args: Any,
        passion_target: Tensor | None = None,
        passion_presence: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call the backbone, and in training run the students too.

        Args:
            *args: whatever the backbone takes.
            passion_target: as for :meth:`passion_loss`; for loops that need everything from one call (DDP).
            passion_presence: bool (B, M): what may be looked at. Needed when the backbone takes no mask, or to
                distil modalities that a random mask hides from the teacher.
            **kwargs: whatever the backbone takes.

        Returns:
            What the backbone returns; in training with ``passion_target`` the pair of that and the loss, and in
            ``eval()`` or without gradients the pair of that and a zero.

        Raises:
            UsageError: called on a replica of DataParallel.
            InputError: the batch is not usable.
            BackboneError: the first batch shows that the backbone is not.
        """
        if self.passion.should_distil(self.training):
            if self.passion.backbone is not self.backbone:
                raise UsageError(
                    "the backbone of this wrapper is not the one that was wrapped: a replica of DataParallel (use "
                    "DistributedDataParallel), or it was replaced (wrap the new one)"
                )
            return self.passion.train_forward(args, kwargs, passion_target, passion_presence)
        return self.passion.bare_result(self.backbone(*args, **kwargs), passion_target)

    def passion_loss(self, target: Tensor) -> Tensor:
        """Return the loss of the last forward, to be added to the user's own; see :meth:`PassionEngine.loss`."""
        return self.passion.loss(target)

    def end_epoch(self) -> EpochReport:
        """Update the relative preference and beta, or what the strategy keeps; once per epoch, on every rank."""
        return self.passion.end_epoch()

    def unwrap(self) -> nn.Module:
        """Return the backbone with nothing of ours left on it; the wrapper then only passes calls through."""
        return self.passion.detach()

    def __getattr__(self, name: str) -> Any:
        """Look up what the wrapper does not have on the backbone."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Copies and unpickled objects are asked for attributes before they have any; and a protocol such as
            # __deepcopy__ of the backbone would copy the backbone instead of the wrapper.
            backbone = self.__dict__.get("_modules", {}).get("backbone")
            if backbone is None or name.startswith("__"):
                raise
            return getattr(backbone, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set attributes of the backbone on the backbone: scripts switch modes by ``model.is_training = True``."""
        backbone = self.__dict__.get("_modules", {}).get("backbone")
        ours = name in self.__dict__ or name in self.__dict__.get("_modules", {}) or hasattr(type(self), name)
        if backbone is not None and not ours and hasattr(backbone, name):
            setattr(backbone, name, value)
        else:
            super().__setattr__(name, value)
