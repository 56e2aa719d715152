"""Answering for modules of a backbone for the time of a pass, and putting everything back whatever happens.

Hooks would not do for listening: those added after ``torch.compile`` never fire, the replicas of ``DataParallel``
share one dictionary of hooks, and other libraries clear it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from passion_plugin.errors import UsageError

__all__ = ["Handler", "one_at_a_time", "overridden_forward", "refuse_thread", "undone"]

Handler = Callable[..., Any]
# For handlers. The compiler sees what they call and not them: they change with every pass, until it gives up, and what
# it would trace of them is not what happens (versions of tensors). As for the private name: see Passion.train_forward.
untraced = torch._disable_dynamo(recursive=False)  # type: ignore[attr-defined]

_Result = TypeVar("_Result")


class _Waiting(threading.local):
    """What is still to be undone, in each thread; the last is undone first."""

    def __init__(self) -> None:
        self.undos: list[undone] = []


_WAITING = _Waiting()


class undone:  # noqa: N801 - reads as a verb, as contextlib.suppress does
    """Call ``undo`` when the context ends, after an exception or a Ctrl-C too.

    Args:
        undo: puts something back; doing so again changes nothing.
    """

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo = undo

    def __enter__(self) -> None:
        _WAITING.undos.append(self)

    def __exit__(self, *_: object) -> None:
        if self not in _WAITING.undos:
            return
        try:
            self._undo()
        except BaseException:
            # A Ctrl-C may have fallen into the first round.
            self._undo()
            raise
        finally:
            _WAITING.undos.remove(self)


def one_at_a_time(
    turn: dict[str, int], run: Callable[[], _Result], on_error: Callable[[], None] = lambda: None
) -> _Result:
    """Run a function in one thread at a time; whatever ends it, everything :class:`undone` in it is.

    Args:
        turn: whose turn it is, shared by the threads.
        run: what to run.
        on_error: called after an exception of ``run``.

    Raises:
        UsageError: another thread is in.
    """
    owner, depth, entered = threading.get_ident(), len(_WAITING.undos), False

    def leave() -> None:
        if turn.get("thread") == owner:
            turn.clear()

    try:
        # One operation, so that only one gets in. A lock could stay closed after a Ctrl-C.
        refuse_thread(turn.setdefault("thread", owner))
        entered = True
        result = run()
        leave()
        return result
    except BaseException:
        # A stack calls all of them, the last first, whatever one of them raises.
        with ExitStack() as stack:
            if entered:
                stack.callback(on_error)
            # A Ctrl-C between the end of a context and its exit skips that.
            for context in _WAITING.undos[depth:]:
                stack.callback(context.__exit__)
        raise
    finally:
        # A second time where nothing happened: without it a Ctrl-C at the first would keep everybody out for good.
        leave()


@contextmanager
def overridden_forward(handlers: Mapping[nn.Module, Handler]) -> Iterator[None]:
    """Answer for some modules while the context is open, by ``module.forward`` of the single instances.

    Args:
        handlers: for each module a function ``(original_forward, *args, **kwargs) -> output``.

    Raises:
        UsageError: another thread is answering for one of them; or, from such a module, another thread calls it
            meanwhile and would get answers that are meant for this one.
    """
    before: dict[nn.Module, Any] = {}
    owner = threading.get_ident()

    def put_back() -> None:
        for module, forward in before.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward

    with undone(put_back):
        for module, handler in handlers.items():
            current = module.__dict__.get("forward")
            if isinstance(current, functools.partial) and current.func is _answer:
                refuse_thread(current.args[0])
            before[module] = current
            # Written past __setattr__, which a backbone may have customised.
            module.__dict__["forward"] = functools.partial(_answer, owner, handler, module.forward)
        yield


def refuse_thread(owner: int) -> None:
    """Check that it is the thread ``owner`` that calls.

    Raises:
        UsageError: it is another one.
    """
    if threading.get_ident() != owner:
        raise UsageError(
            "another thread is in a training step of this backbone. Let one thread at a time use it, with a lock "
            "round forward and passion_loss, or give each thread a deep copy"
        )


@untraced
def _answer(owner: int, handler: Handler, forward: Handler, *args: Any, **kwargs: Any) -> Any:
    refuse_thread(owner)
    return handler(forward, *args, **kwargs)
