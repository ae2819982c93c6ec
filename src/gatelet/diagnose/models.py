"""Bias, variance and cost of estimators at every stochastic layer of a network.

Only this file of the package knows units and tapes; the others know estimators and objectives.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gatelet._checks import check_choice
from gatelet.diagnose.draw import draw
from gatelet.diagnose.measure import Estimators, diagnose
from gatelet.diagnose.report import Report, pandas
from gatelet.diagnose.row import Budget
from gatelet.estimators import ScoreFunction
from gatelet.tape import Tape
from gatelet.units import StochasticUnit, sampling

Loss = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class ModelReport:
    """What :func:`diagnose_model` returns: a report per stochastic layer. It prints as their tables."""

    layers: Mapping[str, Report]
    """Reports by the layers' names in the model, in the order in which they run."""

    def __getitem__(self, layer: str) -> Report:
        """Return the report of this layer."""
        return self.layers[check_choice(layer, self.layers, "layer")]

    def records(self) -> list[dict[str, Any]]:
        """Return all rows as dictionaries of numbers, the layer's name in front."""
        return [{"layer": name} | row for name, report in self.layers.items() for row in report.records()]

    def to_dataframe(self) -> Any:
        """Return all rows as a ``pandas.DataFrame``.

        Raises:
            ImportError: without pandas.
        """
        return pandas().DataFrame(self.records())

    def plot(self, path: str | Path) -> None:
        """Draw bias² and variance against cost into a file, a row of panels per layer.

        Raises:
            ImportError: without matplotlib.
        """
        (budget,) = {report.budget for report in self.layers.values()}
        draw({name: report.measured for name, report in self.layers.items()}, budget, path)

    def __repr__(self) -> str:
        """Show the layers' tables."""
        return "\n\n".join(f"layer {name or '(the model)'}\n{report!r}" for name, report in self.layers.items())


class _Call(NamedTuple):
    unit: StochasticUnit
    logits: Tensor
    gates: Tensor


