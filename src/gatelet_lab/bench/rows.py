"""`gatelet bench kernels --rows`: one and a few examples over weights of few bytes, beside dense ones of as many."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from gatelet.kernels import gated_ffn, gated_linear, int8_rows, narrow_ffn, narrow_linear

LAYERS = ((4096, 11008, 1), (4096, 11008, 8), (1024, 4096, 1), (784, 2000, 1))
FFNS = ((1024, 4096, 1), (4096, 11008, 1))
"""D, N, B."""
Ways = dict[str, Callable[[], Any]]


def show_rows(
    quick: bool, rate: float, measure: Callable[[Ways], dict[str, float]], console: Console
) -> list[dict[str, Any]]:
    """Print and return milliseconds, and each way's over those of the dense layer of the same format."""
    found = []
    console.print(f"{rate:.0%} open; ms, and / dense of the same format", highlight=False)
    cases = [("linear", layers, *case) for case in LAYERS] + [("SwiGLU", ffns, *case) for case in FFNS]
    for title, make, width, units, batch in cases[: 1 if quick else None]:
        with torch.inference_mode():
            seconds = measure(make(width, units, batch, rate))
        console.print(f"{title} {width}→{units}, B = {batch}", highlight=False)
        for name, took in seconds.items():
            peer = next((each for each in seconds if each.startswith("dense") and each.split()[1] in name), "")
            ratio = f" ({took / seconds[peer]:.3f})" if peer and peer != name else ""
            console.print(f"  {name:28} {1e3 * took:8.3f}{ratio}", highlight=False)
        found.append({"title": title, "shape": (width, units, batch), "ms": {k: 1e3 * v for k, v in seconds.items()}})
    return found


def _draw(width: int, units: int, batch: int, rate: float) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(batch, width, generator=draw), torch.randn(units, width, generator=draw) / width**0.5
    gate = (torch.rand(batch, units, generator=draw) < rate).float()
    return x, weight, torch.randn(units, generator=draw), gate


def _dynamic(*weights: Tensor) -> list[Callable[[Tensor], Tensor]]:
    """Return dense layers as PyTorch quantises them: int8 weights, inputs rounded at every call."""
    made = []
    for weight in weights:
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0])
        linear.weight.data.copy_(weight)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, and what this torch has
            net = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(linear), {torch.nn.Linear})
        made.append(net)
    return made


def layers(width: int, units: int, batch: int, rate: float) -> Ways:
    """Return the ways of a layer."""
    x, weight, bias, gate = _draw(width, units, batch, rate)
    half = [each.bfloat16() for each in (x, weight, bias, gate)]
    rows, (dynamic,) = int8_rows(weight), _dynamic(weight)
    # What the call alone takes, and how fast rows are read that lie in order.
    none, together = torch.zeros_like(gate), (torch.arange(units) < gate.sum(1, keepdim=True)).float()
    return {
        "dense float32": lambda: F.linear(x, weight, bias) * gate,
        "dense bfloat16": lambda: F.linear(*half[:3]) * half[3],
        "dense int8 (quantize_dynamic)": lambda: dynamic(x) * gate,
        "gated_linear float32": lambda: gated_linear(x, weight, bias, gate),
        "narrow float32": lambda: narrow_linear(x, weight, bias, gate),
        "narrow bfloat16": lambda: narrow_linear(half[0], half[1], half[2], half[3]),
        "narrow int8": lambda: narrow_linear(x, rows, bias, gate),
        "int8, nothing open": lambda: narrow_linear(x, rows, bias, none),
        "int8, the first units open": lambda: narrow_linear(x, rows, bias, together),
    }


def ffns(width: int, units: int, batch: int, rate: float) -> Ways:
    """Return the ways of a SwiGLU layer D → N → D."""
    x, w1, _, gate = _draw(width, units, batch, rate)
    w3, w2 = torch.randn_like(w1) / width**0.5, torch.randn_like(w1) / units**0.5
    last = w2.t().contiguous()
    half = [each.bfloat16() for each in (x, w1, w3, last, gate, w2)]
    rows = [int8_rows(each) for each in (w1, w3, w2)]
    first, third, second = _dynamic(w1, w3, last)
    return {
        "dense float32": lambda: F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3) * gate, last),
        "dense bfloat16": lambda: F.linear(F.silu(F.linear(half[0], half[1])) * F.linear(half[0], half[2]), half[3]),
        "dense int8 (quantize_dynamic)": lambda: second(F.silu(first(x)) * third(x)),
        "gated_ffn float32, not gated": lambda: gated_ffn(x, w1, None, gate, "silu", w2.t(), None),
        "narrow float32": lambda: narrow_ffn(x, w1, None, gate, "silu", w2, w3=w3),
        "narrow bfloat16": lambda: narrow_ffn(half[0], half[1], None, half[4], "silu", half[5], w3=half[2]),
        "narrow int8": lambda: narrow_ffn(x, rows[0], None, gate, "silu", rows[2], w3=rows[1]),
    }
