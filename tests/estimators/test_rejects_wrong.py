"""The contract rejects estimators that are wrong on purpose; a suite that lets one of them pass proves nothing."""

import pytest
import test_contract as contract
import torch

import oracles
from gatelet.diagnose.table import FACTS, Facts
from gatelet.estimators import NoisyRectifier, ScoreFunction, SmoothTimesStochastic, StraightThrough


class SignError(ScoreFunction):
    """(σ − h)·(L − L̄): climbs instead of descending."""

    def coefficients(self, logits, gates, losses, noise=None):
        return -super().coefficients(logits, gates, losses, noise)


class OwnLossInBaseline(ScoreFunction):
    """Takes the batch into L̄ before L̄ is subtracted from it."""

    def coefficients(self, logits, gates, losses, noise=None):
        difference = gates - logits.sigmoid()
        self.current_baseline(logits.shape[-1])
        self.update(difference, losses.unsqueeze(-1))
        return difference * (losses.unsqueeze(-1) - self.current_baseline(logits.shape[-1]))


class ClaimsToBeUnbiased(StraightThrough):
    """Straight-through that does not declare its bias."""

    unbiased = True


class PrintedEquation3(ScoreFunction):
    """h = 1[z > σ(a)], as the paper prints it: P(h = 1) = 1 − σ(a)."""

    def forward(self, logits, noise):
        return (noise > logits.detach().sigmoid()).to(logits.dtype)


class PrintedProposition2(SmoothTimesStochastic):
    """b ~ Bernoulli(p) times √p, as the original STS code samples it: E[h] = p^1.5."""

    def forward(self, logits, noise):
        root = logits.sigmoid().sqrt()
        return root * (noise < logits.detach().sigmoid())


FACTS[PrintedProposition2] = Facts()  # jumps at p


class ForgottenStd(NoisyRectifier):
    """Scales its noise and forgets to in the firing probability."""

    def fire_probability(self, logits):
        return torch.special.ndtr(logits)


class LeaksIntoClosedUnits(NoisyRectifier):
    """A leaky derivative under the promise that closed units receive none."""

    def forward(self, logits, noise):
        gates = super().forward(logits, noise)
        return gates + 0.01 * (logits - logits.detach())


class DrawsItsOwnNoise(ScoreFunction):
    """Ignores the noise it is given."""

    def forward(self, logits, noise):
        return super().forward(logits, torch.rand_like(noise))


class CountsItsLossTwice(ScoreFunction):
    """The signal's product is not cancelled in the value."""

    def signal(self, logits, gates, losses, noise=None):
        return super().signal(logits, gates, losses, noise) + losses.detach()


class RoundsItsProbability(ScoreFunction):
    """Compares the noise with a probability of 8 bits."""

    def forward(self, logits, noise):
        return (noise < logits.detach().sigmoid()).to(logits.dtype)


class NoGradient(ScoreFunction):
    """Samples, and sends nothing down (the mean-zero estimator that a peer ships)."""

    def coefficients(self, logits, gates, losses, noise=None):
        return torch.zeros_like(gates)


def expectation(name, make):
    contract.check_expectation(name, make, "table", 1, 2)


def expectation_of_a_batch(name, make):
    contract.check_expectation(name, make, "network", 3, 1)


WRONG = [
    (SignError, {}, [expectation, expectation_of_a_batch, contract.check_expectation_of_replicas]),
    (OwnLossInBaseline, {}, [expectation, expectation_of_a_batch, contract.check_expectation_of_replicas]),
    (OwnLossInBaseline, {"baseline": "running_mean"}, [expectation, expectation_of_a_batch]),
    (ClaimsToBeUnbiased, {}, [expectation, expectation_of_a_batch]),
    # On the table, which is linear in every gate, the sigmoid slope is exact; the network tells.
    (ClaimsToBeUnbiased, {"slope": "sigmoid"}, [expectation_of_a_batch]),
    (PrintedEquation3, {}, [expectation, contract.check_fire_probability]),
    (PrintedEquation3, {"baseline": "none"}, [expectation, contract.check_fire_probability]),
    (PrintedProposition2, {}, [expectation, contract.check_fire_probability]),
    (ForgottenStd, {"std": 0.5}, [contract.check_fire_probability, contract.check_logit_at]),
    (LeaksIntoClosedUnits, {}, [expectation, contract.check_support]),
    (DrawsItsOwnNoise, {}, [contract.check_generator, contract.check_value_kept]),
    (CountsItsLossTwice, {}, [contract.check_value_kept]),
    (RoundsItsProbability, {}, [contract.check_half_precision]),
    (NoGradient, {}, [expectation]),
]


def _name(cls):
    """The name of the estimator that the wrong one pretends to be: its base's."""
    return next(name for name, base in contract.ALL.items() if base in cls.__mro__)


@pytest.mark.parametrize(
    ("cls", "options", "check"),
    [
        pytest.param(cls, options, check, id=f"{contract.label(cls.__name__, options)}-{check.__name__}")
        for cls, options, checks in WRONG
        for check in checks
    ],
)
def test_rejected(cls, options, check):
    base = contract.ALL[_name(cls)]
    check(_name(cls), lambda: base(**options))  # the same check passes what it should pass
    with pytest.raises(AssertionError):
        check(_name(cls), lambda: cls(**options))


def test_bias_must_be_declared():
    with pytest.raises(AssertionError, match="bias must be declared: new_estimator"):
        oracles.truth("new_estimator", StraightThrough())


def test_an_unbiased_unit_of_another_law_needs_its_truth():
    with pytest.raises(AssertionError, match=r"oracles\.EXACT must say"):
        oracles.truth("new_unit", NoisyRectifier())


def test_attributes_must_be_declared():
    class Undocumented(StraightThrough):
        pass

    class Undated(StraightThrough):
        __doc__ = StraightThrough.__doc__
        reference = "a talk"

    for cls in (Undocumented, Undated):
        with pytest.raises(AssertionError):
            contract.check_declared("straight_through", cls)
