"""How time and memory are measured, and on what machine."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

__all__ = [
    "ParityError",
    "Spread",
    "available_bytes",
    "best",
    "interleaved",
    "machine_facts",
    "peak_memory",
    "relative_error",
    "spread",
]

Call = Callable[[], Any]

_FEWEST_ROUNDS = 3


class ParityError(RuntimeError):
    """Candidates do not compute the same thing, so that comparing their cost means nothing."""


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles.

    Example:
        >>> spread([4.0, 1.0, 2.0, 3.0, 5.0])
        Spread(median=3.0, low=2.0, high=4.0)
    """
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def interleaved(
    candidates: Mapping[str, Sequence[Call]], *, device: torch.device, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Time several candidates in turn, so that whatever disturbs the machine disturbs all of them.

    Every candidate is a sequence of calls, such as one for each batch; a round times each call of each
    candidate once, the candidates alternating call by call and starting with another one each time. The first
    call of each candidate goes before all rounds, untimed.

    Args:
        candidates: sequences of equal length, by name.
        device: where they compute; waited for before every reading of the clock.
        rounds: at most so many, at least 3.
        seconds: no further round is begun after this time.

    Returns:
        For each candidate the mean time of a call in each round, in seconds. Values at one position belong to
        the same round, so that their ratio is a fair one.
    """
    names = list(candidates)
    result: dict[str, list[float]] = {name: [] for name in names}
    began = time.perf_counter()
    collecting = gc.isenabled()
    # What is here already is left alone by the collections between rounds, which would take long otherwise.
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for calls in candidates.values():
            calls[0]()
        for turn in range(max(rounds, _FEWEST_ROUNDS)):
            if turn >= _FEWEST_ROUNDS and time.perf_counter() - began > seconds:
                break
            gc.collect()
            totals = dict.fromkeys(names, 0.0)
            for position, calls in enumerate(zip(*candidates.values(), strict=True)):
                for index in range(len(names)):
                    chosen = (index + position + turn) % len(names)
                    totals[names[chosen]] += _seconds(calls[chosen], device)
            for name in names:
                result[name].append(totals[name] / len(candidates[name]))
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
    return result


def best(call: Call, device: torch.device, times: int = 7) -> float:
    """Return the shortest of several times, for limits of the machine."""
    return min(_seconds(call, device) for _ in range(times))


def _seconds(call: Call, device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(call: Call, device: torch.device) -> int:
    """Return the most bytes that were allocated at one time during a call, beyond those before it.

    On the CPU these are the events of PyTorch's own allocator as the profiler records them: every tensor,
    temporaries inside operators and custom operators, and the scratch memory of oneDNN. Unlike the resident
    size of the process they do not depend on what the C library keeps or on what ran before, so one reading is
    enough. What they leave out is memory that no tensor uses: code, Python, fragmentation.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    events = sorted((event for event in trace if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    live = most = 0
    for event in events:
        live += event["args"]["Bytes"]
        most = max(most, live)
    return most


def available_bytes(device: torch.device) -> int:
    """Return how much memory a measurement may use: 60 % of what the machine has (CPU) or has free (CUDA)."""
    if device.type == "cuda":
        return int(0.6 * torch.cuda.mem_get_info(device)[0])
    return int(0.6 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Return ``|value - reference| / |reference|``, Euclidean norms in float64; NaN where a number is not finite."""
    value, reference = value.detach().double(), reference.detach().double()
    if not bool(value.isfinite().all() & reference.isfinite().all()):
        return float("nan")
    tiny = torch.finfo(torch.float64).tiny
    return float((value - reference).norm() / reference.norm().clamp(min=tiny))


def machine_facts(device: torch.device) -> dict[str, str]:
    """Return what a figure depends on, for the columns of a result."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "device": device.type,
        "processor": gpu or _processor(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
