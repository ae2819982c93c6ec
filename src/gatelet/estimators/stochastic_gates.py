"""The clipped Gaussian unit of feature selection (STG)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet._checks import check_positive
from gatelet.estimators._base import Estimator
from gatelet.estimators._noise import GAUSSIAN, wide


class StochasticGates(Estimator):
    """Unit with values in [0, 1], a Gaussian clipped at both ends; plain back-propagation in between.

    h = max(0, min(1, a + s·z)), z ~ N(0, 1). P(h ≠ 0) = Φ(a/s), the regulariser of the source.

    Bias: none; h is continuous in a, so the pathwise derivative 1[0 < h < 1] is unbiased for the expected loss of these
    gates. Variance: that of the pathwise derivative. A unit at 0 or at 1 receives no gradient.
    (The logit is the source's μ. The source's code adds ½ to it in the forward pass; here the caller does that.)

    Args:
        std: s.

    Raises:
        ValueError: for a scale that is not above 0.

    >>> import torch
    >>> StochasticGates()(torch.tensor([-1.0, 0.5, 2.0]), torch.zeros(3))
    tensor([0.0000, 0.5000, 1.0000])

    Reference: Y. Yamada, O. Lindenbaum, S. Negahban, Y. Kluger, "Feature Selection using Stochastic Gates", 2020,
    arXiv:1810.04247.
    """

    unbiased = True
    needs = "path"
    support = "open"
    binary = False
    law = GAUSSIAN
    reference = "Yamada, Lindenbaum, Negahban, Kluger 2020, arXiv:1810.04247"

    def __init__(self, std: float = 0.5) -> None:
        super().__init__()
        self.std = check_positive(std, "std")

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return max(0, min(1, a + s·z))."""
        return torch.add(logits.to(noise.dtype), noise, alpha=self.std).clamp(0.0, 1.0).to(logits.dtype)

    def fire_probability(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return Φ(a/s)."""
        probability: Tensor = torch.special.ndtr(logits / self.std)
        return probability

    def logit_at(self, probability: float) -> float:
        """Return s times the quantile of the noise."""
        return self.std * float(torch.special.ndtri(torch.tensor(probability, dtype=torch.float64, device="cpu")))

    def open_value(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return E[h]: above 0 at every logit, which max(0, min(1, a)) is not."""
        a = logits.to(wide(logits))
        low, high = -a / self.std, (1 - a) / self.std
        between = torch.special.ndtr(high) - torch.special.ndtr(low)
        bulge = (torch.exp(-low.square() / 2) - torch.exp(-high.square() / 2)) / math.sqrt(2 * math.pi)
        mean: Tensor = a * between + self.std * bulge + torch.special.ndtr(-high)
        return torch.clamp(mean, torch.finfo(a.dtype).tiny, 1.0).to(logits.dtype)
