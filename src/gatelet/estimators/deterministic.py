"""Section 5: the gates of the baselines, for which back-propagation is exact."""

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet._checks import check_positive
from gatelet.estimators._base import Estimator
from gatelet.estimators._noise import GAUSSIAN, NONE, Noise


class Rectifier(Estimator):
    """The noisy rectifier with its noise set to zero.

    h = max(0, a); the gradient is exact (unbiased, no variance). A closed unit receives none.

    >>> import torch
    >>> Rectifier()(torch.tensor([1.0, -1.0]), torch.zeros(2))
    tensor([1., 0.])

    Reference: Y. Bengio, N. Léonard, A. Courville, "Estimating or Propagating Gradients Through Stochastic
    Neurons for Conditional Computation", 2013, arXiv:1308.3432, section 5, "Baseline Rectifier".
    """

    unbiased = True
    needs = "path"
    support = "open"
    binary = False
    law: Noise = NONE
    reference = "Bengio, Léonard, Courville 2013, arXiv:1308.3432, section 5"

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return max(0, a)."""
        return logits.relu()

    def fire_probability(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return 1[a > 0]; its derivative is zero, so a rate must be held by other means (AdaptiveL1)."""
        return (logits > 0).to(logits.dtype)

    def logit_at(self, probability: float) -> float:
        """Return 0, where the unit opens."""
        return 0.0

    def open_value(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return max(0, a)."""
        return logits.relu()


class Sigmoid(Estimator):
    """Ordinary sigmoid gate: always open, trained by plain back-propagation.

    h = σ(a); the gradient is exact (unbiased, no variance).

    >>> import torch
    >>> Sigmoid()(torch.tensor([0.0]), torch.zeros(1))
    tensor([0.5000])

    Reference: Y. Bengio, N. Léonard, A. Courville, "Estimating or Propagating Gradients Through Stochastic
    Neurons for Conditional Computation", 2013, arXiv:1308.3432, section 5, "Baseline Sigmoid".
    """

    unbiased = True
    needs = "path"
    support = "all"
    binary = False
    rated = False
    law: Noise = NONE
    reference = "Bengio, Léonard, Courville 2013, arXiv:1308.3432, section 5"

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return σ(a)."""
        return logits.sigmoid()

    def fire_probability(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return 1."""
        return torch.ones_like(logits)

    def logit_at(self, probability: float) -> float:
        """Return −∞: the gate is open at every logit."""
        return -float("inf")

    def open_value(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return σ(a)."""
        return logits.sigmoid()


class NoisySigmoid(Sigmoid):
    """Sigmoid gate with Gaussian noise in its argument while training.

    h = σ(a + s·z), z ~ N(0, 1).

    Bias: none; the path derivative σ′(a + s·z) is the gradient of the expected loss. Variance: that of the path.

    Args:
        std: the standard deviation s.

    >>> import torch
    >>> NoisySigmoid()(torch.tensor([-1.0]), torch.tensor([1.0]))
    tensor([0.5000])

    Reference: Y. Bengio, N. Léonard, A. Courville, "Estimating or Propagating Gradients Through Stochastic
    Neurons for Conditional Computation", 2013, arXiv:1308.3432, section 5, "Baseline Sigmoid + Noise".
    """

    law = GAUSSIAN

    def __init__(self, std: float = 1.0) -> None:
        super().__init__()
        self.std = check_positive(std, "std")

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return σ(a + s·z)."""
        return torch.add(logits, noise.to(logits.dtype), alpha=self.std).sigmoid()
