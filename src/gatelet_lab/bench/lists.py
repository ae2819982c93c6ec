"""`gatelet bench kernels --lists`: few open units, given as lists, beside what PyTorch has for them."""

import itertools
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from gatelet.kernels import OpenPattern, gated_input_linear, gated_linear
from gatelet.kernels.backends.numba import lists
from gatelet.kernels.pattern import fixed_starts

SHAPES = ((384, 16384, 32, 512), (576, 32768, 32, 2048))
"""D, N, K open per example, B."""
MANY = (128, (1 << 16, 1 << 20), 64, 512)
"""The same with several N: how the cost of a pair grows with the number of units."""
Ways = dict[str, Callable[[], Any]]


def show_lists(quick: bool, measure: Callable[[Ways], dict[str, float]], console: Console) -> list[dict[str, Any]]:
    """Print and return the tables. ``measure`` gives the seconds of ways that are run in turns."""
    found = []
    for shape in SHAPES[: 1 if quick else 2]:
        width, units, most, batch = shape
        console.print(f"D = {width}, N = {units}, {most} open, B = {batch}: ms, and / the first", highlight=False)
        for title, ways in tables(*shape).items():
            with torch.set_grad_enabled("backward" in title):
                seconds = measure(ways)
            first = next(iter(seconds.values()))
            each = "   ".join(f"{name} {1e3 * took:.2f} ({took / first:.4f})" for name, took in seconds.items())
            console.print(f"  {title:22} {each}", highlight=False)
            found.append({"shape": shape, "title": title, "ms": {name: 1e3 * took for name, took in seconds.items()}})
    return found + ([] if quick else show_many(console))


def tables(width: int, units: int, most: int, batch: int) -> dict[str, Ways]:
    """Return what is timed: a decoder forward and with its backward pass, an encoder, an encoder with its top-k.

    Ours are the public ops, which look at the indices at every call.
    """
    draw = torch.Generator().manual_seed(0)
    weight, x, grad = (torch.randn(size, width, generator=draw) for size in (units, batch, batch))
    bias = torch.randn(units, generator=draw)
    indices = torch.stack([torch.randperm(units, generator=draw)[:most].sort().values for _ in range(batch)])
    values = torch.randn(batch, most, generator=draw)
    starts, flat, coefficient = fixed_starts(batch, most), indices.flatten(), values.flatten()
    hidden = torch.zeros(batch, units).scatter_(1, indices, values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peer announces that it is in beta
        csr = torch.sparse_csr_tensor(starts, flat, coefficient, (batch, units))
    columns, pattern = weight.t(), OpenPattern.from_indices(indices, units)

    def bag(w: Tensor, v: Tensor, sparse: bool) -> Tensor:
        return F.embedding_bag(indices, w, per_sample_weights=v, mode="sum", sparse=sparse)

    def ours(w: Tensor, v: Tensor, sparse: bool = False) -> Tensor:
        return gated_input_linear(v, indices, w, None, by_unit=True, sparse_grad=sparse)

    w, v, h = (each.clone().requires_grad_() for each in (weight, values, hidden))
    return {
        "forward": {
            "dense": lambda: hidden @ weight,
            "ours": lambda: ours(weight, values),
            "embedding_bag": lambda: bag(weight, values, False),
            "CSR @ W": lambda: csr @ weight,
        },
        # The weights are then in the caches, as far as they fit: dense is not among these ways.
        "forward again": {
            "embedding_bag": lambda: bag(weight, values, False),
            "ours": lambda: ours(weight, values),
            "ours, pattern made before": lambda: gated_input_linear(values, pattern, weight, None, by_unit=True),
        },
        "forward and backward": {
            "dense": lambda: torch.autograd.grad(h @ w, (h, w), grad),
            "ours, rows touched": lambda: torch.autograd.grad(ours(w, v, True), (v, w), grad),
            "ours, dense": lambda: torch.autograd.grad(ours(w, v), (v, w), grad),
            "embedding_bag, sparse": lambda: torch.autograd.grad(bag(w, v, True), (v, w), grad),
            "embedding_bag, dense": lambda: torch.autograd.grad(bag(w, v, False), (v, w), grad),
        },
        "encoder, units given": {
            "dense": lambda: F.linear(x, weight, bias),
            "ours": lambda: gated_linear(x, weight, bias, None, pattern=indices),
            "sampled_addmm": lambda: torch.sparse.sampled_addmm(csr, x, columns, beta=0.0),
        },
        "encoder with its top-k": {
            "dense": lambda: F.linear(x, weight, bias).topk(most),
            "ours": lambda: lists.top_k(x, weight, bias, most),
        },
    }


def show_many(console: Console, rounds: int = 48) -> list[dict[str, Any]]:
    """Print nanoseconds per open pair for growing N. Every call has other units, so what it reads is not in cache."""
    width, sizes, most, batch = MANY
    console.print(f"D = {width}, {most} open, B = {batch}: ns per open pair", highlight=False)
    found = []
    for units in sizes:
        times = many(width, units, most, batch, rounds)
        each = "   ".join(f"{name} {took:.0f}" for name, took in times.items())
        console.print(f"  N = {units:<9} {each}", highlight=False)
        found.append({"shape": (width, units, most, batch), "ns": times})
    return found


def many(width: int, units: int, most: int, batch: int, rounds: int) -> dict[str, float]:
    """Return the nanoseconds per pair of the parts of a step."""
    draw = torch.Generator().manual_seed(0)
    weight, grad = torch.randn(units, width, generator=draw), torch.randn(batch, width, generator=draw)
    starts, values = fixed_starts(batch, most), torch.randn(batch * most, generator=draw)
    part = units // most  # one unit of each of as many ranges: sorted, without repeats
    begins = torch.arange(most) * part
    draws = [(begins + torch.randint(part, (batch, most), generator=draw)).flatten() for _ in range(24)]
    turns = itertools.cycle(draws)
    times: dict[str, list[float]] = {}

    def clock(name: str, way: Callable[[Tensor], Any]) -> None:
        units_now = next(turns)
        start = time.perf_counter()
        way(units_now)
        times.setdefault(name, []).append((time.perf_counter() - start) / (batch * most))

    def back(now: Tensor) -> None:
        turned = lists.turned(starts, now, units)
        _, rows = lists.backward(grad, weight, values, turned)
        lists.add_rows(weight, rows, turned, -1e-6)

    for _ in range(rounds):
        clock("forward", lambda now: lists.by_example(values, weight, None, starts, now))
        clock("encoder", lambda now: lists.dots(grad, weight, None, starts, now))
        clock("backward and update", back)
        clock("embedding_bag", lambda now: bag_of(now.view(batch, most), weight, values))
    return {name: 1e9 * statistics.median(each) for name, each in times.items()}


def bag_of(indices: Tensor, weight: Tensor, values: Tensor) -> Tensor:
    """Return the peer's forward pass."""
    return F.embedding_bag(indices, weight, per_sample_weights=values.view(indices.shape), mode="sum")
