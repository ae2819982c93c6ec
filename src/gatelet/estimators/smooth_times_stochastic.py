"""Section 2.2: the stochastic-times-smooth unit (STS)."""

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet.estimators._base import Estimator, straight_through
from gatelet.estimators._noise import below, wide


class SmoothTimesStochastic(Estimator):
    """Unit √p with probability √p, else 0; back-propagation through the smooth factor only.

    p = σ(a), b ~ Bernoulli(√p), h = b·√p (section 2.2, eq. 2), b held constant in the backward pass:
    ∂h/∂a = b·√p·(1 − p)/2.
    E[h] = p; P(h > 0) = √p (Proposition 2 (b) prints p, an error); E[f(h)] = f(p) + O(p^1.5) for p → 0.

    Bias: E[ĝ] = E_b[∂L/∂h_i · b_i] · √p(1 − p)/2, half of the derivative of E[h] for a linear loss, since
    the dependence of P(b = 1) on a is ignored.
    Variance: that of the pathwise derivative. A closed unit receives no gradient.

    A unit at p = 0.1 fires 32 % of the time: :meth:`fire_probability` is √p, and that is what a penalty holds at its
    target. In deterministic mode an open gate has the value E[h] = p.

    >>> import torch
    >>> unit = SmoothTimesStochastic()
    >>> unit(torch.zeros(2), torch.tensor([0.70, 0.71]))     # opens below √0.5 = 0.7071
    tensor([0.7071, 0.0000])

    Reference: Y. Bengio, N. Léonard, A. Courville, "Estimating or Propagating Gradients Through Stochastic
    Neurons for Conditional Computation", 2013, arXiv:1308.3432, section 2.2.
    """

    unbiased = False
    needs = "path"
    support = "open"
    binary = False
    reference = "Bengio, Léonard, Courville 2013, arXiv:1308.3432, section 2.2"

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return b·√p, with the derivative b·√p·(1 − p)/2."""
        a = logits.to(wide(logits))  # half precision would round the probability
        with torch.no_grad():
            p = a.sigmoid()
            root = p.sqrt()
            gates = root * below(noise, root, root.dtype)
            slope = torch.addcmul(gates, gates, p, value=-1) / 2
        # Not the derivative of √σ(a) itself, which is 0/0 where σ(a) underflows.
        return straight_through(gates, slope * a).to(logits.dtype)

    def fire_probability(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return √p, as exp(log σ(a) / 2): the derivative stays finite where σ(a) underflows."""
        half = torch.nn.functional.logsigmoid(logits.to(wide(logits))) / 2
        return half.exp().to(logits.dtype)

    def logit_at(self, probability: float) -> float:
        """Return the logit of probability²."""
        return super().logit_at(probability**2)

    def open_value(self, logits: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return E[h] = p."""
        return logits.sigmoid()
