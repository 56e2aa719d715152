"""Capture module outputs and replay them."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from passion_plugin.backbone._patching import Handler, get_rng_state, patched_forward, untraced
from passion_plugin.backbone._student_inputs import StudentInput
from passion_plugin.errors import BackboneError, suggest

_LEAVES = (Tensor, int, float, complex, str, type(None))


def resolve_module(backbone: nn.Module, name: str) -> tuple[str | None, str]:
    """Find a module by its name or a dotted suffix of whole components.

    Returns:
        The full name and an empty string, or None and the sentence that says what is wrong.

    Example:
        >>> net = nn.ModuleDict({"encoders": nn.ModuleDict({"t1": nn.Identity(), "t1ce": nn.Identity()})})
        >>> resolve_module(net, "t1")
        ('encoders.t1', '')
    """
    known = [path for path, _ in backbone.named_modules(remove_duplicate=False) if path]
    if name in known:
        return name, ""
    matches = [path for path in known if path.endswith(f".{name}")]
    if len(matches) == 1:
        return matches[0], ""
    if matches:
        return None, f"{name!r} matches several modules: {matches}. Give more of the dotted name"
    close = suggest(name, known) or suggest(name, {path.rpartition(".")[2] for path in known})
    return None, f"there is no module {name!r}.{close}"


class OutputCapture:
    """Captures the first input and the output of one module, which must be called exactly once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls: list[tuple[Tensor, Tensor, int]] = []

    @untraced
    def __call__(self, forward: Handler, *args: Any, **kwargs: Any) -> Any:
        """Run the module and keep its first input and its output."""
        entering = args[0] if args else next(iter(kwargs.values()))
        output = forward(*args, **kwargs)
        if not isinstance(entering, Tensor) or not isinstance(output, Tensor):
            raise BackboneError(f"{self.name!r} must take and return a tensor to be used as a classifier")
        self.calls.append((entering, output, output._version))
        return output

    def result(self) -> tuple[Tensor, Tensor]:
        """Return ``(input, output)`` of the only call; raise unless there was one and its output is unchanged."""
        if len(self.calls) != 1:
            raise BackboneError(
                f"{self.name!r} was called {len(self.calls)} times in one pass of the backbone, expected once. Name "
                f"the layer of the fused prediction as BackboneSpec.classifier (and in BackboneSpec.deep_supervision "
                f"layers that run once); a layer shared with auxiliary decoders cannot be used, nor one that was "
                f"replaced after wrapping"
            )
        entering, output, version = self.calls[0]
        if output._version != version:
            raise BackboneError(
                f"the output of {self.name!r} was changed in place after the call (an in-place softmax or "
                f"addition?), so its logits are gone. Make that operation out of place"
            )
        return entering, output


