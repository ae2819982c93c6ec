"""The stretched and clipped concrete unit of L0 regularisation."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet._checks import check_positive
from gatelet.estimators._base import Estimator
from gatelet.estimators._kinds import softplus
from gatelet.estimators._noise import LOGISTIC, wide
from gatelet.estimators._temperature import at, keep, relax


class HardConcrete(Estimator):
    """Unit with values in [0, 1], exactly 0 and exactly 1 with positive probability; plain back-propagation.

    h = min(1, max(0, s·(ζ − γ) + γ)), s = σ((a + ℓ)/β), ℓ standard logistic, independent for every unit (eq. 10
    and 11). P(h ≠ 0) = σ(a − β log(−γ/ζ)), differentiable: the expected L0 norm (eq. 12).

    Bias: none; h is continuous in a, so the path derivative is the gradient of the expected loss of its own
    law (which is not Bernoulli's). Variance: that of the path. A unit at 0, and one at 1, receives no gradient.

    Args:
        temperature: β: a float, a scalar tensor (a buffer) or an ``nn.Parameter``, which then receives its gradient.
        low: γ < 0, where the stretched interval begins.
        high: ζ > 1, where it ends.

    Raises:
        ValueError: for a temperature that is not above 0, a ``low`` that is not below 0 or a ``high`` not above 1.

    >>> import torch
    >>> unit = HardConcrete()
    >>> unit(torch.tensor([-2.0, 0.0, 2.0]), torch.zeros(3))
    tensor([0.0000, 0.5000, 1.0000])
    >>> unit.fire_probability(torch.tensor([0.0]))
    tensor([0.8318])

    Reference: C. Louizos, M. Welling, D. P. Kingma, "Learning Sparse Neural Networks through L0 Regularization",
    2018, arXiv:1712.01312.
    """

    unbiased = True
    needs = "path"
    support = "open"
    binary = False
    law = LOGISTIC
    reference = "Louizos, Welling, Kingma 2018, arXiv:1712.01312"
    temperature: float | Tensor

    def __init__(self, temperature: float | Tensor = 2 / 3, low: float = -0.1, high: float = 1.1) -> None:
        super().__init__()
        keep(self, temperature)
        self.low = -check_positive(-low, "-low")
        self.high = 1 + check_positive(high - 1, "high - 1")

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return the stretched and clipped σ((a + ℓ)/β)."""
        return self._stretch(logits.to(noise.dtype) + noise).to(logits.dtype)

    def fire_probability(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return P(h ≠ 0) = σ(a − β log(−γ/ζ))."""
        return (logits - self._opens(logits.dtype)).sigmoid()

    def logit_at(self, probability: float) -> float:
        """Return the logit of the probability plus β log(−γ/ζ)."""
        return super().logit_at(probability) + float(self._opens(torch.float64))

    def open_value(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return the median of h given that it is open, which is above 0 at every logit."""
        exact = logits.to(wide(logits))
        opens = self._opens(exact.dtype)
        # The median of a + ℓ given a + ℓ > c: with t = a − c, c + log(1 + e^t) + log(2 − σ(t)).
        beyond = exact - opens
        return self._stretch(opens + softplus(beyond) + (2 - beyond.sigmoid()).log()).to(logits.dtype)

    def ends(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N 2"]:
        """Return the noise at which the unit opens, and at which it reaches 1."""
        full = at(self.temperature, logits.dtype) * math.log((1 - self.low) / (self.high - 1))
        return torch.stack([self._opens(logits.dtype) - logits, full - logits], -1)

    def _opens(self, dtype: torch.dtype) -> float | Tensor:
        """Return the perturbed logit a + ℓ above which the unit is open."""
        return at(self.temperature, dtype) * math.log(-self.low / self.high)

    def _stretch(self, z: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        return (relax(z, self.temperature, self.form) * (self.high - self.low) + self.low).clamp(0.0, 1.0)
