"""Every exception and warning this library raises, and how their messages are built.

A message says what was passed, what was found and what to do. Where several things are wrong they are
reported together: fixing a spec one name at a time is a waste of the user's afternoon.
"""

from __future__ import annotations

import difflib
import importlib
import os
import reprlib
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "BackboneError",
    "ConfigError",
    "InputError",
    "PassionError",
    "PassionWarning",
    "UsageError",
    "listed",
    "quoted",
    "raise_problems",
    "require",
    "short",
    "shortlist",
    "suggest",
    "warn_user",
]

_MOST_PROBLEMS = 20


class PassionError(Exception):
    """Base of every error raised on purpose by this library."""


class ConfigError(PassionError, ValueError):
    """A configuration, a spec, a presence table or a name is wrong."""


class InputError(PassionError, ValueError):
    """A tensor or array handed over at run time has the wrong shape, dtype or content."""


class BackboneError(PassionError, RuntimeError):
    """The backbone cannot be used as asked (not detected, not replayable, mask without effect)."""


class UsageError(PassionError, RuntimeError):
    """Calls came in an order that makes no sense, such as ``passion_loss`` before ``forward``."""


class PassionWarning(UserWarning):
    """Category of every warning of this library, so that it can be filtered or turned into an error."""


def suggest(name: str, candidates: Iterable[str]) -> str:
    """Return a hint with close matches of ``name``, or with all candidates when they are few.

    Args:
        name: the name that was not found.
        candidates: the names that exist.

    Returns:
        A sentence that starts with a space, or the empty string when there is nothing to suggest.

    Example:
        >>> suggest("t1c", ["flair", "t1ce", "t1", "t2"])
        " Did you mean 't1ce' or 't1'?"
    """
    pool = sorted(set(map(str, candidates)))
    close = difflib.get_close_matches(str(name), pool, n=3, cutoff=0.5)
    if close:
        return f" Did you mean {_either(close)}?"
    if 0 < len(pool) <= 12:
        return f" Known: {', '.join(map(repr, pool))}."
    return ""


def raise_problems(problems: Sequence[str], *, what: str, error: type[PassionError] = ConfigError) -> None:
    """Raise one error that lists every problem, the first 20 in words; do nothing when there is none.

    Args:
        problems: one sentence each, with what was found and what to do.
        what: what was being checked, the start of the message.
        error: class of the error.

    Raises:
        PassionError: of class ``error``, when ``problems`` is not empty.
    """
    if not problems:
        return
    if len(problems) == 1:
        raise error(f"{what}: {problems[0]}")
    lines = [f"  {number}. {problem}" for number, problem in enumerate(problems[:_MOST_PROBLEMS], start=1)]
    if len(problems) > _MOST_PROBLEMS:
        lines.append(f"  and {len(problems) - _MOST_PROBLEMS} more")
    raise error("\n".join([f"{what}: {len(problems)} problems", *lines]))


def short(error: Exception) -> str:
    """Return class and message of an exception on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'…' if len(text) > 200 else ''}"


def listed(names: Iterable[str], most: int = 4) -> str:
    """Return names in one line: the first ``most`` of them, and how many more there are.

    Example:
        >>> listed(["t1", "t2", "flair"], most=2)
        't1, t2 and 1 more'
    """
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def quoted(names: Iterable[str], most: int = 4) -> str:
    """Return names in quotation marks in one line, as :func:`listed` does."""
    return listed(map(repr, names), most)


def shortlist(values: Iterable[object]) -> str:
    """Return the first six values, separated by commas, each cut to 30 characters.

    Example:
        >>> shortlist(range(100))
        '0, 1, 2, 3, 4, 5, ...'
    """
    return reprlib.repr(list(values))[1:-1]


def _either(names: Sequence[str]) -> str:
    quoted = [repr(name) for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


_OURS = tuple(str(Path(file).parent) + os.sep for file in (__file__, torch.__file__))


def warn_user(message: str) -> None:
    """Warn about the line of the user: the first one on the stack that is neither ours nor of torch."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    file, line, module = frame.f_code.co_filename, frame.f_lineno, frame.f_globals.get("__name__")
    # Without the registry of that line: its filter would take the warning of another engine for the same one.
    warnings.warn_explicit(message, PassionWarning, file, line, module)


def require(module: str, *, extra: str, purpose: str) -> Any:
    """Import ``module`` or say which extra of this package brings it.

    Args:
        module: dotted name of the module.
        extra: name of the extra that installs it.
        purpose: what needs it, the start of the message.

    Returns:
        The module.

    Raises:
        ImportError: when it is not installed, with the exact pip line.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"{purpose} needs {package}, which could not be imported ({error}). "
            f'Install it with: pip install "passion-plugin[{extra}]"'
        ) from error
