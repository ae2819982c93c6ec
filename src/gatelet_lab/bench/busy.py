"""`gatelet bench kernels --busy N`: single calls while other processes keep the cores busy."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from torch.nn import functional as F

from gatelet.kernels import gated_linear

LAYERS = ((1024, 4096, 1), (4096, 11008, 1), (1024, 4096, 32))
"""D, N, B."""
PERCENTILES = (0.5, 0.9, 0.99)


def _spin(parent: int) -> None:
    while os.getppid() == parent:
        pass


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Run this many processes that compute all the time; they end with the block, or with this process."""
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_spin, args=(os.getpid(),), daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
            process.join()


def percentiles(ways: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Return the percentiles of each way's milliseconds, called in turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in list(ways.values()) * 3:
        way()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(1e3 * (time.perf_counter() - start))
    wanted = torch.tensor(PERCENTILES, dtype=torch.float64)
    return {
        name: torch.tensor(each, dtype=torch.float64).quantile(wanted).tolist() for name, each in times.items() if each
    }


def show_busy(count: int, rate: float, seconds: float, console: Console) -> list[dict[str, object]]:
    """Print percentiles of single calls, ours and dense, beside ``count`` busy processes, and return them."""
    found: list[dict[str, object]] = []
    console.print(f"beside {count} busy processes, {rate:.0%} open: p50, p90, p99 in ms", highlight=False)
    draw = torch.Generator().manual_seed(0)
    with busy(count), torch.no_grad():
        for width, units, batch in LAYERS:
            x, weight = torch.randn(batch, width, generator=draw), torch.randn(units, width, generator=draw)
            bias = torch.randn(units, generator=draw)
            gate = (torch.rand(batch, units, generator=draw) < rate).float()
            ways: dict[str, Callable[[], object]] = {
                "dense": lambda x=x, w=weight, b=bias, g=gate: F.linear(x, w, b) * g,  # type: ignore[misc]
                "ours": lambda x=x, w=weight, b=bias, g=gate: gated_linear(x, w, b, g),  # type: ignore[misc]
            }
            times = percentiles(ways, seconds)
            shown = {name: " ".join(f"{each:8.3f}" for each in line) for name, line in times.items()}
            ratios = " ".join(f"{a / b:6.2f}" for a, b in zip(times["ours"], times["dense"], strict=True))
            title = f"{width}→{units}, B = {batch}"
            console.print(f"{title:20} ours {shown['ours']}   dense {shown['dense']}   ratio {ratios}", highlight=False)
            found.append({"layer": title, "busy": count, "ms": times})
    return found
