"""Two real processes that talk over gloo, started once and used for many checks."""

from __future__ import annotations

import io
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

__all__ = ["Ranks"]

WORLD = 2
# Seconds. A collective call that a rank waits for in vain raises in that rank after this, the parent waits a little
# longer; long enough for a machine that is busy with other tests.
HANG = 45.0
START = 120.0


class Ranks:
    """Runs a function in every process and returns what each of them returned.

    A rank that hangs fails the test and the processes are started anew: a hang must not block a whole run.
    """

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call ``function(rank, *args, **kwargs)``, importable by name, in each process."""
        if not self._processes:
            self._start()
        what = f"{function.__name__}{args}{kwargs or ''}"
        order = _packed((function.__module__, function.__name__, args, kwargs))
        for pipe in self._pipes:
            pipe.send_bytes(order)
        replies = self._replies(HANG + 10, what)
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(replies) if error]
        if errors:
            self.stop()
            pytest.fail("\n".join(errors))
        return [value for value, _ in replies]

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()

    def _replies(self, seconds: float, what: str) -> list[Any]:
        deadline = time.monotonic() + seconds
        replies = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                self.stop()
                pytest.fail(f"rank {rank} hangs in {what}")
            try:
                replies.append(_unpacked(pipe.recv_bytes()))
            except EOFError:
                self.stop()
                pytest.fail(f"rank {rank} died in {what}")
        return replies

    def _start(self) -> None:
        # Spawned: autograd refuses to work in a fork of a process in which it has been at work.
        context = torch.multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._folder.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self._replies(START, "its start")


def _serve(rank: int, folder: str, pipe: Connection) -> None:
    from importlib import import_module

    from passion_plugin.errors import PassionWarning

    warnings.filterwarnings("error", category=PassionWarning)
    torch.set_num_threads(1)
    os.environ["MPLBACKEND"] = "Agg"
    rendezvous = (Path(folder) / "rendezvous").as_uri()
    timeout = timedelta(seconds=HANG)
    torch.distributed.init_process_group("gloo", rendezvous, timeout=timeout, world_size=WORLD, rank=rank)
    torch.distributed.barrier()
    pipe.send_bytes(_packed(None))
    while True:
        try:
            module, name, args, kwargs = _unpacked(pipe.recv_bytes())
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            reply = getattr(import_module(module), name)(rank, *args, **kwargs), None
        except Exception:
            reply = None, traceback.format_exc()
        pipe.send_bytes(_packed(reply))


def _packed(value: Any) -> bytes:
    """As plain bytes: tensors would travel as shared memory, which dies with the process."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)
