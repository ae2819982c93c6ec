"""Exactly k of N, with the gradient of the exact marginals."""

from jaxtyping import Float
from torch import Tensor

from gatelet.estimators._base import AnyKind, Estimator, straight_through


class SIMPLE(Estimator):
    """Samples exactly k of an example's units, and sends the gradient back through their exact marginals.

    h ~ P(h) ∝ exp(Σ a_i h_i) over the gates with k ones; ∂L/∂a ≈ (∂μ/∂a)ᵀ ∂L/∂h, μ_i = P(h_i = 1), and
    ∂μ/∂a = Cov(h). Marginals and samples take log₂ N steps.

    Bias: E[ĝ] = Cov(h)·E_h[∂L/∂h]: exact for linear losses.
    Variance: that of ∂L/∂h, times a matrix with entries of at most ¼; the lowest of the estimators for subsets.

    Args:
        k: how many of the units are open, in training and in ``eval()``.
        kind: ``"subset"``, the only form.

    Raises:
        ValueError: for fewer than k logits.

    >>> import torch
    >>> a = torch.zeros(3, requires_grad=True)
    >>> h = SIMPLE(k=2)(a, torch.tensor([0.9, 0.1, 0.0]))
    >>> h.sum()
    tensor(2., grad_fn=<SumBackward0>)
    >>> torch.autograd.grad((h * torch.tensor([1.0, 0.0, 0.0])).sum(), a)[0]       # Cov(h_1, h)
    tensor([ 0.2222, -0.1111, -0.1111])

    Reference: K. Ahmed, Z. Zeng, M. Niepert, G. Van den Broeck, "SIMPLE: A Gradient Estimator for k-Subset Sampling",
    2022, arXiv:2210.01941.
    """

    unbiased = False
    needs = "path"
    kinds = ("subset",)
    rated = False
    reference = "Ahmed, Zeng, Niepert, Van den Broeck 2022, arXiv:2210.01941"

    def __init__(self, k: int = 1, kind: AnyKind = "subset") -> None:
        super().__init__(kind, k if isinstance(kind, str) else None)

    def forward(self, logits: Float[Tensor, "*lead N"], noise: Float[Tensor, "*lead N"]) -> Float[Tensor, "*lead N"]:
        """Return the sample, with the derivative of the marginals."""
        a = logits.to(noise.dtype)
        return straight_through(self.sample(a, noise), self.probability(a)).to(logits.dtype)
