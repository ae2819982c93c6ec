"""Timing ways of computing the same in turns, and what the machine is."""

import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import torch

QUIET = 0.05
"""A measurement counts as undisturbed if other processes use less than this share of a core."""
Ways = Mapping[Any, Callable[[], Any]]


def machine() -> dict[str, Any]:
    """Describe what the numbers hold for."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return {
        "date": date.today().isoformat(),
        "cpu": name,
        "vector": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def interleaved(ways: Ways, budget: float, patience: float = 0.0) -> tuple[dict[Any, float], float]:
    """Return each way's median time in turns, and the share of a core that other processes used meanwhile, if known.

    With ``patience`` (seconds) a disturbed measurement is repeated; the least disturbed one counts.
    """
    for way in ways.values():
        way()
        way()
    begin, best = time.perf_counter(), None
    while best is None or (best[1] > QUIET and time.perf_counter() - begin < patience):
        found = _once(ways, budget)
        if best is None or found[1] < best[1]:
            best = found
    return best


def _once(ways: Ways, budget: float) -> tuple[dict[Any, float], float]:
    times: dict[Any, list[float]] = {name: [] for name in ways}
    begin, busy, own = time.perf_counter(), _busy(), time.process_time()
    order = list(ways)
    while time.perf_counter() - begin < budget or len(times[next(iter(times))]) < 5:
        for name in order:
            start = time.perf_counter()
            ways[name]()
            times[name].append(time.perf_counter() - start)
        # The way that ran before leaves its weights in the caches, so the order is shuffled.
        random.shuffle(order)
    wall = time.perf_counter() - begin
    others = (_busy() - busy - (time.process_time() - own)) / wall
    others = 0.0 if others < 0 else others
    return {name: statistics.median(each) for name, each in times.items()}, round(others, 3)


def _busy() -> float:
    """Return the CPU seconds of the whole machine so far, 0 where the system does not say."""
    with suppress(OSError, ValueError):
        fields = [int(each) for each in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
    return math.nan
