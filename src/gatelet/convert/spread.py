"""How much of each block is to be open: more where closing units harms the model's output more."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatelet._checks import check_rate
from gatelet.convert.block import Block, affine_at, at
from gatelet.convert.find import find
from gatelet.convert.place import blocks
from gatelet.convert.progress import Progress
from gatelet.sparsity.calibration import run_on

SAMPLE = 1 << 16
"""This many costs of units are sampled from each batch, to know their distribution in a block."""
LEAST, MOST = 0.05, 0.98
"""The least and the largest rate of a block."""


def spread_rate(
    model: nn.Module,
    loader: Iterable[Any],
    target_rate: float,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Spread a share of open units over a dense model's blocks so that closing the rest harms its output least.

    Of unit n of block l, closing it costs c² = (hidden_n · ‖W2 column n‖)² of the block's output. With D_l the
    divergence KL(dense ‖ with block l alone at the target rate) of the model's output and E_l the sum of what is closed
    there, s_l = D_l / E_l is the harm to the output per cost in block l. At a given mean of the shares, the sum
    Σ_l s_l · E_l is smallest if all blocks close the units under the same s_l · c² = λ; λ is found by bisection.

    The costs are those of dense inputs, and the effects of several blocks are assumed to add up. Nothing is random.

    Args:
        model: dense, on any device; its state stays what it was.
        loader: yields batches without padding; a few thousand tokens do. One pass to know the costs, then per batch
            one run of the model for each block.
        target_rate: the mean share of open units, weighted by the sizes of W2.
        forward: runs the model on a batch and returns logits (..., C); by default as
            :func:`gatelet.sparsity.calibrate_thresholds` does, and ``.logits`` of what that returns where there is
            such.
        progress: show how far it is: a line on a terminal, elsewhere one every 30 seconds.

    Returns:
        block's name -> its rate, between 0.05 and 0.98: a ``target_rate`` for :func:`gatelet.convert`.

    Raises:
        ValueError: for a rate outside (0.05, 0.98), a model with converted blocks or without blocks, a loader that
            yields nothing or is an iterator.

    >>> import torch
    >>> part = [torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)]
    >>> rates = spread_rate(torch.nn.Sequential(*part), [torch.randn(64, 8)], 0.4)
    >>> round(rates["0"], 2)
    0.4

    Reference: none; the condition of one λ is Lagrange's.
    """
    if not LEAST < check_rate(target_rate) < MOST:
        raise ValueError(f"target_rate must lie between {LEAST} and {MOST} to be spread, not be {target_rate}")
    if isinstance(loader, Iterator):
        raise ValueError("loader: must allow several passes; give a list or a DataLoader, not a generator")
    if blocks(model):
        raise ValueError("model: holds converted blocks; give the dense model, and convert with the rates found")
    found = {
        label: _Closing(module, block)
        for name, module in model.named_modules()
        for label, _, block in find(name, module)
        if isinstance(block, Block)
    }
    if not found:
        raise ValueError("model: has no feed-forward block")
    run, modes = forward or _logits, [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            harm = _harm(model, found, loader, target_rate, run, Progress(progress))
    finally:
        for module, mode in modes:
            module.training = mode
    return _shares(found, harm, target_rate)


class _Closing:
    """A dense block of which cheap units can be closed."""

    def __init__(self, owner: nn.Module, block: Block) -> None:
        self.down = at(owner, block.down)
        weight = affine_at(owner, block.down).weight.detach()
        self.norms, self.size = weight.norm(dim=0), weight.numel()
        self.costs = weight.new_zeros(0)
        self.limit = 0.0

    def see(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Sample the units' costs."""
        cost = (args[0].detach() * self.norms).square().flatten()
        self.costs = torch.cat([self.costs, cost[:: cost.numel() // SAMPLE + 1 | 1].to(self.costs)])

    def close(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Close the units that cost no more than the limit."""
        hidden = args[0]
        return (torch.where((hidden * self.norms).square() > self.limit, hidden, 0), *args[1:])


@contextmanager
def _hooked(hooks: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _logits(model: nn.Module, batch: Any) -> Tensor:
    out = run_on(model, batch)
    logits: Tensor = getattr(out, "logits", out)
    return logits


def _harm(
    model: nn.Module, found: dict[str, _Closing], loader: Any, rate: float, run: Any, shown: Progress
) -> dict[str, float]:
    """Return s_l of each block."""
    for batch in shown.phase("costs of units", loader):
        with _hooked({closing.down: closing.see for closing in found.values()}):
            run(model, batch)
    closed = dict.fromkeys(found, 0.0)
    for name, closing in found.items():
        if not len(closing.costs):
            raise ValueError(f"loader: no batch reaches the block {name}")
        costs = closing.costs = closing.costs.sort().values
        count = min(len(costs) - 1, round((1 - rate) * len(costs)))
        closing.limit, closed[name] = float(costs[count - 1]) if count else -1.0, float(costs[:count].double().mean())
    harm = dict.fromkeys(found, 0.0)
    for batch in loader:
        dense = run(model, batch).flatten(0, -2).float().log_softmax(-1)
        for name, closing in shown.phase("harm of closing", list(found.items())):
            with _hooked({closing.down: closing.close}):
                without = run(model, batch).flatten(0, -2).float().log_softmax(-1)
            harm[name] += float(F.kl_div(without, dense, reduction="batchmean", log_target=True))
    least = torch.finfo(torch.float32).tiny
    return {name: max(value, least) / max(closed[name], least) for name, value in harm.items()}


def _shares(found: dict[str, _Closing], harm: dict[str, float], rate: float) -> dict[str, float]:
    """Return the share of each block that lies above one λ, found so that their mean is the rate."""

    def at_level(log_level: float) -> dict[str, float]:
        shares = {}
        for name, closing in found.items():
            limit = torch.tensor(log_level, dtype=torch.float64).exp() / harm[name]
            below = int(torch.searchsorted(closing.costs.double(), limit, right=True))
            shares[name] = min(MOST, max(LEAST, 1 - below / len(closing.costs)))
        return shares

    total = sum(closing.size for closing in found.values())
    low, high = -200.0, 200.0
    for _ in range(60):
        middle = (low + high) / 2
        shares = at_level(middle)
        mean = sum(found[name].size * share for name, share in shares.items()) / total
        low, high = (middle, high) if mean > rate else (low, middle)
    return at_level(high)
