"""`gatelet bench ffn`: a conditional feed-forward layer, gater included, beside the dense one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from gatelet._checks import check_count, check_positive, check_rate
from gatelet.nn import ConditionalFFN
from gatelet.sparsity import calibrate_thresholds
from gatelet_lab.bench.timing import interleaved, machine


@dataclass(frozen=True)
class BenchFFN:
    """Time ConditionalFFN, gater included, against Linear, activation, Linear on this machine."""

    sizes: tuple[int, int, int] = (1024, 4096, 64)
    """D, N and the bottleneck."""
    rate: float = 0.1
    """Share of open gates."""
    batches: tuple[int, ...] = (1, 32, 256)
    """Tokens."""
    estimator: str = "straight_through_open"
    """Estimator for forward + backward; choose one that needs no closed units."""
    group: int = 1
    """Units that share a gate."""
    seconds: float = 2.0
    """Seconds to measure each line."""

    def __post_init__(self) -> None:
        for name in ("sizes", "batches", "group"):
            value = getattr(self, name)
            for each in value if isinstance(value, tuple) else (value,):
                check_count(each, f"--{name}")
        if not self.batches:
            raise ValueError("--batches: give a number of tokens")
        check_rate(self.rate, "--rate")
        check_positive(self.seconds, "--seconds")


def run(options: BenchFFN, console: Console) -> None:
    """Measure and show."""
    about = machine()
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), highlight=False)
    table = Table(title=f"time / dense at {options.rate:.0%} open, {' → '.join(map(str, options.sizes[:2]))}")
    heads = (
        "tokens",
        "dense ms",
        "forward",
        "gates alone",
        "open",
        "dense f+b ms",
        "forward + backward",
        "others' CPU",
    )
    for head in heads:
        table.add_column(head, justify="right")
    for tokens in options.batches:
        table.add_row(*measure(options, tokens))
    console.print(table)


def measure(options: BenchFFN, tokens: int) -> list[str]:
    """Return a line of the table."""
    width, units, bottleneck = options.sizes
    torch.manual_seed(0)
    layer = ConditionalFFN(
        width, units, bottleneck, estimator=options.estimator, target_rate=options.rate, group_size=options.group
    )
    dense = nn.Sequential(nn.Linear(width, units), nn.GELU(), nn.Linear(units, width))
    calibrate_thresholds(layer, [torch.randn(1000, width)])
    x = torch.randn(tokens, width)
    with torch.no_grad():
        layer.eval()
        ways: dict[str, Callable[[], Any]] = {
            "dense": lambda: dense(x),
            "layer": lambda: layer(x),
            "gates": lambda: layer.decide(x),
        }
        forward, busy = interleaved(ways, options.seconds)
    share = float(layer.active_fraction)
    layer.train()
    given, upper = x.clone().requires_grad_(), torch.randn(tokens, width)

    def both(module: nn.Module) -> Callable[[], Any]:
        inputs = [given, *(p for p in module.parameters() if p.requires_grad)]
        return lambda: torch.autograd.grad(module(given), inputs, upper)

    training, busier = interleaved({"dense": both(dense), "layer": both(layer)}, options.seconds)
    return [
        f"{tokens}",
        f"{1e3 * forward['dense']:.3f}",
        f"{forward['layer'] / forward['dense']:.3f}",
        f"{forward['gates'] / forward['dense']:.3f}",
        f"{share:.1%}",
        f"{1e3 * training['dense']:.3f}",
        f"{training['layer'] / training['dense']:.3f}",
        f"{max(busy, busier):.0%}",
    ]
