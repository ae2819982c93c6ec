"""Section 2.1: the noisy rectifier."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet._checks import check_choice, check_positive
from gatelet.estimators._base import Estimator
from gatelet.estimators._noise import GAUSSIAN, LOGISTIC, Noise, wide

_LAWS: Mapping[str, Noise] = {law.name: law for law in (GAUSSIAN, LOGISTIC)}


class NoisyRectifier(Estimator):
    """Unit with values in [0, ∞) whose noise opens it now and then; plain back-propagation where it is open.

    h = max(0, a + s·z), with z standard Gaussian or standard logistic (section 2.1, eq. 1).
    With logistic z and s = 1: P(h > 0) = σ(a), E[h] = softplus(a), E[dh/da] = σ(a) (Proposition 1).

    Bias: none; h is continuous in a, so the path derivative 1[h > 0] is the gradient of the expected loss.
    Variance: that of the path, small for smooth losses. A closed unit receives no gradient.

    Args:
        noise: ``"gaussian"`` (the paper's experiments) or ``"logistic"`` (its theory).
        std: the scale s: the standard deviation of the Gaussian, the scale of the logistic noise (whose
            standard deviation is s·π/√3).

    Raises:
        ValueError: for an unknown noise or a scale that is not above 0.

    >>> import torch
    >>> unit = NoisyRectifier(noise="logistic")
    >>> unit(torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.5]))
    tensor([1.5000, 0.0000])

    Reference: Y. Bengio, N. Léonard, A. Courville, "Estimating or Propagating Gradients Through Stochastic
    Neurons for Conditional Computation", 2013, arXiv:1308.3432, section 2.1.
    """

    unbiased = True
    needs = "path"
    support = "open"
    binary = False
    reference = "Bengio, Léonard, Courville 2013, arXiv:1308.3432, section 2.1"

    def __init__(self, noise: Literal["gaussian", "logistic"] = "gaussian", std: float = 1.0) -> None:
        super().__init__()
        self.law = _LAWS[check_choice(noise, _LAWS, "noise")]
        self.noise: str = noise
        self.std = check_positive(std, "std")

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return max(0, a + s·z)."""
        return torch.relu(torch.add(logits, noise.to(logits.dtype), alpha=self.std))

    def fire_probability(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return P(z > −a/s)."""
        ratio = logits / self.std
        return torch.special.ndtr(ratio) if self.law == GAUSSIAN else ratio.sigmoid()

    def logit_at(self, probability: float) -> float:
        """Return s times the quantile of the noise."""
        if self.law == LOGISTIC:
            return self.std * super().logit_at(probability)
        return self.std * float(torch.special.ndtri(torch.tensor(probability, dtype=torch.float64, device="cpu")))

    def open_value(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return E[h]: the noise is integrated out, so a unit at or below zero still has a value when open."""
        ratio = (logits / self.std).to(wide(logits))
        if self.law == LOGISTIC:
            mean = torch.nn.functional.softplus(ratio)
        else:
            density = torch.exp(-0.5 * ratio.square()) / math.sqrt(2 * math.pi)
            # Far below zero the two terms cancel to less than rounding; E[h] is positive.
            mean = (ratio * torch.special.ndtr(ratio) + density).clamp_min(torch.finfo(ratio.dtype).tiny)
        return (self.std * mean).to(logits.dtype)
