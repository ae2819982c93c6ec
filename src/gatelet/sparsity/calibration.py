"""Supplement A.3: the test-time threshold at which the target share of gates is open."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gatelet._checks import check_logits, check_rate
from gatelet.estimators._base import wide
from gatelet.estimators._distributed import is_distributed
from gatelet.units import StochasticUnit, sampling

_KEPT = 1 << 25  # logits kept per layer; above, a random half is dropped (the quantile's error is then < 1e-4)


def calibrate_thresholds(
    model: nn.Module,
    loader: Iterable[Any],
    target_rate: float | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> dict[str, float]:
    """Set each unit's test-time threshold so that the target share of its gates is open on ``loader``.

    Gates open iff their logit exceeds the threshold, so it is the (1 − s)-quantile of the logits (A.3).
    Units are done in the order in which they run, each with the earlier ones already in their deterministic
    mode, with one pass over ``loader`` per unit.

    Args:
        model: holds stochastic units with a ``target_rate`` (every conditional layer does). It is run in
            ``eval()`` and left in the mode in which it was.
        loader: yields batches; must allow several passes (a list or a DataLoader, no generator).
        target_rate: s for all units, instead of their own.
        forward: runs the model on a batch; by default ``model(batch)``, or ``model(batch[0])`` for a tuple or list.

    Returns:
        unit's name -> share of its gates that are open now, on ``loader``. It differs from s where gates tie
        or, for rectifiers, where fewer than s are above zero. Units whose gates are always open are left out.

    Raises:
        ValueError: if no unit has a target rate, the loader is an iterator or yields nothing, a rate lies outside
            (0, 1), the model runs none of its units, or logits are not finite.

    >>> import torch, gatelet
    >>> layer = gatelet.nn.ConditionalLinear(8, 50, bottleneck=4, estimator="straight_through", target_rate=0.1)
    >>> calibrate_thresholds(layer, [torch.randn(20, 8)])
    {'unit': 0.1...}
    >>> layer.eval()(torch.randn(3, 8)).shape
    torch.Size([3, 50])

    Reference: Y. Bengio, N. Léonard, A. Courville, "Estimating or Propagating Gradients Through Stochastic
    Neurons for Conditional Computation", 2013, arXiv:1308.3432, supplement A.3.
    """
    if target_rate is not None:
        check_rate(target_rate)
    run = forward or (lambda module, batch: module(batch[0] if isinstance(batch, tuple | list) else batch))
    units = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, StochasticUnit) and (module.target_rate is not None)
    }
    if isinstance(loader, Iterator):
        raise ValueError("loader: must allow several passes; give a list or a DataLoader, not a generator")
    if not units and not any(isinstance(it, StochasticUnit) and not it.estimator.rated for it in model.modules()):
        raise ValueError("model: holds no stochastic unit with a target_rate, so there is nothing to calibrate")
    if not units:
        return {}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), sampling(model, on=False):
            done: dict[str, float] = {}
            for name, calls in _order(model, units, loader, run).items():
                logits = _collect(model, units[name], calls, loader, run)
                rate = target_rate if target_rate is not None else units[name].target_rate
                assert rate is not None
                done[name] = _set_threshold(units[name], logits, rate)
            return done
    finally:
        for module, mode in modes:
            module.training = mode


class _Seen(Exception):  # noqa: N818
    """Ends a forward pass once the logits of interest were seen."""


def _order(
    model: nn.Module, units: dict[str, StochasticUnit], loader: Iterable[Any], run: Callable[..., Any]
) -> Counter[str]:
    """Return the units' names in the order in which one batch runs them, and how often it runs each."""
    order: Counter[str] = Counter()
    hooks = [unit.register_forward_pre_hook(lambda *_, name=name: order.update([name])) for name, unit in units.items()]
    try:
        with sampling(model):
            for batch in loader:
                run(model, batch)
                if not order:
                    raise ValueError("model: ran none of its stochastic units with a target_rate on the first batch")
                return order
    finally:
        for hook in hooks:
            hook.remove()
    raise ValueError("loader: yielded no batch")


def _collect(
    model: nn.Module, unit: StochasticUnit, calls: int, loader: Iterable[Any], run: Callable[..., Any]
) -> Tensor:
    """Return the unit's logits over the loader, on the CPU; of all its calls on a batch, if there are several."""
    kept: list[Tensor] = []
    share, total, seen = 1.0, 0, 0
    generator = torch.Generator().manual_seed(0)

    def thin(values: Tensor, keep: float) -> Tensor:
        return values if keep == 1 else values[torch.rand(values.shape, generator=generator) < keep]

    def see(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        nonlocal share, total, seen
        logits = (args[0] if args else kwargs["logits"]).detach().cpu()
        check_logits(logits)
        if unit.mask is not None:
            logits = logits[unit.mask.cpu()]
        kept.append(thin(logits.to(wide(logits)).flatten(), share))
        total += kept[-1].numel()
        if total > _KEPT:
            kept[:] = [thin(torch.cat(kept), 0.5)]
            share, total = share / 2, kept[0].numel()
        seen += 1
        if seen % calls == 0:
            raise _Seen

    hook = unit.register_forward_pre_hook(see, with_kwargs=True)
    try:
        with sampling(unit):  # between its own calls it has no threshold yet
            for batch in loader:
                try:
                    run(model, batch)
                except _Seen:
                    continue
    finally:
        hook.remove()
    if not kept:
        raise ValueError("loader: yielded no batch on a second pass; give a list or a DataLoader, not a generator")
    return torch.cat(kept)


def _set_threshold(unit: StochasticUnit, logits: Tensor, rate: float) -> float:
    """Set the threshold to the (1 − rate)-quantile, and return the share of gates that it opens."""
    if logits.numel() == 0:
        raise ValueError("loader: yielded only empty batches")
    closed = min(logits.numel(), max(1, round((1 - rate) * logits.numel())))
    unit.threshold.copy_(logits.kthvalue(closed).values)
    if is_distributed():  # each process calibrated on its share of the data
        torch.distributed.all_reduce(unit.threshold)
        unit.threshold /= torch.distributed.get_world_size()
    gates = unit.estimator.deterministic(logits, unit.threshold.to(logits))
    return (gates != 0).float().mean().item()
