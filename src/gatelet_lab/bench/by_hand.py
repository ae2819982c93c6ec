"""Estimators written by hand in plain PyTorch, for `gatelet bench estimators` to time the library against.

Each takes logits (B, N) that require a gradient and the objective, and returns what to call backward() on. They draw
their noise in the order in which the library does, so that the same seed gives the same gradient.
"""

import copy
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Objective = Callable[[Tensor], Tensor]
Hand = Callable[[Tensor, Objective], Tensor]


def _mean(objective: Objective, gates: Tensor) -> Tensor:
    return objective(gates).mean()


def _noisy_rectifier(a: Tensor, objective: Objective) -> Tensor:
    return _mean(objective, F.relu(a + torch.randn_like(a)))


def _smooth_times_stochastic(a: Tensor, objective: Objective) -> Tensor:
    root = a.sigmoid().sqrt()
    return _mean(objective, root * (torch.rand_like(a) < root.detach()).to(a.dtype))


def _straight_through(a: Tensor, objective: Objective) -> Tensor:
    gates = (torch.rand_like(a) < a.detach().sigmoid()).to(a.dtype)
    return _mean(objective, gates + a - a.detach())


def _clipped_straight_through(a: Tensor, objective: Objective) -> Tensor:
    gates = (torch.rand_like(a) < a.detach().sigmoid()).to(a.dtype)
    path = F.hardtanh(a)
    return _mean(objective, gates + path - path.detach())


def _reinmax(a: Tensor, objective: Objective) -> Tensor:
    p = a.detach().sigmoid()
    gates = (torch.rand_like(a) < p).to(a.dtype)
    path = (gates - p).abs() / 2 * a
    return _mean(objective, gates + path - path.detach())


def _darn(a: Tensor, objective: Objective) -> Tensor:
    p = a.detach().sigmoid()
    gates = (torch.rand_like(a) < p).to(a.dtype)
    path = (gates - p).square() * a
    return _mean(objective, gates + path - path.detach())


def _decoupled_straight_through(a: Tensor, objective: Objective) -> Tensor:
    gates = (torch.rand_like(a) < a.detach().sigmoid()).to(a.dtype)
    path = (a / 2).sigmoid()
    return _mean(objective, gates + path - path.detach())


def _stochastic_gates(a: Tensor, objective: Objective) -> Tensor:
    return _mean(objective, (a + 0.5 * torch.randn_like(a)).clamp(0, 1))


def _top_k(a: Tensor, objective: Objective) -> Tensor:
    values, index = a.topk(1)
    return _mean(objective, torch.zeros_like(a).scatter(-1, index, values))


def _rectifier(a: Tensor, objective: Objective) -> Tensor:
    return _mean(objective, F.relu(a))


def _sigmoid(a: Tensor, objective: Objective) -> Tensor:
    return _mean(objective, a.sigmoid())


def _noisy_sigmoid(a: Tensor, objective: Objective) -> Tensor:
    return _mean(objective, (a + torch.randn_like(a)).sigmoid())


def _logistic(a: Tensor) -> Tensor:
    return torch.rand_like(a).logit(eps=torch.finfo(a.dtype).tiny)


def _concrete(a: Tensor, objective: Objective) -> Tensor:
    return _mean(objective, ((a + _logistic(a)) / 0.5).sigmoid())


def _straight_through_gumbel(a: Tensor, objective: Objective) -> Tensor:
    z = a + _logistic(a)
    soft = (z / 0.5).sigmoid()
    return _mean(objective, (z.detach() > 0).to(a.dtype) + soft - soft.detach())


def _hard_concrete(a: Tensor, objective: Objective) -> Tensor:
    return _mean(objective, (((a + _logistic(a)) * 1.5).sigmoid() * 1.2 - 0.1).clamp(0, 1))


def _gapped_straight_through(a: Tensor, objective: Objective) -> Tensor:
    gates = (torch.rand_like(a) < a.detach().sigmoid()).to(a.dtype)
    moved = torch.where(gates > 0, a.detach().clamp_min(1.0), a.detach().clamp_max(-1.0))
    soft = (moved + a - a.detach()).sigmoid()
    return _mean(objective, gates + soft - soft.detach())


def _log_prob(a: Tensor, gates: Tensor) -> Tensor:
    return -F.binary_cross_entropy_with_logits(a.expand_as(gates), gates, reduction="none").sum(-1)


class _ScoreFunction:
    """With the library's default baseline, two moving averages per unit; the only one here with a state."""

    def __init__(self) -> None:
        self.numerator, self.denominator = torch.zeros(()), torch.zeros(())

    def __call__(self, a: Tensor, objective: Objective) -> Tensor:
        p = a.detach().sigmoid()
        gates = (torch.rand_like(a) < p).to(a.dtype)
        losses = objective(gates)
        difference, loss = gates - p, losses.detach().unsqueeze(-1)
        signal = difference * (loss - self.numerator / self.denominator.clamp_min(1e-12))
        weight = difference.square()
        self.numerator = 0.9 * self.numerator + 0.1 * (weight * loss).mean(0)
        self.denominator = 0.9 * self.denominator + 0.1 * weight.mean(0)
        return (losses + (signal * a).sum(-1)).mean()


def _leave_one_out(a: Tensor, objective: Objective) -> Tensor:
    gates = (torch.rand(2, *a.shape, dtype=a.dtype) < a.detach().sigmoid()).to(a.dtype)
    losses = objective(gates)
    return (losses + (losses - losses.flip(0)).detach() * _log_prob(a, gates)).mean()


def _antithetic(a: Tensor, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    u = torch.rand_like(a)
    gates = (torch.stack([u, 1 - u]) < a.detach().sigmoid()).to(a.dtype)
    return u, gates, objective(gates)


def _arm(a: Tensor, objective: Objective) -> Tensor:
    u, _, losses = _antithetic(a, objective)
    signal = (losses[1] - losses[0]).detach()
    return (losses.mean(0) + signal * ((u - 0.5) * a).sum(-1)).mean()


def _disarm(a: Tensor, objective: Objective) -> Tensor:
    _, gates, losses = _antithetic(a, objective)
    signal = (losses[0] - losses[1]).detach() / 2
    return (losses.mean(0) + signal * ((gates[0] - gates[1]) * a.detach().abs().sigmoid() * a).sum(-1)).mean()


HAND: Mapping[str, Hand] = {
    "noisy_rectifier": _noisy_rectifier,
    "smooth_times_stochastic": _smooth_times_stochastic,
    "straight_through": _straight_through,
    "clipped_straight_through": _clipped_straight_through,
    "reinmax": _reinmax,
    "darn": _darn,
    "zgr": _reinmax,
    "decoupled_straight_through": _decoupled_straight_through,
    "stochastic_gates": _stochastic_gates,
    "top_k": _top_k,
    "rectifier": _rectifier,
    "sigmoid": _sigmoid,
    "noisy_sigmoid": _noisy_sigmoid,
    "concrete": _concrete,
    "straight_through_gumbel": _straight_through_gumbel,
    "hard_concrete": _hard_concrete,
    "gapped_straight_through": _gapped_straight_through,
    "score_function": _ScoreFunction(),
    "leave_one_out": _leave_one_out,
    "arm": _arm,
    "disarm": _disarm,
}


def by_hand(name: str) -> Hand:
    """Return the hand-written estimator, without state of an earlier use."""
    return copy.deepcopy(HAND[name])
