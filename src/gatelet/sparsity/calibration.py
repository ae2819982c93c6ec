"""Supplement A.3: the test-time threshold at which the target share of gates is open."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from gatelet._checks import check_logits, check_positive, check_rate
from gatelet.estimators._distributed import alone, gathered, is_distributed, meet, pooled_quantile, total
from gatelet.estimators._noise import wide
from gatelet.units import StochasticUnit, sampling

_KEPT = 1 << 20
"""Logits kept per unit; above, a random half is dropped: the share then errs by some 5e-4 (one standard deviation)."""
_MOVING = 1 << 16
"""How many of these give the threshold that moves from batch to batch during the first sweep."""
_CIRCLE = 4
"""The most sweeps if a unit runs several times for a batch, so that its logits may depend on its own threshold."""


def run_on(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch of a usual form."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def calibrate_thresholds(
    model: nn.Module,
    loader: Iterable[Any],
    target_rate: float | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    *,
    local: bool = False,
    timeout: float = 30.0,
) -> dict[str, float]:
    """Set each unit's test-time threshold so that the target share of its gates is open on ``loader``.

    Gates open iff their logit exceeds the threshold, so it is the (1 − s)-quantile of the logits (A.3).
    A unit's logits depend on which gates are open in the layers before it. The first sweep over ``loader`` therefore
    sets a unit's threshold, from all its logits so far, before the unit's output goes on. Further sweeps compute the
    quantiles again with all thresholds held, until no threshold changes. As many sweeps as units are always enough
    (twelve units took eight), and for a single batch one is. Where a unit runs several times for a batch, its logits
    may depend on its own threshold; then at most four sweeps are made. A bounded random sample of each unit's logits is
    kept.

    Args:
        model: holds stochastic units with a ``target_rate`` (every conditional layer does). It runs in ``eval()`` and
            returns to its own mode afterwards.
        loader: yields batches; must allow several passes (a list or a DataLoader, no generator).
        target_rate: s for all units, instead of their own.
        forward: runs the model on a batch; by default ``model(**batch)`` for a mapping, ``model(batch[0])`` for a tuple
            or list, otherwise ``model(batch)``.
        local: with several processes (torch.distributed), use this process's loader alone. Otherwise all processes call
            this, each with its part of the data, of any size, and the quantile is that of all logits together.
        timeout: seconds to wait for the other processes to call this too.

    Returns:
        unit's name -> share of its gates that are open now, on ``loader``. It differs from s where gates tie
        or, for rectifiers, where fewer than s are above zero. Units whose gates are always open are left out.

    Raises:
        ValueError: if no unit has a target rate, the loader is an iterator or yields nothing, a rate lies outside
            (0, 1), the model runs none of its units, or logits are not finite.
        RuntimeError: if another process does not call this in time, or fails in its part.

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
    run = forward or run_on
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
    together = is_distributed() and not local
    if together:
        meet("calibrate_thresholds", check_positive(timeout, "timeout"))
    modes = [(module, module.training) for module in model.modules()]
    before = {name: unit.threshold.clone() for name, unit in units.items()}
    model.eval()
    try:
        with torch.no_grad(), sampling(model, on=False), alone(not together):
            return _settle(model, units, target_rate, loader, run)
    except BaseException:
        for name, threshold in before.items():
            units[name].threshold.copy_(threshold)
        raise
    finally:
        for module, mode in modes:
            module.training = mode


def _settle(
    model: nn.Module,
    units: dict[str, StochasticUnit],
    target_rate: float | None,
    loader: Iterable[Any],
    run: Callable[..., Any],
) -> dict[str, float]:
    """Sweep until the thresholds no longer change; return the shares that they open, in the order of running.

    Each sweep fixes one more unit of a chain, and thresholds that did not change in a whole sweep are final. So all
    processes together find what one process would find with all of the data.
    """
    for sweep in itertools.count(1):
        samples = {name: _Sample(unit, target_rate) for name, unit in units.items()}
        needed, order = _swept(model, samples, loader, run, moving=sweep == 1)
        before = [units[name].threshold.clone() for name in order]
        shares = {name: samples[name].settle() for name in order}
        still = all(torch.equal(units[name].threshold, at) for name, at in zip(order, before, strict=True))
        if sweep >= needed or (still and sweep > 1):
            break
    return shares


def _swept(
    model: nn.Module, samples: dict[str, "_Sample"], loader: Iterable[Any], run: Callable[..., Any], moving: bool
) -> tuple[int, list[str]]:
    """Sweep; return how many sweeps are enough, and the units that ran, in their order, in any process."""
    error: Exception | None = None
    once, batches = True, 0
    try:
        once, batches = _sweep(model, samples, loader, run, moving)
    except Exception as caught:
        error = caught
    order = sorted((name for name in samples if samples[name].place), key=lambda name: samples[name].place)
    if not is_distributed():
        if error is not None:
            raise error
        return 1 if once and batches == 1 else len(order) if once else _CIRCLE, order
    empty = isinstance(error, _NothingSeenError)
    found = gathered((None if error is None or empty else f"{type(error).__name__}: {error}", order, once))
    if error is not None and not empty:
        raise error
    for rank, (said, _, _) in enumerate(found):
        if said is not None:
            raise RuntimeError(f"calibrate_thresholds: process {rank} failed: {said}")
    order = max((names for _, names, _ in found), key=len)
    if not order:
        raise error or ValueError("loader: yielded no batch in any process")
    return len(order) if all(each for *_, each in found) else _CIRCLE, order


