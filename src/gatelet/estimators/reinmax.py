"""Second-order straight-through."""

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet._checks import check_positive
from gatelet.estimators._base import AnyKind, Estimator, straight_through


class ReinMax(Estimator):
    """Straight-through of second order: Heun's rule for the loss difference between two outcomes.

    h ~ Bernoulli(p), p = σ(a); ∂L/∂a ≈ ∂L/∂h · (2 p₁(1 − p₁) − ½ p(1 − p)), p₁ = (h + σ(a/τ))/2. Categorical, with
    J(π) = diag(π) − ππᵀ: ∂L/∂a ≈ (2 J(π₁) − ½ J(π)) ∂L/∂h, π₁ = (h + softmax(a/τ))/2 (theorem 3.2, algorithm 2).
    At τ = 1 the Bernoulli factor is ½|h − p|, and both forms are :class:`~gatelet.estimators.zgr.ZGR`.

    Bias: with τ = 1, E[ĝ_i] = p(1 − p)·½(E[∂L/∂h_i | h_i = 1] + E[∂L/∂h_i | h_i = 0]): exact for losses that are
    quadratic in each gate, of third order in general. With another τ, Σ_h P(h)·∂L/∂h_i(h) times the factor above.
    Variance: that of ∂L/∂h times the factor; no noise but that of the gates.

    Args:
        temperature: τ of the midpoint, a float; it has no derivative. Above 1 it lowers the variance; only 1 is exact
            for quadratics.
        kind: ``"bernoulli"`` or ``"categorical"``.

    Raises:
        ValueError: for a temperature that is not above 0.

    >>> import torch
    >>> a = torch.tensor([0.0, 0.0], requires_grad=True)
    >>> h = ReinMax()(a, torch.tensor([0.4, 0.6]))
    >>> h
    tensor([1., 0.], grad_fn=<AddBackward0>)
    >>> torch.autograd.grad(h.sum(), a)[0]
    tensor([0.2500, 0.2500])

    Reference: L. Liu, C. Dong, X. Liu, B. Yu, J. Gao, "Bridging Discrete and Backpropagation: Straight-Through and
    Beyond", 2023, arXiv:2304.08612.
    """

    unbiased = False
    needs = "path"
    support = "all"
    kinds = ("bernoulli", "categorical")
    reference = "Liu, Dong, Liu, Yu, Gao 2023, arXiv:2304.08612"

    def __init__(self, temperature: float = 1.0, kind: AnyKind = "bernoulli") -> None:
        super().__init__(kind)
        self.temperature = check_positive(temperature, "temperature")

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return the sample, with the second-order derivative behind it."""
        wide = logits.to(noise.dtype).contiguous()
        with torch.no_grad():
            p = self.probability(wide)
            gates = self.form.sample(wide, noise, p)
        return straight_through(gates, self.path(wide, gates, p)).to(logits.dtype)

    def path(self, a: Tensor, gates: Tensor, p: Tensor) -> Tensor:
        """Return a function linear in the logits a that has the estimator's derivative."""
        if self.temperature == 1:  # 2 J(π₁) − ½ J(π) is this, for one-hot gates too
            return self.form.second_order(a, gates, p)
        with torch.no_grad():
            middle = (gates + self.probability(a / self.temperature)) / 2
        return self.form.linear(a, ((2.0, middle), (-0.5, p)))
