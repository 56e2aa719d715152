"""Run a backbone on noise: one call as template, repeated with other images, other masks, other rows."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from passion_plugin.backbone import (
    BackboneAdapter,
    BackboneCall,
    BackboneSpec,
    CallFormat,
    FusedPass,
    Handler,
    MaskCodec,
    OutputCapture,
    StudentInput,
    batch_size,
    check_images,
    fused_pass,
    join,
    patched_forward,
    prediction_of,
    resolve_module,
    split,
)
from passion_plugin.detection._convention import CallConvention
from passion_plugin.detection._sandbox import preserved_modes, reseed
from passion_plugin.errors import BackboneError, PassionError, short

EFFECT = 1e-5
"""Relative change of the prediction from which on content or a mask counts as having an effect."""

_PACKAGE = str(Path(__file__).parents[1]) + os.sep


class BackboneRunError(BackboneError):
    """The backbone, or a function of its user that is called with it, raised; that exception is the cause."""


@contextmanager
def backbone_errors() -> Iterator[None]:
    """Turn what the backbone raises into :class:`BackboneRunError`.

    Around nothing but calls of the backbone: a failing run is an answer ("no batch of one"), a bug of this library
    is none and must surface. For the same reason an error that our handlers of a module raise stays what it is.
    """
    try:
        yield
    except PassionError:
        raise
    except Exception as error:
        frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
        handled = any(code.co_name == "_handle" and code.co_filename.startswith(_PACKAGE) for code in frames)
        if handled and frames[-1].co_filename.startswith(_PACKAGE):
            raise
        raise BackboneRunError(short(error)) from error


def reason_of(error: PassionError) -> str:
    """Return class and message of the exception that made a run fail, on one line."""
    return str(error) if isinstance(error, BackboneRunError) else short(error)


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


def equality_tolerance(dtype: torch.dtype) -> float:
    """Return the relative difference up to which two ways to compute a tensor of this type count as equal."""
    return max(1e-3, 16 * torch.finfo(dtype).eps)


class Probe:
    """A backbone with one call of it as template, run on noise from the same random state every time.

    Noise instead of the user's images: the channels of a missing modality are blank there. With ``through_call`` the
    template is no call of the backbone but ``(images, bool mask)`` for ``forward_fn``. The prediction is the output of
    the ``classifier``, where it is known, otherwise what looks like one in what the backbone returns.

    Raises:
        InputError: the template holds no image for each modality.
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
        if through_call:
            convention = CallConvention(fill_missing=convention.fill_missing, forward_fn=convention.forward_fn)
        self.backbone = backbone
        # A name that does not fit is reported where the spec meets its backbone.
        self.classifier = None if classifier is None else resolve_module(backbone, classifier)[0]
        self.modalities = tuple(modalities)
        self.through_call = through_call
        self._call = call
        self.set_convention(convention)
        example = self._format.input_of(call)
        if convention.fill_missing is None:
            check_images(example, self.modalities)
        self._size = batch_size(example, self.modalities)
        self.resize(min(self._size, 2))

    @property
    def batch(self) -> int:
        """Number of rows that are run: two, or one where a batch of two is not possible."""
        return len(self._index)

    def resize(self, batch: int) -> None:
        """Run on ``batch`` rows from now on; rows of the example are repeated when there are fewer."""
        self._index = torch.arange(batch) % self._size
        self._contents = self._noise(1), self._noise(2)

    def set_convention(self, convention: CallConvention) -> None:
        """Call the backbone in another way from now on."""
        self.convention = replace(convention, **_guarded(convention))
        self._format = CallFormat(self.backbone, self.convention, self.modalities)

    def presence(self, *modalities: int) -> Tensor:
        """Return a mask (B, M) in which the modalities with these numbers are present; all by default."""
        keep = torch.zeros(self.batch, len(self.modalities), dtype=torch.bool)
        keep[:, list(modalities) or slice(None)] = True
        return keep

    def whole_batch(self, modality: str) -> StudentInput:
        """Show one modality alone, in every row."""
        return StudentInput((modality,), torch.arange(self.batch))

    def images(self, *changed: int) -> Any:
        """Return noise images in which the content of the modalities with these numbers is other noise."""
        base, other = self._contents
        if not changed:
            return tree_map_only(Tensor, Tensor.clone, base)
        if self.convention.fill_missing is None:
            pairs = zip(split(base, self.modalities), split(other, self.modalities), strict=True)
            parts = [(new if m in changed else old).clone() for m, (old, new) in enumerate(pairs)]
            return join(parts, base, self.modalities)
        # Which entries belong to a modality is what the user's function changes where it is missing.
        keep = self.presence()
        keep[:, list(changed)] = False
        hidden = self.convention.fill_missing(self.images(), keep)
        return tree_map(lambda old, gone, new: torch.where(old != gone, new, old), base, hidden, other)

    def neighbours(self, row: int) -> Any:
        """Return noise images in which every row but this one is other noise."""

        def second(old: Any, new: Any) -> Any:
            if not isinstance(old, Tensor) or old.ndim < 2:
                return old
            return torch.cat([new[:row], old[row : row + 1], new[row + 1 :]])

        return tree_map(second, *self._contents)

    def arguments(self, x: Any, keep: Tensor) -> BackboneCall:
        """Return the call as a user would make it."""
        call = self._format.rows(self._call, self._index, self._size)
        return self._format.with_mask(self._format.with_input(call, x), keep)

    def run(
        self,
        x: Any = None,
        keep: Tensor | None = None,
        *,
        handlers: Mapping[nn.Module, Handler] | None = None,
        seed: int = 0,
    ) -> Any:
        """Run the backbone on unblanked images, from a fixed random state; return its raw output.

        Unless said otherwise on :meth:`images`, with a mask that says that everything is present.

        Raises:
            BackboneRunError: the backbone raised.
        """
        keep = self.presence() if keep is None else keep
        call = self.arguments(self.images() if x is None else x, keep)
        reseed(seed)
        with patched_forward(handlers or {}), backbone_errors():
            if self.convention.forward_fn is not None:
                images, keep = self._format.input_of(call), self._format.on_image_device(call, keep)
                return self.convention.forward_fn(self.backbone, images, keep)
            return self.backbone(*call.args, **call.kwargs)

    def outputs(self, x: Any = None, keep: Tensor | None = None, *, seed: int = 0) -> tuple[Any, Tensor]:
        """Like :meth:`run`, and return the prediction too: the output of the classifier, where that is known.

        Raises:
            BackboneError: the prediction does not have the rows of the batch.
        """
        if self.classifier is None:
            raw = self.run(x, keep, seed=seed)
            prediction = prediction_of(raw)
        else:
            capture = OutputCapture(self.classifier)
            handlers = {self.backbone.get_submodule(self.classifier): capture}
            raw = self.run(x, keep, seed=seed, handlers=handlers)
            prediction = capture.result()[1]
        if len(prediction) != self.batch or 0 in prediction.shape:
            raise BackboneError(f"the prediction of a batch of {self.batch} has shape {tuple(prediction.shape)}")
        return raw, prediction

    def predict(self, x: Any = None, keep: Tensor | None = None, *, seed: int = 0) -> Tensor:
        """Like :meth:`outputs`, without the raw output."""
        return self.outputs(x, keep, seed=seed)[1]

    def change(self, base: Tensor, *modalities: int, keep: Tensor | None = None) -> float:
        """Return the relative change from a prediction when the content of these modalities changes."""
        return relative_difference(self.predict(self.images(*modalities), keep), base)

    def fused(self, adapter: BackboneAdapter, keep: Tensor | None = None, **options: Any) -> FusedPass:
        """Run the fused pass of :meth:`bind`'s adapter on noise, from a fixed random state."""
        keep = self.presence() if keep is None else keep
        call = self.arguments(self.images(), keep)
        reseed()
        return fused_pass(adapter, call, keep, **options)

    def initialize(self) -> None:
        """Run the template as it is, in evaluation mode: modules that have no parameters yet get them."""
        with preserved_modes(self.backbone), torch.no_grad(), backbone_errors():
            if self.through_call and self.convention.forward_fn is not None:
                self.convention.forward_fn(self.backbone, *self._call.args)
            else:
                self.backbone(*self._call.args, **self._call.kwargs)

    def bind(self, spec: BackboneSpec) -> BackboneAdapter:
        """Return an adapter of the backbone to a spec, to be called like the template."""
        if self.through_call:
            how = CallConvention(fill_missing=spec.fill_missing, forward_fn=self.convention.forward_fn)
            spec = spec.replaced(**vars(how))
        adapter = _ProbeAdapter(self.backbone, spec.replaced(**_guarded(spec)), self.modalities)
        adapter.through_call = self.through_call
        return adapter

    def vector_hint(self) -> str:
        """Say which arguments of the template may have been left too long, if any."""
        return self._format.vector_hint(self._call, self._size)

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

        example = self._format.input_of(self._call)
        if self.convention.fill_missing is not None:
            return tree_map(noise, example)
        parts = [noise(part) for part in split(example, self.modalities)]
        # What else is in a mapping is kept, for the same rows.
        like = self._format.input_of(self._format.rows(self._call, self._index, self._size))
        return join(parts, like, self.modalities)


class _ProbeAdapter(BackboneAdapter):
    """Turns what the backbone raises into :class:`BackboneRunError`; fused passes may go through ``forward_fn`` too."""

    through_call = False

    def run(self, call: BackboneCall) -> Any:
        with backbone_errors():
            if self.through_call and self.spec.forward_fn is not None:
                return self.spec.forward_fn(self.backbone, *call.args)
            return super().run(call)


def _guarded(how: CallConvention | BackboneSpec) -> dict[str, Any]:
    """Return the user's functions in a convention or a spec, with :func:`backbone_errors` around them."""

    def guard(function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any) -> Any:
            with backbone_errors():
                return function(*args)

        return guarded

    functions = {"fill_missing": how.fill_missing, "forward_fn": how.forward_fn}
    found: dict[str, Any] = {name: guard(function) for name, function in functions.items() if function is not None}
    if isinstance(how.mask_format, MaskCodec):
        found["mask_format"] = replace(how.mask_format, encode=guard(how.mask_format.encode))
    return found
