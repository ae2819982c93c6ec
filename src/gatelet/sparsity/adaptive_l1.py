"""Supplement A.1: the L1 penalty of rectifier gates, whose weight follows the share of open gates."""

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet._checks import check_positive, check_rate
from gatelet.estimators import Estimator
from gatelet.estimators._distributed import batch_mean
from gatelet.estimators._noise import wide
from gatelet.sparsity._controller import Controller


class AdaptiveL1(Controller):
    """Penalises the gates' sizes, with a weight that rises while too many are open and falls while too few are.

    λ Σ_i |h_i|, averaged over the batch of all processes together (A.1). After every batch λ ← λ(1 + step) if
    the share of gates ≠ 0 exceeded s + band, λ ← λ(1 − step) if it was under s − band; λ is clipped to [1e-13, 1].

    Args:
        target_rate: s.
        weight: the initial λ (original experiments: 1e-5).
        step: relative change of λ per batch (original: 0.1).
        band: half the width of the dead zone (original: 0.01).

    λ is the buffer ``weight``, so it is part of ``state_dict``.

    Raises:
        ValueError: for a rate or a step outside (0, 1), or a weight or band that is not above 0.

    >>> import torch, gatelet
    >>> control = AdaptiveL1(0.1, weight=0.5)
    >>> control.penalty(gatelet.estimators.Rectifier(), torch.ones(2, 4), torch.ones(2, 4))
    tensor(2.)
    >>> control.weight
    tensor(0.5500)

    Reference: Y. Bengio, N. Léonard, A. Courville, "Estimating or Propagating Gradients Through Stochastic
    Neurons for Conditional Computation", 2013, arXiv:1308.3432, supplement A.1.
    """

    LOWEST, HIGHEST = 1e-13, 1.0
    weight: Tensor

    def __init__(self, target_rate: float, weight: float = 1e-5, step: float = 0.1, band: float = 0.01) -> None:
        super().__init__()
        self.target_rate = check_rate(target_rate)
        self.step = check_rate(step, "step")
        self.band = check_positive(band, "band")
        self.register_buffer("weight", torch.tensor(check_positive(weight, "weight")))

    def penalty(
        self, estimator: Estimator, logits: Float[Tensor, "*lead N"], gates: Float[Tensor, "*lead N"]
    ) -> Float[Tensor, ""] | None:
        """Return λ times the mean over the batch of Σ_i |h_i|, then adapt λ."""
        # Half precision would overflow, or round, over thousands of gates.
        size = batch_mean(gates.to(wide(gates)).abs().sum(-1, keepdim=True))
        if size is None:
            return gates.new_zeros(())
        term = self.weight.clone() * size.squeeze(-1)  # a clone, so that the graph keeps the present λ
        with torch.no_grad():
            share = batch_mean((gates != 0).float())
            assert share is not None, "some process has an example"
            share = share.mean()
            up = (share > self.target_rate + self.band).to(share)
            down = (share < self.target_rate - self.band).to(share)
            self.weight.copy_((self.weight * (1 + self.step * (up - down))).clamp(self.LOWEST, self.HIGHEST))
        return term

    def extra_repr(self) -> str:
        """Show the rate."""
        return f"target_rate={self.target_rate:g}, step={self.step:g}, band={self.band:g}"
