"""Straight-through for training that skips closed units: all of them, or all but a random share."""

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet._checks import check_rate
from gatelet.estimators._base import Estimator, straight_through
from gatelet.estimators._noise import UNIFORM


class StraightThroughOpen(Estimator):
    """Straight-through whose closed gates receive no gradient, so that their units need not be computed.

    h ~ Bernoulli(σ(a)); ∂L/∂a ≈ h·∂L/∂h.

    Bias: E[ĝ_i] = E_h[h_i·∂L/∂h_i] = σ(a_i)·E[∂L/∂h_i | h_i = 1]. A closed gate cannot learn that it should have been
    open; only noise opens it.
    Variance: that of ∂L/∂h over the open gates. Cost in training: the open units.

    >>> import torch
    >>> a = torch.tensor([0.0, 0.0], requires_grad=True)
    >>> h = StraightThroughOpen()(a, torch.tensor([0.4, 0.6]))
    >>> torch.autograd.grad((h * torch.tensor([3.0, 5.0])).sum(), a)[0]
    tensor([3., 0.])

    Reference: this library, 2026; after Y. Bengio, N. Léonard, A. Courville, "Estimating or Propagating Gradients
    Through Stochastic Neurons for Conditional Computation", 2013, arXiv:1308.3432, section 4.
    """

    unbiased = False
    needs = "path"
    support = "open"
    reference = "this library, 2026; after Bengio, Léonard, Courville 2013, arXiv:1308.3432, section 4"

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return the sample with the identity's slope where it is open."""
        gates = self.sample(logits, noise)
        return straight_through(gates, logits * gates)


class StraightThroughSampled(Estimator):
    """Straight-through that computes a random share q of the closed units too, and divides their gradient by q.

    h ~ Bernoulli(σ(a)), e ~ Bernoulli(q); ∂L/∂a ≈ (h + (1 − h)·e/q)·∂L/∂h.

    Bias: E[ĝ_i] = E_h[∂L/∂h_i], exactly that of straight-through with the identity slope.
    Variance: that of straight-through, plus (1 − q)/q·E[(1 − h_i)(∂L/∂h_i)²]. Cost in training: the open units and a
    share q of the closed.

    Args:
        share: q.

    Raises:
        ValueError: for a share outside (0, 1).

    >>> import torch
    >>> a = torch.zeros(3, requires_grad=True)
    >>> noise = torch.tensor([[0.4, 0.9], [0.6, 0.1], [0.6, 0.9]])           # open; closed, computed; closed
    >>> h = StraightThroughSampled(share=0.25)(a, noise)
    >>> torch.autograd.grad(h.sum(), a)[0]
    tensor([1., 4., 0.])

    Reference: this library, 2026; after Y. Bengio, N. Léonard, A. Courville, "Estimating or Propagating Gradients
    Through Stochastic Neurons for Conditional Computation", 2013, arXiv:1308.3432, section 4.
    """

    unbiased = False
    needs = "path"
    support = "sampled"
    more = (UNIFORM,)
    reference = "this library, 2026; after Bengio, Léonard, Courville 2013, arXiv:1308.3432, section 4"

    def __init__(self, share: float = 0.1) -> None:
        super().__init__()
        self.share = check_rate(share, "share")

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N 2"]) -> Float[Tensor, "*lead N"]:
        """Return the sample, with slope 1 where it is open and 1/q where it is closed and computed."""
        gates = self.sample(logits, noise[..., 0])
        weight = torch.where(gates > 0, 1.0, self.computed(noise).to(gates.dtype) / self.share)
        return straight_through(gates, logits * weight)

    def computed(self, noise: Float[Tensor, "*lead N 2"]) -> Tensor:
        """Return which closed units are computed."""
        return noise[..., 1] < self.share
