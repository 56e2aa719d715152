"""Asking a backbone questions: one call, repeated with other images, other masks, other rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from passion_plugin.backbone import (
    Argument,
    BackboneAdapter,
    BackboneCall,
    BackboneSpec,
    Handler,
    MaskCodec,
    OutputCapture,
    batch_size,
    blank,
    codec_for,
    encoded_like,
    first_image,
    join,
    locate_argument,
    patched_forward,
    prediction_of,
    resolve_module,
    split,
    vector_hint,
)
from passion_plugin.detection._sandbox import reseed

__all__ = ["CallConvention", "Probe", "relative_difference"]


@dataclass(frozen=True)
class CallConvention:
    """The part of a spec that says how the backbone is called: needed before there is a spec."""

    input_argument: int | str | Sequence[int | str] = 0
    mask_argument: int | str | None = 1
    mask_format: str | MaskCodec = "bool"
    mask_meaning: str = "present"
    mask_columns: Sequence[str] | None = None
    fill_missing: Callable[[Any, Tensor], Any] | None = None
    forward_fn: Callable[[nn.Module, Any, Tensor], Any] | None = None
    student_kwargs: Mapping[str, Any] | None = None


def relative_difference(value: Tensor, reference: Tensor) -> float:
    """Return ``max |value - reference| / max |reference|``; infinite for NaN and where shapes differ."""
    if value.shape != reference.shape:
        return float("inf")
    value, reference = value.double(), reference.double()
    scale = float(reference.abs().max())
    difference = float((value - reference).abs().max())
    if difference == 0:
        return 0.0
    ratio = difference / max(scale, 1e-30)
    return ratio if ratio == ratio else float("inf")


class Probe:
    """A backbone with one call of it as template, run on noise from the same random state every time.

    Noise instead of the user's images: the channels of a missing modality are blank there.

    Args:
        backbone: the module.
        call: arguments of a call as its user makes it.
        modalities: names.
        convention: how it is called.
        through_call: the template is no call of the backbone but ``(images, bool mask)``, for the user's own
            ``convention.forward_fn``.
        classifier: name of the module that gives the prediction, where it is known; otherwise the prediction is what
            looks like one in what the backbone returns.
    """

    def __init__(
        self,
        backbone: nn.Module,
        call: BackboneCall,
        modalities: Sequence[str],
        convention: CallConvention,
        *,
        through_call: bool = False,
        classifier: str | None = None,
    ) -> None:
        self.backbone = backbone
        # A name that does not fit is reported where the spec is adapter.
        self.classifier = None if classifier is None else resolve_module(backbone, classifier)[0]
        self.modalities = tuple(modalities)
        self.convention = convention
        self.through_call = through_call
        self._call = call
        keys = convention.input_argument
        self._several = not isinstance(keys, (int, str))
        listed = (keys,) if isinstance(keys, (int, str)) else keys
        self._inputs = [locate_argument(backbone, key) for key in listed]
        mask = convention.mask_argument
        self._mask: Argument | None = None if mask is None else locate_argument(backbone, mask)
        self._whole = () if self._mask is None else (self._mask,)
        self.codec = self._codec()
        self._size = batch_size(self.example, self.modalities)
        self.index = torch.arange(min(self._size, 2))
        self._contents = self._noise(1), self._noise(2)

    @property
    def example(self) -> Any:
        """The images of the template call."""
        return self._images(self._call)

    @property
    def batch(self) -> int:
        """Number of rows that are run: two, or one where a batch of two is not possible."""
        return len(self.index)

    def resize(self, batch: int) -> None:
        """Run on ``batch`` rows from now on; rows of the example are repeated when there are fewer."""
        self.index = torch.arange(batch) % self._size
        self._contents = self._noise(1), self._noise(2)

    def set_convention(self, convention: CallConvention) -> None:
        """Call the backbone in another way from now on."""
        self.convention = convention
        self.codec = self._codec()

    def presence(self, *modalities: int) -> Tensor:
        """Return a mask (B, M) in which the modalities with these numbers are present; all by default."""
        keep = torch.zeros(self.batch, len(self.modalities), dtype=torch.bool)
        keep[:, list(modalities) or slice(None)] = True
        return keep

    def images(self, *changed: int) -> Any:
        """Return noise images in which the content of the modalities with these numbers is other noise."""
        base, other = self._contents
        if not changed:
            return tree_map(_copied, base)
        if self.convention.fill_missing is None:
            pairs = zip(split(base, self.modalities), split(other, self.modalities), strict=True)
            parts = [(new if m in changed else old).clone() for m, (old, new) in enumerate(pairs)]
            return join(parts, base, self.modalities)
        # The user's own idea of "absent" also says which entries belong to a modality: those it changes.
        keep = self.presence()
        keep[:, list(changed)] = False
        hidden = self.convention.fill_missing(tree_map(_copied, base), keep)
        return tree_map(lambda old, gone, new: torch.where(old != gone, new, old), base, hidden, other)

    def neighbours(self, row: int) -> Any:
        """Return noise images in which every row but this one is other noise."""

        def second(old: Any, new: Any) -> Any:
            if not isinstance(old, Tensor) or old.ndim < 2:
                return old
            return torch.cat([new[:row], old[row : row + 1], new[row + 1 :]])

        return tree_map(second, *self._contents)

    def blanked(self, x: Any, keep: Tensor) -> Any:
        """Return images without what is not kept."""
        absent = self.convention.fill_missing
        return absent(x, keep) if absent and not bool(keep.all()) else blank(x, keep, self.modalities)

    def arguments(self, x: Any, keep: Tensor, rows: Tensor | None = None) -> BackboneCall:
        """Return the call as a user would make it, for some rows of ``x`` and ``keep``."""
        index = self.index if rows is None else self.index[rows]
        call = self._call.rows(index, self._size, whole=self._whole)
        if rows is not None:
            x, keep = BackboneCall((x,), {}).rows(rows, self.batch).args[0], keep[rows]
        for argument, value in zip(self._inputs, x if self._several else (x,), strict=True):
            call = call.replaced(argument, value)
        if self._mask is not None:
            call = call.replaced(self._mask, encoded_like(call.get(self._mask), self.codec, keep.to(self._device(x))))
        return call

    def run(
        self,
        x: Any,
        keep: Tensor,
        *,
        rows: Tensor | None = None,
        handlers: Mapping[nn.Module, Handler] | None = None,
        seed: int = 0,
    ) -> Any:
        """Run the backbone on unblanked images, from a fixed random state; return its raw output."""
        call = self.arguments(x, keep, rows)
        reseed(seed)
        with patched_forward(handlers or {}):
            if self.convention.forward_fn is not None:
                keep = keep if rows is None else keep[rows]
                images = self._images(call)
                return self.convention.forward_fn(self.backbone, images, keep.to(self._device(images)))
            return self.backbone(*call.args, **call.kwargs)

    def predict(self, x: Any, keep: Tensor, *, rows: Tensor | None = None, seed: int = 0) -> Tensor:
        """Like :meth:`run`, and return the prediction: the output of the classifier, where that is known."""
        if self.classifier is None:
            return prediction_of(self.run(x, keep, rows=rows, seed=seed))
        tap = OutputCapture(self.classifier)
        self.run(x, keep, rows=rows, seed=seed, handlers={self.backbone.get_submodule(self.classifier): tap})
        return tap.result()[1]

    def bind(self, spec: BackboneSpec) -> BackboneAdapter:
        """Return the backbone adapter to a spec, to be called like the template."""
        if not self.through_call:
            return BackboneAdapter(self.backbone, spec, self.modalities)
        template = {"input_argument": 0, "mask_argument": 1, "mask_format": "bool"}
        spec = spec.replaced(
            **template, mask_meaning="present", mask_columns=None, forward_fn=self.convention.forward_fn
        )
        return _ThroughCall(self.backbone, spec, self.modalities)

    def vector_hint(self) -> str:
        """Say which arguments of the template may have been left too long, if any."""
        return vector_hint(self.backbone, self._call, self._size, whole=self._whole)

    def _images(self, call: BackboneCall) -> Any:
        values = tuple(call.get(argument) for argument in self._inputs)
        return values if self._several else values[0]

    def _device(self, x: Any) -> torch.device:
        first = first_image(x, self.modalities)
        return torch.device("cpu") if first is None else first.device

    def _codec(self) -> MaskCodec:
        how = self.convention
        if isinstance(how.mask_format, MaskCodec):
            return how.mask_format
        return codec_for(how.mask_format, how.mask_meaning, how.mask_columns, self.modalities)

    def _noise(self, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)

        def noise(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.ndim < 2:
                return leaf
            known = leaf.detach().double()
            known = known[torch.isfinite(known)]
            spread = float(known.std()) if known.numel() > 1 else 0.0
            mean = float(known.mean()) if spread > 0 else 0.0
            drawn = torch.randn((self.batch, *leaf.shape[1:]), generator=generator, dtype=torch.float64)
            return (drawn * (spread or 1.0) + mean).to(leaf.device, leaf.dtype)

        if self.convention.fill_missing is not None:
            return tree_map(noise, self.example)
        parts = [noise(part) for part in split(self.example, self.modalities)]
        # What else is in a mapping is kept, for the same rows.
        return join(parts, self._images(self._call.rows(self.index, self._size, whole=self._whole)), self.modalities)


class _ThroughCall(BackboneAdapter):
    """A backbone whose fused pass too goes through the user's ``call``."""

    def run(self, call: BackboneCall) -> Any:
        assert self.spec.forward_fn is not None
        x, mask = call.args
        return self.spec.forward_fn(self.backbone, x, mask)


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