def diagnose_model(
    model: nn.Module,
    loss_fn: Loss,
    batch: tuple[Tensor, Tensor],
    estimators: Estimators | None = None,
    samples: int = 200,
    budget: Budget | None = None,
    *,
    replicas: int | None = None,
    seed: int = 0,
) -> ModelReport:
    """Bias, variance and cost of estimators at every stochastic layer of a network, layer by layer.

    A layer's objective is the network above its gates: h ↦ L(h), as :func:`gatelet.diagnose` takes it, at the logits
    that one forward pass of the batch gave. Layers below keep the gates of that pass. Layers above draw new gates at
    every call, with their own estimators and under a Tape; their noise is part of the layer's variance. If the
    estimator of such a layer needs several replicas, the score function is used there; it draws the same gates.

    The model runs in the mode it is in, but its units draw their gates in ``eval()`` too. In ``train()`` the noise of
    dropout is part of every estimator's variance, and can hide that of the gates; ``model.eval()`` leaves it out.
    Afterwards everything is restored, also after an error: estimators, modes, buffers, gradients, random state.

    Bias and variance: as :func:`gatelet.diagnose`; the reference is exact for a few gates, and a run of leave-one-out
    with 8 replicas otherwise, or where the network draws noise above the layer. Cost: a forward and a backward pass
    of the network per evaluation.

    Args:
        model: the network; every :class:`~gatelet.StochasticUnit` in it that runs is a layer.
        loss_fn: maps ``(model(x), y)`` to one loss per example (B,), as ``reduction="none"`` does.
        batch: x (B, ...) and y (B, ...).
        estimators: as for :func:`gatelet.diagnose`.
        samples: the number of calls over which an estimator is measured.
        budget: as for :func:`gatelet.diagnose`.
        replicas: as for :func:`gatelet.diagnose`.
        seed: of all noise.

    Raises:
        ValueError: for a model without stochastic units, a unit that runs several times in a forward pass or whose
            logits have no batch in front, a loss that is not one per example; as :func:`gatelet.diagnose`.
        TypeError: for a batch that is not a pair of tensors.

    >>> import torch, gatelet
    >>> unit = gatelet.StochasticUnit("score_function")
    >>> net = torch.nn.Sequential(torch.nn.Linear(5, 4), unit, torch.nn.Linear(4, 3))
    >>> batch = torch.randn(8, 5), torch.randint(3, (8,))
    >>> loss = torch.nn.CrossEntropyLoss(reduction="none")
    >>> report = diagnose_model(net, loss, batch, ["leave_one_out", "straight_through"])
    >>> report["1"].reference_how
    'exact gradient by enumeration'
    >>> [row.name for row in report["1"].rows]
    ['leave_one_out', 'straight_through']
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        raise TypeError("batch must be a pair of tensors (x, y)")
    x, y = batch
    if x.dim() == 0 or y.dim() == 0 or len(x) != len(y) or len(x) == 0:
        raise ValueError(
            f"batch: x and y must hold the same examples, but have shapes {tuple(x.shape)}, {tuple(y.shape)}"
        )
    names = {module: name for name, module in model.named_modules() if isinstance(module, StochasticUnit)}
    if not names:
        raise ValueError("model: has no gatelet.StochasticUnit")
    reports = {}
    with _untouched(model), torch.random.fork_rng(range(torch.cuda.device_count())), sampling(model):
        torch.manual_seed(seed)
        for unit in names:
            if unit.estimator.replicas > 1 or unit.estimator.antithetic:
                unit.estimator = ScoreFunction(baseline="none", kind=unit.estimator.form)
        calls = _run(model, names, loss_fn, x, y)
        for index, call in enumerate(calls):
            logits = call.logits.flatten(1, -call.unit.estimator.event_dims)
            objective = _objective(model, loss_fn, x, y, calls[:index], call)
            reports[names[call.unit]] = diagnose(
                objective,
                logits,
                estimators,
                samples,
                budget,
                replicas=replicas,
                exact=False,  # a network changes its buffers, which vmap does not allow
                kind=call.unit.estimator.form,
                seed=seed,
            )
    return ModelReport(reports)


def _run(model: nn.Module, names: Mapping[StochasticUnit, str], loss_fn: Loss, x: Tensor, y: Tensor) -> list[_Call]:
    """Return what every unit did in one forward pass, in the order in which they ran."""
    calls: list[_Call] = []

    def note(unit: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], gates: Tensor) -> None:
        assert isinstance(unit, StochasticUnit)
        logits = args[0] if args else kwargs["logits"]
        calls.append(_Call(unit, logits.detach(), gates.detach()))

    handles = [unit.register_forward_hook(note, with_kwargs=True) for unit in names]
    try:
        with torch.no_grad():
            loss = loss_fn(model(x), y)
    finally:
        for handle in handles:
            handle.remove()
    _check_loss(loss, len(x))
    if not calls:
        raise ValueError("model: none of its stochastic units runs in a forward pass")
    for call in calls:
        name = names[call.unit]
        if sum(other.unit is call.unit for other in calls) > 1:
            raise ValueError(
                f"model: the unit {name!r} runs several times in a forward pass; its gates then have no "
                "logits of their own to take a gradient at"
            )
        if call.logits.dim() <= call.unit.estimator.event_dims or len(call.logits) != len(x):
            raise ValueError(
                f"model: the unit {name!r} has logits {tuple(call.logits.shape)}, whose first dimension is not the "
                f"batch of {len(x)}"
            )
    return calls


def _objective(
    model: nn.Module, loss_fn: Loss, x: Tensor, y: Tensor, below: list[_Call], at: _Call
) -> Callable[[Tensor], Tensor]:
    """Return the network above a unit's gates: (K, B, N) -> (K, B)."""

    def objective(gates: Tensor) -> Tensor:
        count = len(gates)
        fixed = {call.unit: _replicated(call.gates, count) for call in below}
        fixed[at.unit] = gates.reshape(-1, *at.gates.shape[1:])
        with _replaced(fixed), Tape() as tape:
            losses = loss_fn(model(tape.replicate(x, count)), tape.replicate(y, count))
        _check_loss(losses, count * len(x))
        return tape.surrogate(losses).reshape(count, len(x))

    return objective


def _replicated(tensor: Tensor, count: int) -> Tensor:
    return tensor.expand(count, *tensor.shape).flatten(0, 1)


def _check_loss(loss: Any, examples: int) -> None:
    if not isinstance(loss, Tensor) or loss.shape != (examples,):
        found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"loss_fn must return one loss per example, shape {(examples,)}, not {found}; take reduction='none'"
        )


@contextmanager
def _replaced(gates: Mapping[StochasticUnit, Tensor]) -> Iterator[None]:
    """Let units give these gates, whatever their logits."""
    try:
        for unit, value in gates.items():
            # Not a forward hook: the unit's own estimator, which may need more replicas, must not run.
            vars(unit)["forward"] = lambda logits, *, noise=None, generator=None, value=value: value
        yield
    finally:
        for unit in gates:
            vars(unit).pop("forward", None)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Put everything that a forward pass may change in a model back at the end."""
    saved = [
        (
            module,
            dict(vars(module)),
            {name: (buffer, None if buffer is None else buffer.clone()) for name, buffer in module._buffers.items()},
            dict(module._modules),
        )
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, attributes, buffers, modules in saved:
            vars(module).clear()
            vars(module).update(attributes)
            module._modules.clear()
            module._modules.update(modules)
            module._buffers.clear()
            for name, (buffer, content) in buffers.items():
                if buffer is not None and content is not None:
                    with torch.no_grad():
                        buffer.copy_(content)
                module._buffers[name] = buffer