class FeatureCache:
    """The outputs of all encoder modules in one pass, to be replayed in later passes.

    Containers are rebuilt on record and on every replay: public encoders return one mutable list again and
    again, or return a list that the decoder pops from.

    Args:
        encoders: modules of each modality, by name.
        copy: keep and replay copies, for backbones that change encoder outputs in place.

    Attributes:
        rng_state: of the generators after the last encoder, where it was asked for.
    """

    def __init__(self, encoders: Mapping[str, Sequence[nn.Module]], *, copy: bool = False) -> None:
        self.encoders = encoders
        self.copy = copy
        self.rng_state: Any = None
        self._owners = {module: owner for owner, modules in encoders.items() for module in modules}
        self._outputs: dict[nn.Module, list[Any]] = defaultdict(list)
        self._versions: dict[nn.Module, list[list[int]]] = defaultdict(list)

    def record(self, *, features: bool = True, keep_rng_state: bool = False) -> dict[nn.Module, Handler]:
        """Return handlers that keep the outputs and the state of the generators after the last encoder."""

        @untraced
        def handler(owner: str, module: nn.Module, forward: Handler, *args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if features:
                self._keep(owner, module, output)
            if keep_rng_state:
                self.rng_state = get_rng_state()
            return output

        return self._handlers(handler)

    def features(self, modality: str) -> list[Tensor]:
        """Return every tensor that the encoder modules of ``modality`` returned, in call order."""
        return [leaf for module in self.encoders[modality] for leaf in _tensors(self._outputs[module])]

    def check_trainable(self) -> None:
        """Check that encoders with trainable parameters gave features with gradient.

        Reentrant activation checkpointing runs the encoder without gradient; what is distilled would silently never
        reach it.
        """
        for module, owner in self._owners.items():
            trainable = any(parameter.requires_grad for parameter in module.parameters())
            floating = [leaf for leaf in _tensors(self._outputs[module]) if leaf.is_floating_point()]
            if trainable and floating and not any(leaf.requires_grad for leaf in floating):
                raise BackboneError(
                    f"the encoder of {owner!r} has trainable parameters but its output carries no gradient: reentrant "
                    f"activation checkpointing, or a detach. Call torch.utils.checkpoint.checkpoint(..., "
                    f"use_reentrant=False), or set BackboneSpec(students='rerun')"
                )

    @contextmanager
    def replay(self, student_input: StudentInput, batch: int, *, others: FeatureCache | None = None) -> Iterator[None]:
        """Let all encoders return what they returned before, while the context is open.

        The features of the modalities of the student keep their gradient: students train the encoders. Those of
        the other modalities are detached, since a student must not move the encoder of another modality.

        Args:
            student_input: which modalities the student sees in which rows.
            batch: batch size of the recorded pass.
            others: where the features of the other modalities come from; a cache of one sample in which
                everything was absent, or None for this cache.
        """
        served: dict[nn.Module, int] = defaultdict(int)
        # Selected before the pass and not inside it: a backbone that checkpoints its encoder would save what the
        # selection needs, and not find it again when it runs the real encoder a second time.
        replies = {
            module: self._select(module, owner, student_input, batch, others) for module, owner in self._owners.items()
        }

        @untraced
        def handler(owner: str, module: nn.Module, forward: Handler, *args: Any, **kwargs: Any) -> Any:
            call = served[module]
            served[module] += 1
            if call < len(replies[module]):
                return self._rebuilt(replies[module][call])
            if owner in student_input.modalities:
                raise _miscount(owner, served[module], len(replies[module]))
            return forward(*args, **kwargs)

        with patched_forward(self._handlers(handler)):
            yield
        for module, owner in self._owners.items():
            if owner in student_input.modalities and served[module] != len(replies[module]):
                raise _miscount(owner, served[module], len(replies[module]))

    def no_grad_except(self, modalities: Collection[str]) -> dict[nn.Module, Handler]:
        """Return handlers under which only the encoders of ``modalities`` are run with gradient."""

        @untraced
        def handler(owner: str, _: nn.Module, forward: Handler, *args: Any, **kwargs: Any) -> Any:
            with torch.set_grad_enabled(torch.is_grad_enabled() and owner in modalities):
                return forward(*args, **kwargs)

        return self._handlers(handler)

    # Not traced: what happens to versions of tensors is not what a compiler would see.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _keep(self, owner: str, module: nn.Module, output: Any) -> None:
        strange = {type(leaf).__name__ for leaf in tree_leaves(output) if not isinstance(leaf, _LEAVES)}
        if strange:
            raise BackboneError(
                f"the encoder of {owner!r} returns {', '.join(sorted(strange))}, in which features cannot be found to "
                f"be replayed. Name the modules inside it as encoders, or set BackboneSpec(students='rerun')"
            )
        kept = self._rebuilt(output)
        self._outputs[module].append(kept)
        self._versions[module].append([leaf._version for leaf in _tensors(kept)])

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _rebuilt(self, output: Any) -> Any:
        return tree_map(clone_tensor if self.copy else lambda leaf: leaf, output)

    def _select(
        self, module: nn.Module, owner: str, student_input: StudentInput, batch: int, others: FeatureCache | None
    ) -> list[Any]:
        """Return what an encoder module gives to a student, call by call."""
        own = owner in student_input.modalities
        source, size = (self, batch) if own or others is None else (others, 1)
        for output, versions in zip(source._outputs[module], source._versions[module], strict=True):
            if [leaf._version for leaf in _tensors(output)] != versions:
                raise BackboneError(
                    f"the backbone changed the output of the encoder of {owner!r} in place, so that it cannot be "
                    f"replayed; set BackboneSpec(copy_features=True)"
                )
        select = functools.partial(_select_rows, rows=student_input.rows, batch=size, detach=not own)
        return [tree_map(select, output) for output in source._outputs[module]]

    def _handlers(self, handler: Handler) -> dict[nn.Module, Handler]:
        return {module: functools.partial(handler, owner, module) for module, owner in self._owners.items()}


def clone_tensor(leaf: Any) -> Any:
    """Return a copy of a tensor, and anything else as it is; for ``tree_map``."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _miscount(owner: str, student: int, fused: int) -> BackboneError:
    return BackboneError(
        f"the encoder of {owner!r} was called {student} times in a student pass but {fused} times in the fused pass, "
        f"so that its output cannot be replayed; set BackboneSpec(students='rerun')"
    )


def _select_rows(leaf: Any, *, rows: Tensor, batch: int, detach: bool) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.ndim == 0 or leaf.shape[0] != batch:
        raise BackboneError(
            f"an encoder output of shape {tuple(leaf.shape)} does not have the batch size {batch} in front, so "
            f"that its samples cannot be told apart; set BackboneSpec(students='rerun')"
        )
    leaf = leaf.detach() if detach else leaf
    if batch == 1:
        return leaf.expand(len(rows), *leaf.shape[1:])
    return leaf if len(rows) == batch else leaf.index_select(0, rows.to(leaf.device))
