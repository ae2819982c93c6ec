"""Supplement A.1: the Kullback-Leibler penalty that holds the firing rate of stochastic gates."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet._checks import check_positive, check_rate
from gatelet.estimators import Estimator
from gatelet.estimators._distributed import batch_mean
from gatelet.estimators._noise import wide
from gatelet.sparsity._controller import Controller


class KLRate(Controller):
    """Pulls each unit's mean firing probability over the batch to the target rate.

    λ Σ_i KL(s ‖ p_i), p_i = mean over the batch of P(h_i ≠ 0) (A.1; its eq. 1 misprints the brackets of
    the cross-entropy −(s log p_i + (1 − s) log(1 − p_i)), which differs from the KL by a constant).
    The probability is that the gate *fires*: for STS it is √p. The batch is that of all processes of
    torch.distributed together.

    Args:
        target_rate: s.
        weight: λ.

    Raises:
        ValueError: for a rate outside (0, 1) or a weight that is not above 0; at the call, for an estimator
            whose firing probability has no gradient.

    >>> import torch, gatelet
    >>> half = torch.zeros(2, 3)                                        # three units at p = ½
    >>> KLRate(0.1, weight=1.0).penalty(gatelet.estimators.StraightThrough(), half, half)
    tensor(1.1042)

    Reference: Y. Bengio, N. Léonard, A. Courville, "Estimating or Propagating Gradients Through Stochastic
    Neurons for Conditional Computation", 2013, arXiv:1308.3432, supplement A.1.
    """

    def __init__(self, target_rate: float, weight: float = 0.1) -> None:
        super().__init__()
        self.target_rate = check_rate(target_rate)
        self.weight = check_positive(weight, "weight")

    def penalty(
        self, estimator: Estimator, logits: Float[Tensor, "*lead N"], gates: Float[Tensor, "*lead N"]
    ) -> Float[Tensor, ""] | None:
        """Return λ Σ_i KL(s ‖ p_i)."""
        probability = estimator.fire_probability(logits.to(wide(logits)))
        if logits.requires_grad and not probability.requires_grad:
            raise ValueError(
                f"KLRate: the firing probability of {type(estimator).__name__} does not depend smoothly on its "
                "logits; hold its rate with AdaptiveL1"
            )
        return rate_penalty(probability, self.target_rate, self.weight)

    def extra_repr(self) -> str:
        """Show the rate and the weight."""
        return f"target_rate={self.target_rate:g}, weight={self.weight:g}"


def rate_penalty(probability: Float[Tensor, "*lead N"], s: float, weight: float) -> Float[Tensor, ""]:
    """Return λ Σ_i KL(s ‖ p_i), p_i the mean over the examples of all processes; zero if there are none."""
    rate = batch_mean(probability)
    if rate is None:
        return probability.new_zeros(())
    # This keeps the penalty finite where a rate rounds to 0 or 1. The bounds are the nearest numbers that are
    # neither, because a unit beyond them gets no gradient, and the gradient it should get, s − p per logit, is not
    # small.
    rate = rate.clamp(torch.finfo(rate.dtype).tiny, 1 - torch.finfo(rate.dtype).eps / 2)
    entropy = s * math.log(s) + (1 - s) * math.log1p(-s)
    return weight * (entropy - s * rate.log() - (1 - s) * torch.log1p(-rate)).sum()
