"""Sources that are changed while they are imported, in memory only, and packages that need not be installed."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

__all__ = ["Edit", "edited", "replacing"]

Edit = Callable[[str], str]
"""From the source of a module to the source that is compiled in its place."""


def replacing(*pairs: tuple[str, str]) -> Edit:
    """Return an edit that replaces texts, and raises LookupError for one that is not there (another commit?)."""

    def edit(text: str) -> str:
        for old, new in pairs:
            if old not in text:
                raise LookupError(f"the source does not contain {old!r}: is it another commit?")
            text = text.replace(old, new)
        return text

    return edit


@contextmanager
def edited(edits: Mapping[str, Edit] | None = None, *, absent: Sequence[str] = ()) -> Iterator[None]:
    """Change sources that :func:`~tools.backbones.checkout.load` imports inside the context.

    Args:
        edits: for the dotted name of a module, what happens to its source. Files stay as they are.
        absent: packages that are imported but not used by the model: hollow modules take the place of those
            that are not installed.
    """
    missing = [name for name in absent if importlib.util.find_spec(name) is None]
    finder = _Finder(edits or {}, missing)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _Hollow)]:
            del sys.modules[name]


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, edits: Mapping[str, Edit], missing: Sequence[str]) -> None:
        self._edits = edits
        self._missing = missing

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] in self._missing:
            return ModuleSpec(name, _HollowLoader(), is_package=True)
        spec = PathFinder.find_spec(name, path) if name in self._edits else None
        if spec is not None and spec.origin is not None:
            spec.loader = _Editor(name, spec.origin, self._edits[name])
        return spec


class _Editor(SourceFileLoader):
    def __init__(self, name: str, file: str, edit: Edit) -> None:
        super().__init__(name, file)
        self._edit = edit

    def get_code(self, fullname: str) -> Any:
        return compile(self._edit(self.get_source(fullname) or ""), self.path, "exec")


class _HollowLoader(importlib.abc.Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Hollow(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Hollow(ModuleType):
    """A module in which every name is a class of its own."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})
