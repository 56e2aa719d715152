"""A spec that has met its backbone: names resolved to modules, arguments located, masks translated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from passion_plugin._validate import describe
from passion_plugin.backbone._calls import (
    BackboneCall,
    batch_size,
    blank,
    check_images,
    first_image,
    locate_argument,
    split,
    vector_hint,
)
from passion_plugin.backbone._features import resolve_module
from passion_plugin.backbone._masks import MaskCodec, check_mask, codec_for, encoded_like
from passion_plugin.backbone._patching import ModuleState, patched_attributes, patched_forward
from passion_plugin.backbone._skipping import Layouts
from passion_plugin.backbone._spec import BackboneSpec
from passion_plugin.errors import BackboneError, InputError, raise_problems, suggest


class CallFormat:
    """Images and mask among the arguments of a call, as a spec or the part of one that says so describes them."""

    def __init__(self, backbone: nn.Module, spec: Any, modalities: Sequence[str]) -> None:
        self.backbone = backbone
        self.modalities = tuple(modalities)
        keys = spec.input_argument
        self._several_inputs = not isinstance(keys, (int, str))
        self._inputs = [locate_argument(backbone, key) for key in ((keys,) if isinstance(keys, (int, str)) else keys)]
        self._mask = None if spec.mask_argument is None else locate_argument(backbone, spec.mask_argument)
        self._whole = () if self._mask is None else (self._mask,)
        self._codec = (
            spec.mask_format
            if isinstance(spec.mask_format, MaskCodec)
            else codec_for(spec.mask_format, spec.mask_meaning, spec.mask_columns, self.modalities)
        )

    def input_of(self, call: BackboneCall) -> Any:
        """Return the images of a call: the argument itself, or a tuple when each modality is an argument."""
        values = [call.get(argument) for argument in self._inputs]
        if any(value is None for value in values):
            raise InputError(f"the call has no {', '.join(map(str, self._inputs))}: the images of the backbone")
        return tuple(values) if self._several_inputs else values[0]

    def with_input(self, call: BackboneCall, x: Any) -> BackboneCall:
        """Return the call with other images."""
        for argument, value in zip(self._inputs, x if self._several_inputs else (x,), strict=True):
            call = call.replaced(argument, value)
        return call

    def batch_of(self, call: BackboneCall) -> int:
        """Return the batch size of a call."""
        return batch_size(self.input_of(call), self.modalities)

    def with_mask(self, call: BackboneCall, presence: Tensor) -> BackboneCall:
        """Return the call with the mask that says ``presence`` (bool (B, M)), for a backbone that takes one."""
        if self._mask is None:
            return call
        raw = encoded_like(call.get(self._mask), self._codec, self.on_image_device(call, presence))
        return call.replaced(self._mask, raw)

    def on_image_device(self, call: BackboneCall, presence: Tensor) -> Tensor:
        """Return a tensor on the device of the images."""
        first = first_image(self.input_of(call), self.modalities)
        return presence if first is None else presence.to(first.device)

    def rows(self, call: BackboneCall, index: Tensor, batch: int) -> BackboneCall:
        """Return the call reduced to some rows; its mask is left alone and has to be replaced."""
        return call.rows(index, batch, whole=self._whole)

    def vector_hint(self, call: BackboneCall, batch: int) -> str:
        """Say what :meth:`rows` may have left too long, if anything."""
        return vector_hint(self.backbone, call, batch, whole=self._whole)


class BackboneAdapter(CallFormat):
    """A backbone and its spec, checked against each other.

    Args:
        backbone: the user's module; nothing is written to it.
        spec: how to talk to it.
        modalities: names, in the order of the user.
        forward: what to call to run the backbone, when that is not the backbone itself.

    Raises:
        ConfigError: listing every name that does not fit.
    """

    def __init__(
        self,
        backbone: nn.Module,
        spec: BackboneSpec,
        modalities: Sequence[str],
        forward: Callable[..., Any] | None = None,
    ) -> None:
        self.backbone = backbone
        self.spec = spec
        self.modalities = tuple(modalities)
        self.forward = forward
        self.layouts: Layouts = {}
        modules = dict(backbone.named_modules(remove_duplicate=False))
        problems: list[str] = []

        def resolve(role: str, name: str) -> nn.Module:
            path, problem = resolve_module(backbone, name)
            if path is None:
                problems.append(f"{role}: {problem}")
            return modules[path or ""]

        self.classifier = resolve("classifier", spec.classifier)
        self.deep_supervision = [resolve("deep_supervision", name) for name in spec.deep_supervision]
        self.encoders = {
            modality: tuple(resolve(f"encoders[{modality!r}]", name) for name in names)
            for modality, names in spec.encoders.items()
        }
        problems += self._problems(modules)
        raise_problems(problems, what=f"the spec does not fit {type(backbone).__name__}")

        super().__init__(backbone, spec, modalities)
        self._student_kwargs = {locate_argument(backbone, name): value for name, value in spec.student_kwargs.items()}

    def run(self, call: BackboneCall) -> Any:
        """Call the backbone as its user would."""
        return (self.forward or self.backbone)(*call.args, **call.kwargs)

    def has_mask(self, call: BackboneCall) -> bool:
        """Whether the call says which modalities are present."""
        return self._mask is not None and call.get(self._mask) is not None

    def check_batch(self, call: BackboneCall, presence: Tensor | None) -> Tensor:
        """Check images, mask and content of a call.

        Args:
            call: arguments of a forward.
            presence: bool (B, M) said by the user, or None to go by the mask.

        Returns:
            Which modalities may be looked at, at least those that the mask marks present: bool (B, M) on the CPU.

        Raises:
            InputError: images that cannot be told apart by modality, a mask or ``presence`` that does not fit, or NaN
                or infinity in a modality that is marked present.
        """
        if self.spec.fill_missing is None:
            check_images(self.input_of(call), self.modalities)
        if presence is None:
            available = self.presence_of(call)
        else:
            available = self._checked_mask(presence, self.batch_of(call), "passion_presence")
            if self.has_mask(call) and bool((self.presence_of(call) & ~available).any()):
                raise InputError("the mask marks modalities as present that passion_presence says are missing")
        if self.spec.fill_missing is None:
            self._check_finite(self.input_of(call), available)
        return available

    def presence_of(self, call: BackboneCall) -> Tensor:
        """Read the mask of a call: bool (B, M) on the CPU, in the order of ``modalities``."""
        batch = self.batch_of(call)
        if self._mask is None or not self.has_mask(call):
            what, cure = f"was called without its mask ({self._mask})", ""
            if self._mask is None:
                what, cure = "takes no mask", ", or name the argument that says it: BackboneSpec(mask_argument=…)"
            raise InputError(
                f"the backbone {what}, so that nothing says which modalities are present: pass "
                f"passion_presence= with a torch.bool tensor of shape ({batch}, {len(self.modalities)}){cure}"
            )
        return self._checked_mask(self._codec.decode(call.get(self._mask)), batch, "the mask")

    def modalities_differ(self, call: BackboneCall) -> bool:
        """Whether the images of the modalities hold different content, as far as they can be told apart."""
        if self.spec.fill_missing is not None:
            return True
        first, *others = split(self.input_of(call), self.modalities)
        return not all(part.shape == first.shape and torch.equal(part, first) for part in others)

    def image_size(self, call: BackboneCall) -> tuple[int, ...] | None:
        """Return the spatial size of the images, or None when they are in a container of their own kind."""
        first = first_image(self.input_of(call), self.modalities)
        return None if first is None else tuple(first.shape[2:])

    def blanked(self, call: BackboneCall, keep: Tensor) -> BackboneCall:
        """Return the call with every modality outside ``keep`` (bool (B, M)) made absent in the images."""
        if bool(keep.all()):
            return call
        x = self.input_of(call)
        if self.spec.fill_missing is None:
            return self.with_input(call, blank(x, keep, self.modalities))
        hidden = self.spec.fill_missing(x, keep)
        if not isinstance(hidden, type(x)) or _shapes(hidden) != _shapes(x):
            raise BackboneError(
                f"BackboneSpec.fill_missing gave {describe(hidden)} for {describe(x)}; it must return images of the "
                f"same kind and shape, without the modalities outside the mask"
            )
        return self.with_input(call, hidden)

    def run_masked(self, call: BackboneCall, keep: Tensor) -> Any:
        """Run the backbone on a call with the modalities outside ``keep`` (bool (B, M)) blanked and masked."""
        call = self.blanked(call, keep)
        for argument, value in self._student_kwargs.items():
            call = call.replaced(argument, value)
        if self.spec.forward_fn is not None:
            return self.spec.forward_fn(self.backbone, self.input_of(call), self.on_image_device(call, keep))
        return self.run(self.with_mask(call, keep))

    def rows(self, call: BackboneCall, index: Tensor, batch: int) -> BackboneCall:
        """Return the call reduced to some rows; its mask is left alone and has to be replaced."""
        if torch.equal(index, torch.arange(batch)):
            return call
        return super().rows(call, index, batch)

    @contextmanager
    def student_mode(self, state: ModuleState | None = None) -> Iterator[None]:
        """Switch auxiliary outputs off; restore buffers and attributes, listed in ``state`` if given, on exit."""
        forward = self.forward
        with ExitStack() as stack:
            if forward is not None:
                bare = {self.backbone: lambda _, *args, **kwargs: forward(*args, **kwargs)}
                stack.enter_context(patched_forward(bare))
            if callable(self.spec.student_mode):
                stack.enter_context(self.spec.student_mode(self.backbone))
            else:
                stack.enter_context(patched_attributes(self.backbone, self.spec.student_mode))
            stack.enter_context((state or ModuleState(self.backbone)).preserved())
            yield

    def _checked_mask(self, mask: Any, batch: int, what: str) -> Tensor:
        presence = check_mask(mask, batch, self.modalities, what=what)
        if not self.spec.per_sample_masks and not bool((presence == presence[0]).all()):
            raise InputError(
                "this backbone cannot mix masks in one batch (BackboneSpec.per_sample_masks is False), but the samples "
                "have different ones: group samples by their modalities, or use batches of one"
            )
        return presence

    def _check_finite(self, x: Any, presence: Tensor) -> None:
        parts = split(x, self.modalities)
        finite = torch.stack([rearrange(part.isfinite(), "b ... -> b (...)").all(1).cpu() for part in parts], dim=1)
        broken = (presence & ~finite).nonzero().tolist()
        if broken:
            listed = ", ".join(f"{self.modalities[column]!r} of sample {row}" for row, column in broken[:8])
            raise InputError(
                f"NaN or infinity in a modality that is marked present: {listed}. Mark it missing in the mask, or "
                f"repair the image; nothing was computed from this batch"
            )

    def _problems(self, modules: Mapping[str, nn.Module]) -> list[str]:
        """Say what does not fit besides names of modules that do not exist."""
        spec, names = self.spec, self.modalities
        problems = []
        if isinstance(self.classifier, nn.Linear):
            problems.append(
                f"classifier: {spec.classifier!r} is a Linear layer, whose classes come last; logits must be "
                f"(B, K, *spatial). A 1×1 convolution does the same"
            )
        problems += [
            f"encoders: unknown modality {modality!r}.{suggest(modality, names)}"
            for modality in spec.encoders
            if modality not in names
        ]
        problems += [
            f"encoders: modality {name!r} has none" for name in names if spec.encoders and name not in spec.encoders
        ]
        owners: dict[nn.Module, str] = {}
        for modality, encoders in self.encoders.items():
            problems += [
                f"encoders: {other!r} and {modality!r} name the same module. A shared encoder is not private to a "
                f"modality: leave it out, it will be run again for each student"
                for module in encoders
                if module is not self.backbone and (other := owners.setdefault(module, modality)) != modality
            ]
        if spec.mask_columns is not None and sorted(spec.mask_columns) != sorted(names):
            problems.append(f"mask_columns {spec.mask_columns} must be a permutation of {names}")
        for name in () if callable(spec.student_mode) else spec.student_mode:
            owner, _, attribute = name.rpartition(".")
            module = modules.get(owner)
            if module is None or not hasattr(module, attribute):
                known = [key for key in vars(module or self.backbone) if not key.startswith("_")]
                problems.append(f"student_mode: the backbone has no attribute {name!r}.{suggest(attribute, known)}")
        return problems


def _shapes(x: Any) -> list[torch.Size]:
    return [leaf.shape for leaf in tree_leaves(x) if isinstance(leaf, Tensor)]
