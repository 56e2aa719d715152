"""Finding the encoders by perturbation: the modules that change with the content of one modality only."""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from passion_plugin._validate import unreadable
from passion_plugin.backbone import Handler, channel_share, maps_in, prediction_of
from passion_plugin.detection._classifier import ClassifierSearch, follows
from passion_plugin.detection._probe import Probe

Encoders = Mapping[str, tuple[str, ...]]
"""Names of modules by modality."""

Fingerprint = list[Tensor] | None
Fingerprints = dict[str, list[Fingerprint]]
"""Of every call of every module, by name."""

_SAMPLES = 1024

_CHANGED = 1e-6

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


@dataclass(frozen=True)
class FoundModules:
    """What runs of the backbone with other content in one modality at a time have shown.

    Attributes:
        modalities: names.
        private: number of the modality of every module that depends on it alone and whose output can be replayed,
            in call order.
        shared: outermost modules that are called for one modality after the other.
        classifier: the search for the classifier, which ran along.
    """

    modalities: tuple[str, ...]
    private: Mapping[str, int]
    shared: tuple[str, ...]
    classifier: ClassifierSearch

    @property
    def encoders(self) -> Encoders:
        """The outermost private modules of each modality; empty when no modality has one."""
        return self._grouped(_outermost(self.private))

    def alternatives(self) -> list[Encoders]:
        """Return smaller sets of modules, to try where replaying :attr:`encoders` is not exact.

        First without the last, the second to last, … module of every modality's private path (it may lie
        behind the mask), then one level further down (a module that leaves its skips on itself has to run,
        its parts need not), then without one module at a time.
        """
        outer = _outermost(self.private)
        ranks: dict[int, list[str]] = defaultdict(list)
        for names in self._grouped(outer).values():
            for rank, name in enumerate(names):
                ranks[rank].append(name)
        sets = [[name for name in outer if name not in ranks[rank]] for rank in sorted(ranks, reverse=True)]
        sets += [ranks[0], _outermost([name for name in self.private if name not in outer])]
        if len(outer) <= 2 * len(self.modalities):
            sets += [[name for name in outer if name != dropped] for dropped in outer]
        unique = dict.fromkeys(tuple(names) for names in sets if names and names != outer)
        return [self._grouped(names) for names in unique]

    def _grouped(self, names: Iterable[str]) -> Encoders:
        groups: dict[str, list[str]] = {modality: [] for modality in self.modalities}
        for name in names:
            groups[self.modalities[self.private[name]]].append(name)
        return {modality: tuple(found) for modality, found in groups.items()} if any(groups.values()) else {}


def find_modules(probe: Probe) -> FoundModules:
    """Run the backbone once, and once more for each modality with other content in it."""
    search = ClassifierSearch(_prediction(probe))
    base = _fingerprints(probe, probe.images(), search)
    private, shared = _dependencies(probe, base)
    return FoundModules(probe.modalities, private, tuple(_outermost(shared)), search)


def uneven_channels(probe: Probe) -> str:
    """Say that the channels of a tensor do not belong to the modalities in equal parts; empty where nothing shows it.

    If modalities have different numbers of channels, an equal split gives a small one channels that its encoder
    ignores, and leaves a large one without a private encoder.
    """
    x = probe.images()
    share = channel_share(x, probe.modalities)
    if probe.convention.fill_missing is not None or share < 2:
        return ""
    base = _fingerprints(probe, x)
    private, _ = _dependencies(probe, base)
    missing = [name for m, name in enumerate(probe.modalities) if m not in private.values()]
    if not private or not missing:
        return ""
    other = probe.images(*range(len(probe.modalities)))
    blind: list[str] = []
    for channel in range(share):
        changed = x.clone()
        changed[:, channel::share] = other[:, channel::share]
        after = _fingerprints(probe, changed)
        for name in _outermost(private):
            if not any(itertools.starmap(_changed, itertools.zip_longest(base[name], after[name]))):
                blind.append(name)
    if not blind:
        return ""
    return (
        f"the {x.shape[1]} channels of the images are dealt out as {share} for each of {probe.modalities}, but "
        f"{blind[0]!r} sees only some of those of {probe.modalities[private[blind[0]]]!r}, and no module depends on "
        f"{missing[0]!r} alone: have they different numbers of channels? Where one is missing, a part of another "
        f"would be blanked. Say in fill_missing= (a function of images and mask) which channels are whose, or let the "
        f"backbone take a mapping from modality to images"
    )


