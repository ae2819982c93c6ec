"""What exact moments and certificates need to know about each estimator, one row each. Training does not need it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gatelet import estimators as all_of
from gatelet.estimators import Estimator
from gatelet.estimators._noise import NONE

Breaks = Callable[[Any, Tensor], Tensor]


def at_probability(method: Any, logits: Tensor) -> Tensor:
    """Return σ(a), where a sampled gate jumps."""
    return logits.sigmoid().unsqueeze(-1)


def at_minus_logit(method: Any, logits: Tensor) -> Tensor:
    """Return −a, where the gate of a perturbed logit jumps, or a relaxed one passes ½ and is steepest."""
    return -logits.unsqueeze(-1)


def nowhere(method: Any, logits: Tensor) -> Tensor:
    """Return none: the gate is smooth in its noise, or has none."""
    return logits.new_zeros((*logits.shape, 0))


def at_shifted_probabilities(method: Any, logits: Tensor) -> Tensor:
    """Return σ(a) and σ(a ± c), c the step of the perturbation."""
    return torch.stack([(logits + shift).sigmoid() for shift in (-method.step, 0.0, method.step)], -1)


def at_both_ends(method: Any, logits: Tensor) -> Tensor:
    """Return σ(a) and 1 − σ(a), where the first and where the second of an antithetic pair switches."""
    return torch.stack([logits.sigmoid(), (-logits).sigmoid()], -1)


def no_values(method: Any) -> tuple[float, ...]:
    """Return none: nothing jumps in the further noise."""
    return ()


@dataclass(frozen=True, kw_only=True)
class Facts:
    """How the noise of one estimator is summed over, and in which further forms it is certified."""

    breaks: Breaks = at_probability
    """(method, logits (*lead, N)) -> (*lead, N, J): the noise at which a unit's gate jumps or has a kink."""
    constant: bool = True
    """Whether gates and gradient are constant in the noise between its breaks (they are smooth there otherwise)."""
    more_breaks: Callable[[Any], tuple[float, ...]] = no_values
    """The values of the further noise at which a gate or its gradient jumps."""
    summable: bool = True
    """Whether the expectation is a sum or an integral unit by unit, so that ``moments`` can compute it."""
    closed: float = 0.0
    """A gate counts as open above this value; ½ for relaxed gates, which are never exactly 0."""
    coupled: bool = False
    """Whether replicas, or examples, depend on each other's noise, so that none can be looked at alone."""
    variants: Sequence[Mapping[str, Any]] = ()
    """Options that are certified beside the defaults."""

    def splits(self, method: Estimator, logits: Tensor) -> Tensor:
        """Return the breaks of this estimator's main noise, at these logits."""
        return nowhere(method, logits) if method.law == NONE else self.breaks(method, logits)


FACTS: dict[type[Estimator], Facts] = {
    all_of.NoisyRectifier: Facts(
        breaks=lambda method, logits: (-logits / method.std).unsqueeze(-1),
        constant=False,
        variants=({"noise": "logistic"}, {"noise": "gaussian", "std": 0.5}),
    ),
    all_of.SmoothTimesStochastic: Facts(breaks=lambda method, logits: method.fire_probability(logits).unsqueeze(-1)),
    all_of.ScoreFunction: Facts(variants=({"baseline": "running_mean"}, {"baseline": "none"})),
    all_of.StraightThrough: Facts(
        variants=({"slope": "sigmoid"}, {"unit": "hard"}, {"slope": "sigmoid", "unit": "hard"})
    ),
    all_of.NoisySigmoid: Facts(breaks=nowhere, constant=False, variants=({"std": 0.5},)),
    all_of.StraightThroughSampled: Facts(more_breaks=lambda method: (method.share,), variants=({"share": 0.5},)),
    all_of.ClippedStraightThrough: Facts(variants=({"unit": "hard"},)),
    all_of.ReinMax: Facts(variants=({"temperature": 1.5},)),
    all_of.StraightThroughGumbel: Facts(breaks=at_minus_logit, constant=False, variants=({"temperature": 1.0},)),
    all_of.GumbelRao: Facts(constant=False, variants=({"inner": 1},)),
    all_of.GappedStraightThrough: Facts(variants=({"temperature": 0.5},)),
    all_of.JumpReLU: Facts(variants=({"threshold": 0.5, "bandwidth": 0.1},)),
    all_of.Concrete: Facts(breaks=at_minus_logit, constant=False, closed=0.5, variants=({"temperature": 1.0},)),
    all_of.DecoupledStraightThrough: Facts(
        breaks=lambda method, logits: (logits / method.forward_temperature).sigmoid().unsqueeze(-1),
        variants=({"forward_temperature": 0.5, "backward_temperature": 1.5},),
    ),
    all_of.StochasticGates: Facts(
        breaks=lambda method, logits: torch.stack([-logits, 1 - logits], -1) / method.std,
        constant=False,
        variants=({"std": 1.0},),
    ),
    all_of.IMLE: Facts(breaks=at_minus_logit, summable=False),  # where the other gate jumps depends on the loss
    all_of.ARMS: Facts(summable=False, coupled=True),
    all_of.CARMS: Facts(summable=False, coupled=True),
    all_of.ARSM: Facts(constant=False, summable=False),  # the noise of all classes weighs the losses
    all_of.ShrunkBaseline: Facts(coupled=True),
    all_of.BitFlip: Facts(summable=False),  # which unit flips is one draw of all
    all_of.HardConcrete: Facts(
        breaks=lambda method, logits: method.ends(logits),
        constant=False,
        variants=({"temperature": 0.5, "low": -0.2, "high": 1.3},),
    ),
    all_of.REBAR: Facts(breaks=at_minus_logit, constant=False, variants=({"eta": 0.5, "temperature": 1.0},)),
    all_of.ARM: Facts(breaks=at_both_ends, constant=False),
    all_of.DisARM: Facts(breaks=at_both_ends),
    all_of.UnorderedSet: Facts(summable=False),  # a draw depends on the ones before it
    all_of.FiniteDifferences: Facts(breaks=at_shifted_probabilities),
    all_of.SPSA: Facts(breaks=at_shifted_probabilities),
    all_of.FieteSeung: Facts(constant=False, summable=False),  # where a gate jumps depends on the perturbation
}
"""The one table. Your own estimator may add its row."""


def forms(cls: type[Estimator]) -> list[Mapping[str, Any]]:
    """Return the forms in which the certificate has an estimator: the defaults, its variants, one of N."""
    subset: list[Mapping[str, Any]] = [{"kind": "subset", "k": 1}] if {"bernoulli", "subset"} <= set(cls.kinds) else []
    return [{}, *facts(cls).variants, *subset]


def facts(method: Estimator | type[Estimator]) -> Facts:
    """Return the facts of an estimator, or of the nearest class it derives from; by default a sampled gate's."""
    cls = method if isinstance(method, type) else type(method)
    return next((FACTS[base] for base in cls.__mro__ if base in FACTS), Facts())