class _NothingSeenError(ValueError):
    """This process has no batch: an error, unless others have some."""


class _Seen(Exception):  # noqa: N818
    """Ends a forward pass once all units have run."""


class _Sample:
    """A bounded random sample of a unit's logits, on the CPU."""

    def __init__(self, unit: StochasticUnit, rate: float | None) -> None:
        self.unit, self.kept, self.total, self.share_kept = unit, list[Tensor](), 0, 1.0
        self.rate = rate if rate is not None else cast(float, unit.target_rate)
        self.generator = torch.Generator("cpu").manual_seed(0)
        self.place, self.calls = 0, 0
        """The unit's place in the order of running, from 1 (0: it has not run yet), and how often it ran."""

    def add(self, logits: Tensor) -> None:
        logits = logits.detach().cpu()
        check_logits(logits)
        if self.unit.mask is not None:
            logits = logits[self.unit.mask.cpu()]
        self.kept.append(self._thin(logits.to(wide(logits)).flatten(), self.share_kept))
        self.total += self.kept[-1].numel()
        if self.total > _KEPT:
            self.kept = [self._thin(torch.cat(self.kept), 0.5)]
            self.share_kept, self.total = self.share_kept / 2, self.kept[0].numel()

    def _thin(self, values: Tensor, keep: float) -> Tensor:
        if keep == 1:
            return values
        return values[torch.rand(values.shape, generator=self.generator, device="cpu") < keep]

    def logits(self) -> Tensor:
        empty = torch.zeros(0, dtype=wide(self.unit.threshold), device="cpu")
        self.kept = [torch.cat(self.kept) if self.kept else empty]
        return self.kept[0]

    def share(self) -> float:
        """Return the share that the threshold in force opens, of all processes' logits."""
        logits, unit = self.logits(), self.unit
        opened = int((unit.estimator.deterministic(logits, unit.threshold.to(logits)) != 0).sum())
        seen = [opened / self.share_kept, logits.numel() / self.share_kept]
        opened_by_all, count = total(seen) if is_distributed() else seen
        return opened_by_all / count if count else 0.0

    def settle(self) -> float:
        """Set the threshold to the (1 − rate)-quantile, and return the share of gates that it opens."""
        logits = self.logits()
        if not (total([logits.numel()])[0] if is_distributed() else logits.numel()):
            raise ValueError("loader: yielded only empty batches")
        pooled = is_distributed()
        self.unit.threshold.copy_(
            pooled_quantile(logits, self.rate, self.share_kept) if pooled else _quantile(logits, self.rate)
        )
        return self.share()

    def move(self) -> None:
        """Set the threshold from the logits seen so far; to 0 if there are none."""
        values = self.logits()
        values = values[:: max(1, values.numel() // _MOVING) | 1]  # an odd step, so that no unit is picked every time
        self.unit.threshold.copy_(_quantile(values, self.rate) if values.numel() else torch.tensor(0.0))


def _sweep(
    model: nn.Module, samples: dict[str, _Sample], loader: Iterable[Any], run: Callable[..., Any], moving: bool
) -> tuple[bool, int]:
    """Collect the logits of all units; return whether each ran once for a batch, and how many batches there were."""
    ran = wanted = batches = 0

    def see(sample: _Sample, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        nonlocal ran
        ran += 1
        sample.place = sample.place or ran
        sample.calls += 1
        sample.add(args[0] if args else kwargs["logits"])
        if moving:
            sample.move()
        if batches > 0 and ran == wanted:
            raise _Seen

    hooks = [
        sample.unit.register_forward_pre_hook(
            lambda _, args, kwargs, sample=sample: see(sample, args, kwargs), with_kwargs=True
        )
        for sample in samples.values()
    ]
    try:
        for batch in loader:
            ran = 0
            with contextlib.suppress(_Seen):
                run(model, batch)
            if not batches and not ran:
                raise ValueError("model: ran none of its stochastic units with a target_rate on the first batch")
            wanted, batches = (ran, 1) if not batches else (wanted, batches + 1)
    finally:
        for hook in hooks:
            hook.remove()
    if not batches:
        again = "" if moving else " on a second pass; give a list or a DataLoader, not a generator"
        raise _NothingSeenError(f"loader: yielded no batch{again}")
    return all(sample.calls <= batches for sample in samples.values()), batches


def _quantile(logits: Tensor, rate: float) -> Tensor:
    return logits.kthvalue(min(logits.numel(), max(1, round((1 - rate) * logits.numel())))).values