def _prediction(probe: Probe) -> Tensor:
    """Return the part of what the backbone returns that follows from its classifier, if that is known."""
    raw, prediction = probe.outputs()
    if probe.classifier is None:
        return prediction
    relations = [(follows(prediction, part), part) for part in maps_in(raw)]
    found = [(relation, part) for relation, part in relations if relation is not None]
    # The softmax of logits says more about what the classes are than the logits, where both are returned.
    return next((part for relation, part in found if relation), found[0][1] if found else prediction_of(raw))


def _fingerprints(probe: Probe, x: Any, search: ClassifierSearch | None = None) -> Fingerprints:
    """Run the backbone, and return fingerprints of the outputs of every module, call by call."""
    calls: Fingerprints = defaultdict(list)

    def capture(name: str, module: nn.Module, forward: Handler, *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if search is not None:
            search.see(name, module, output)
        calls[name].append(_fingerprint(output, probe.batch))
        return output

    modules = {name: module for name, module in probe.backbone.named_modules() if name}
    probe.run(x, handlers={module: functools.partial(capture, name, module) for name, module in modules.items()})
    return calls


def _dependencies(probe: Probe, base: Fingerprints) -> tuple[dict[str, int], list[str]]:
    """Return the modality of every private module, in call order, and the modules called for one after the other."""
    depends: dict[str, list[set[int]]] = {name: [set() for _ in calls] for name, calls in base.items()}
    unstable = set()
    for m in range(len(probe.modalities)):
        other = _fingerprints(probe, probe.images(m))
        for name, calls in base.items():
            if len(other[name]) != len(calls):
                unstable.add(name)
                continue
            for found, before, after in zip(depends[name], calls, other[name], strict=True):
                if _changed(before, after):
                    found.add(m)
    private, shared = {}, []
    for name, sets in depends.items():
        if name in unstable or not any(True for _ in probe.backbone.get_submodule(name).parameters()):
            continue
        if len(set().union(*sets)) == 1 and all(sets):
            if all(call is not None for call in base[name]):
                private[name] = next(iter(sets[0]))
        elif all(len(one) == 1 for one in sets):
            shared.append(name)
    return private, shared


def _fingerprint(output: Any, batch: int) -> Fingerprint:
    """Return a few numbers for each tensor, or None for an output that could not be replayed by rows."""
    leaves = [leaf for leaf in tree_leaves(output) if not isinstance(leaf, _PLAIN)]
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or leaf.is_nested or unreadable(leaf) or leaf.ndim == 0 or len(leaf) != batch:
            return None
    return [_summary(leaf.detach()) for leaf in leaves] or None


def _summary(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    if flat.numel() == 0:
        return flat.double().cpu()
    # Drawn, not strided: a stride could meet the same channel again and again.
    generator = torch.Generator().manual_seed(flat.numel())
    index = torch.randint(flat.numel(), (min(_SAMPLES, flat.numel()),), generator=generator)
    means = [value.sum(dtype=torch.float64).reshape(1) / flat.numel() for value in (flat, flat.abs())]
    return torch.cat([flat[index.to(flat.device)].double(), *means]).cpu()


def _changed(before: Fingerprint, after: Fingerprint) -> bool:
    if before is None or after is None:
        return before is not after
    if len(before) != len(after):
        return True
    for old, new in zip(before, after, strict=True):
        if old.shape != new.shape:
            return True
        old, new = torch.nan_to_num(old), torch.nan_to_num(new)
        if old.numel() and float((old - new).abs().max()) > _CHANGED * float(old.abs().max()):
            return True
    return False


def _outermost(names: Sequence[str] | Mapping[str, Any]) -> list[str]:
    known, found = set(names), []
    for name in names:
        parts = name.split(".")
        if known.isdisjoint(".".join(parts[:length]) for length in range(1, len(parts))):
            found.append(name)
    return found
